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

SA_INLINE bool
is_real(sa_dtype dtype)
{
    return dtype == (SA_IS_F64 ? SA_F64 : SA_F32);
}

/* One row of dim reals times scale, from any storage type. */
static void
load_row(real *dst, const void *src, sa_dtype dtype, int dim, real scale)
{
    int c = 0;
    if (is_real(dtype)) {
        for (; c + LANES <= dim; c += LANES) {
            vstore(dst + c, vload((const real *)src + c) * vset(scale));
        }
    }
#if defined(SA_HAVE_AVX2) && !defined(SA_REAL_IS_DOUBLE)
    if (dtype == SA_F16) {
        for (; c + 8 <= dim; c += 8) {
            const __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)src + c));
            _mm256_storeu_ps(dst + c, _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(scale)));
        }
    }
#endif
    for (; c < dim; c++) {
        dst[c] = load_one(src, dtype, c) * scale;
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

static void
load_cols(void *cols, int w, const void *const *src_row, sa_dtype dtype, int n_rows, int dim,
          double scale)
{
    real *const dst = cols;
    const bool direct = is_real(dtype);
    const vreal factor = vset((real)scale);
    for (int r0 = 0; r0 < w; r0 += LANES) {
        const int rows = SA_MIN(n_rows - r0, LANES);
        int c = 0;
        for (; direct && c + LANES <= dim; c += LANES) {
            vreal block[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) {
                block[r] = r < rows ? vload((const real *)src_row[r0 + r] + c) * factor : vset(0);
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
                    r < rows ? load_one(src_row[r0 + r], dtype, c) * (real)scale : 0;
            }
        }
    }
}

/* A sum that underflowed may be -0 or 0, as terms of weight 0 were added to it or passed over: + 0
 * writes 0 for both, so that keys a row does not see change no bit. */
static void
store_cols(void *const *dst_row, sa_dtype dtype, const void *cols, int w, int n_rows, int dim,
           const void *factor)
{
    const real *const src = cols;
    const bool direct = is_real(dtype);
    for (int r0 = 0; r0 < n_rows; r0 += LANES) {
        const int rows = SA_MIN(n_rows - r0, LANES);
        const vreal times = vload((const real *)factor + r0);
        int c = 0;
        for (; direct && c + LANES <= dim; c += LANES) {
            vreal block[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) {
                block[r] = vload(src + (int64_t)(c + r) * w + r0) * times + vset(0);
            }
            vtranspose(block);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) {
                if (r < rows) {
                    vstore((real *)dst_row[r0 + r] + c, block[r]);
                }
            }
        }
        for (; c < dim; c++) {
            for (int r = 0; r < rows; r++) {
                const real x = src[(int64_t)c * w + r0 + r] * ((const real *)factor)[r0 + r];
                store_one(dst_row[r0 + r], dtype, c, x + 0);
            }
        }
    }
}

static void
store_row(void *dst, sa_dtype dtype, const void *src, int dim, const void *factor)
{
    const real *const from = src;
    for (int c = 0; c < dim; c++) {
        store_one(dst, dtype, c, from[c] * *(const real *)factor + 0);
    }
}

static void
fill(void *dst, int64_t count, double x)
{
    for (int64_t i = 0; i < count; i++) {
        ((real *)dst)[i] = (real)x;
    }
}
