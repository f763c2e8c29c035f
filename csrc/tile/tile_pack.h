/* tile_pack.h - the only functions that know storage types: rows in, rows out, transposed or not.
 */

SA_INLINE real
load_one(const void *src, sa_dtype dtype, int64_t at)
{
    switch (dtype) {
    case SA_F64:
        return (real)((const double *)src)[at];
    case SA_F16:
        return (real)sa_f16_to_f32(((const uint16_t *)src)[at]);
    case SA_BF16:
        return (real)sa_bf16_to_f32(((const uint16_t *)src)[at]);
    default:
        return (real)((const float *)src)[at];
    }
}

SA_INLINE void
store_one(void *dst, sa_dtype dtype, int64_t at, real x)
{
    switch (dtype) {
    case SA_F64:
        ((double *)dst)[at] = (double)x;
        break;
    case SA_F16:
        ((uint16_t *)dst)[at] = sa_f32_to_f16((float)x);
        break;
    case SA_BF16:
        ((uint16_t *)dst)[at] = sa_f32_to_bf16((float)x);
        break;
    default:
        ((float *)dst)[at] = (float)x;
    }
}

/* Whether vectors of the type are read and written whole. */
SA_INLINE bool
in_vectors(const sa_dtype dtype)
{
    return SA_IS_F64 ? dtype == SA_F64 : dtype != SA_F64;
}

SA_INLINE vreal
load_vector(const void *src, const sa_dtype dtype, int64_t at)
{
#if !defined(SA_REAL_IS_DOUBLE)
    if (dtype != SA_F32) {
        return vload_half((const uint16_t *)src + at, dtype);
    }
#endif
    (void)dtype;
    return vload((const real *)src + at);
}

SA_INLINE void
store_vector(void *dst, const sa_dtype dtype, int64_t at, vreal x)
{
#if !defined(SA_REAL_IS_DOUBLE)
    if (dtype != SA_F32) {
        vstore_half((uint16_t *)dst + at, dtype, x);
        return;
    }
#endif
    (void)dtype;
    vstore((real *)dst + at, x);
}

/* One row of dim reals times scale; here and below dtype is a constant to the compiler. */
SA_INLINE void
load_row_as(const sa_dtype dtype, real *dst, const void *src, int dim, real scale)
{
    int c = 0;
    for (; in_vectors(dtype) && c + LANES <= dim; c += LANES) {
        vstore(dst + c, load_vector(src, dtype, c) * vset(scale));
    }
    for (; c < dim; c++) {
        dst[c] = load_one(src, dtype, c) * scale;
    }
}

static void
load_row(real *dst, const void *src, sa_dtype dtype, int dim, real scale)
{
    switch (dtype) {
    case SA_F64:
        load_row_as(SA_F64, dst, src, dim, scale);
        break;
    case SA_F16:
        load_row_as(SA_F16, dst, src, dim, scale);
        break;
    case SA_BF16:
        load_row_as(SA_BF16, dst, src, dim, scale);
        break;
    default:
        load_row_as(SA_F32, dst, src, dim, scale);
    }
}

static void
load_rows(void *rows, int64_t ld, const void *src, sa_dtype dtype, int64_t row_stride, int n_rows,
          int dim, double scale)
{
    const int64_t step = row_stride * (int64_t)sa_dtype_size(dtype);
    for (int r = 0; r < n_rows; r++) {
        load_row((real *)rows + r * ld, (const char *)src + r * step, dtype, dim, (real)scale);
    }
}

SA_INLINE void
load_cols_as(const sa_dtype dtype, real *dst, int w, const void *const *src_row, int n_rows,
             int dim, real scale)
{
    const vreal factor = vset(scale);
    for (int r0 = 0; r0 < w; r0 += LANES) {
        const int rows = SA_MIN(n_rows - r0, LANES);
        int c = 0;
        for (; in_vectors(dtype) && c + LANES <= dim; c += LANES) {
            vreal block[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) {
                block[r] = r < rows ? load_vector(src_row[r0 + r], dtype, c) * factor : vset(0);
            }
            vtranspose(block);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) {
                vstore(dst + (int64_t)(c + r) * w + r0, block[r]);
            }
        }
        for (; c < dim; c++) {
            for (int r = 0; r < LANES; r++) {
                dst[(int64_t)c * w + r0 + r] =
                    r < rows ? load_one(src_row[r0 + r], dtype, c) * scale : 0;
            }
        }
    }
}

static void
load_cols(void *cols, int w, const void *const *src_row, sa_dtype dtype, int n_rows, int dim,
          double scale)
{
    switch (dtype) {
    case SA_F64:
        load_cols_as(SA_F64, cols, w, src_row, n_rows, dim, (real)scale);
        break;
    case SA_F16:
        load_cols_as(SA_F16, cols, w, src_row, n_rows, dim, (real)scale);
        break;
    case SA_BF16:
        load_cols_as(SA_BF16, cols, w, src_row, n_rows, dim, (real)scale);
        break;
    default:
        load_cols_as(SA_F32, cols, w, src_row, n_rows, dim, (real)scale);
    }
}

/* A sum that underflowed may be -0 or 0, as terms of weight 0 were added to it or passed over: + 0
 * writes 0 for both, so that keys a row does not see change no bit. */
SA_INLINE void
store_cols_as(const sa_dtype dtype, void *const *dst_row, const real *src, int w, int n_rows,
              int dim, const real *factor)
{
    for (int r0 = 0; r0 < n_rows; r0 += LANES) {
        const int rows = SA_MIN(n_rows - r0, LANES);
        const vreal times = vload(factor + r0);
        int c = 0;
        for (; in_vectors(dtype) && c + LANES <= dim; c += LANES) {
            vreal block[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) {
                block[r] = vload(src + (int64_t)(c + r) * w + r0) * times + vset(0);
            }
            vtranspose(block);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) {
                if (r < rows) {
                    store_vector(dst_row[r0 + r], dtype, c, block[r]);
                }
            }
        }
        for (; c < dim; c++) {
            for (int r = 0; r < rows; r++) {
                const real x = src[(int64_t)c * w + r0 + r] * factor[r0 + r];
                store_one(dst_row[r0 + r], dtype, c, x + 0);
            }
        }
    }
}

static void
store_cols(void *const *dst_row, sa_dtype dtype, const void *cols, int w, int n_rows, int dim,
           const void *factor)
{
    switch (dtype) {
    case SA_F64:
        store_cols_as(SA_F64, dst_row, cols, w, n_rows, dim, factor);
        break;
    case SA_F16:
        store_cols_as(SA_F16, dst_row, cols, w, n_rows, dim, factor);
        break;
    case SA_BF16:
        store_cols_as(SA_BF16, dst_row, cols, w, n_rows, dim, factor);
        break;
    default:
        store_cols_as(SA_F32, dst_row, cols, w, n_rows, dim, factor);
    }
}

SA_INLINE void
store_row_as(const sa_dtype dtype, void *dst, const real *src, int dim, real factor)
{
    int c = 0;
    for (; in_vectors(dtype) && c + LANES <= dim; c += LANES) {
        store_vector(dst, dtype, c, vload(src + c) * vset(factor) + vset(0));
    }
    for (; c < dim; c++) {
        store_one(dst, dtype, c, src[c] * factor + 0);
    }
}

static void
store_row(void *dst, sa_dtype dtype, const void *src, int dim, const void *factor)
{
    const real times = *(const real *)factor;
    switch (dtype) {
    case SA_F64:
        store_row_as(SA_F64, dst, src, dim, times);
        break;
    case SA_F16:
        store_row_as(SA_F16, dst, src, dim, times);
        break;
    case SA_BF16:
        store_row_as(SA_BF16, dst, src, dim, times);
        break;
    default:
        store_row_as(SA_F32, dst, src, dim, times);
    }
}

static void
fill(void *dst, int64_t count, double x)
{
    for (int64_t i = 0; i < count; i++) {
        ((real *)dst)[i] = (real)x;
    }
}
