/* tile_thin.h - a few rows times a large matrix, at the rate at which the matrix can be read.
 *
 * Packing b would take longer than the product, so b is read as it lies, each number once for all
 * rows; half precision is widened in registers. Terms are added in the order of sa_tile's product,
 * so the bits are the same. The last columns are summed in vectors too: a scalar loop might round
 * products and sums apart.
 */
typedef struct {
    real *y[SA_THIN];
    const real *a[SA_THIN]; /* past the m-th the last one again: its sums go nowhere */
    int m;
    const void *b;
    int64_t ldb, n, k;
} thin_args;

#define NATIVE (SA_IS_F64 ? SA_F64 : SA_F32)

/* n < LANES numbers, then zeros */
SA_INLINE vreal
load_some(const void *src, const sa_dtype dtype, int64_t at, int64_t n)
{
    real lane[LANES] = {0};
    for (int64_t l = 0; l < n; l++) {
        lane[l] = load_one(src, dtype, at + l);
    }
    return vload(lane);
}

/* ---- b [k, n] -------------------------------------------------------------------------------- */

/* Rows of b that are read side by side: long enough stretches for the hardware to see where they
 * go, and the sums pass through memory once in so many rows. */
#define THIN_TERMS 8

typedef real thin_sums[SA_THIN][SA_THIN_COLUMNS];

/* Columns j .. j + vecs LANES of `terms` rows of b from row t on, for `rows` rows of a, all compile
 * time; where n is not 0, n columns of one vector. */
SA_INLINE void
thin_terms(const thin_args *g, thin_sums acc, const int rows, const sa_dtype dtype, int64_t t,
           const int terms, int64_t j, const int vecs, int64_t n)
{
    vreal sum[SA_THIN][2], column[2];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        for (int v = 0; v < vecs; v++) {
            sum[i][v] = vload(acc[i] + j + v * LANES);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < terms; r++) {
        const int64_t at = (t + r) * g->ldb + j;
        if (rows > 1 ||
            dtype != NATIVE) { /* one row of reals leaves time to look ahead by itself */
            const uint64_t next = (uint64_t)(at + THIN_TERMS * g->ldb) * sa_dtype_size(dtype);
            __builtin_prefetch((const void *)((uintptr_t)g->b + (uintptr_t)next));
        }
        for (int v = 0; v < vecs; v++) {
            column[v] =
                n ? load_some(g->b, dtype, at, n) : load_vector(g->b, dtype, at + v * LANES);
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            const vreal x = vset(g->a[i][t + r]);
            for (int v = 0; v < vecs; v++) {
                sum[i][v] += x * column[v];
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        for (int v = 0; v < vecs; v++) {
            vstore(acc[i] + j + v * LANES, sum[i][v]);
        }
    }
}

SA_INLINE void
thin_across(const thin_args *g, thin_sums acc, const int rows, const sa_dtype dtype, int64_t t,
            const int terms)
{
    int64_t j = 0;
    for (; j + 2 * LANES <= g->n; j += 2 * LANES) {
        thin_terms(g, acc, rows, dtype, t, terms, j, 2, 0);
    }
    for (; j + LANES <= g->n; j += LANES) {
        thin_terms(g, acc, rows, dtype, t, terms, j, 1, 0);
    }
    for (int r = 0; j < g->n && r < terms; r++) {
        thin_terms(g, acc, rows, dtype, t + r, 1, j, 1, g->n - j);
    }
}

SA_INLINE void
thin_rows(const thin_args *g, const int rows, const sa_dtype dtype)
{
    _Alignas(64) thin_sums acc;
    int64_t t = 0;
    for (int i = 0; i < rows; i++) {
        memset(acc[i], 0, sizeof acc[i]);
    }
    for (; t + THIN_TERMS <= g->k; t += THIN_TERMS) {
        thin_across(g, acc, rows, dtype, t, THIN_TERMS);
    }
    for (; t < g->k; t++) {
        thin_across(g, acc, rows, dtype, t, 1);
    }
    for (int i = 0; i < g->m; i++) {
        for (int64_t j = 0; j < g->n; j++) {
            g->y[i][j] += acc[i][j];
        }
    }
}

/* ---- b [n, k] -------------------------------------------------------------------------------- */

#define AHEAD 512 /* bytes */

/* Half precision travels through the transpose in pairs, as one number of the real type. */
#define PAIR(dtype) ((dtype) == NATIVE ? 1 : 2)

/* Of LANES pairs, the numbers at the lower address, or at the higher. */
SA_INLINE vreal
widen_pairs(vreal pairs, const sa_dtype dtype, const bool high)
{
    const vint bits = (vint)pairs;
    if (dtype == SA_BF16) {
        return (vreal)(high ? bits & ~(sint)0xFFFF : bits << 16);
    }
#if defined(SA_HAVE_AVX512) && !defined(SA_REAL_IS_DOUBLE)
    const __m512i half = high ? _mm512_srli_epi32((__m512i)bits, 16) : (__m512i)bits;
    return (vreal)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(half));
#elif defined(SA_HAVE_AVX2) && !defined(SA_REAL_IS_DOUBLE)
    const __m256i half = high ? _mm256_srli_epi32((__m256i)bits, 16)
                              : _mm256_and_si256((__m256i)bits, _mm256_set1_epi32(0xFFFF));
    return (vreal)_mm256_cvtph_ps(
        _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
#else
    real lane[LANES];
    for (int l = 0; l < LANES; l++) {
        lane[l] = (real)sa_f16_to_f32((uint16_t)(high ? bits[l] >> 16 : bits[l]));
    }
    return vload(lane);
#endif
}

/* From column t on, LANES numbers or pairs of each of n <= LANES rows at b, turned: block[i] holds
 * column t + i, or columns t + 2 i and the next. Rows past n repeat the last one, columns past k
 * are 0. */
SA_INLINE void
load_turned(vreal *block, const thin_args *g, const char *b, const sa_dtype dtype, int64_t n,
            int64_t t, const bool whole)
{
    const int64_t size = (int64_t)sa_dtype_size(dtype);
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) {
        const char *const from = b + (SA_MIN(r, n - 1) * g->ldb + t) * size;
        if (dtype == NATIVE) { /* so many rows at once are more than the hardware follows */
            __builtin_prefetch((const void *)((uintptr_t)from + AHEAD));
        }
        block[r] = vset(0); /* memcpy: pairs begin at any number of half precision */
        memcpy(&block[r], from, whole ? sizeof block[r] : (size_t)((g->k - t) * size));
    }
    vtranspose(block);
}

/* sum[i] += column times column t + c of row i */
SA_INLINE void
add_turned(vreal *sum, const thin_args *g, const int rows, const sa_dtype dtype, vreal block,
           int64_t t, int c)
{
    const vreal column = PAIR(dtype) == 2 ? widen_pairs(block, dtype, c % 2) : block;
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        sum[i] += vset(g->a[i][t + c]) * column;
    }
}

/* Columns j .. j + n, n <= LANES. */
SA_INLINE void
turned_strip(const thin_args *g, const int rows, const sa_dtype dtype, int64_t j, int64_t n)
{
    const char *const b = (const char *)g->b + j * g->ldb * (int64_t)sa_dtype_size(dtype);
    const int step = PAIR(dtype) * LANES;
    vreal sum[SA_THIN] = {0}, block[LANES];
    int64_t t = 0;
    for (; t + step <= g->k; t += step) {
        load_turned(block, g, b, dtype, n, t, true);
#pragma GCC unroll 32
        for (int c = 0; c < step; c++) {
            add_turned(sum, g, rows, dtype, block[c / PAIR(dtype)], t, c);
        }
    }
    if (t < g->k) {
        load_turned(block, g, b, dtype, n, t, false);
#pragma GCC unroll 1
        for (int c = 0; c < g->k - t; c++) {
            add_turned(sum, g, rows, dtype, block[c / PAIR(dtype)], t, c);
        }
    }
    for (int i = 0; i < g->m; i++) {
        real lane[LANES];
        vstore(lane, sum[i]);
        for (int64_t l = 0; l < n; l++) {
            g->y[i][j + l] += lane[l];
        }
    }
}

SA_INLINE void
thin_turned(const thin_args *g, const int rows, const sa_dtype dtype)
{
    for (int64_t j = 0; j < g->n; j += LANES) {
        turned_strip(g, rows, dtype, j, SA_MIN(LANES, g->n - j));
    }
}

/* ---- by storage and by rows ------------------------------------------------------------------ */

SA_INLINE void
thin_as(const thin_args *g, const sa_dtype dtype, const bool turned)
{
    if (turned) {
        g->m == 1 ? thin_turned(g, 1, dtype) : thin_turned(g, SA_THIN, dtype);
    } else {
        g->m == 1 ? thin_rows(g, 1, dtype) : thin_rows(g, SA_THIN, dtype);
    }
}

SA_INLINE void
thin(const sa_thin *from, sa_dtype dtype, const bool turned)
{
    thin_args g = {.m = from->m, .b = from->b, .ldb = from->ldb, .n = from->n, .k = from->k};
    for (int i = 0; i < SA_THIN; i++) {
        const int64_t row = SA_MIN(i, from->m - 1);
        g.y[i] = (real *)from->y + row * from->ldy;
        g.a[i] = (const real *)from->a + row * from->lda;
    }
#if !defined(SA_REAL_IS_DOUBLE)
    if (dtype == SA_F16) {
        thin_as(&g, SA_F16, turned);
        return;
    }
    if (dtype == SA_BF16) {
        thin_as(&g, SA_BF16, turned);
        return;
    }
#endif
    (void)dtype;
    thin_as(&g, NATIVE, turned);
}

static void
times(const sa_thin *g, sa_dtype dtype)
{
    thin(g, dtype, false);
}

static void
times_turned(const sa_thin *g, sa_dtype dtype)
{
    thin(g, dtype, true);
}
