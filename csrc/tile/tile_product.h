/* tile_product.h - one general small product, and the register-only loop that the benchmark calls
 * FMA peak. */

/* rows x (vecs LANES) of c: the score tile with b in the place of Q^T. */
SA_INLINE void
product_tile(real *c, int64_t ldc, const int rows, const int vecs, const real *a, int64_t lda,
             const real *b, int64_t ldb, int k, bool accumulate)
{
    const void *a_row[KEYS];
    vreal acc[KEYS][VECS];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        a_row[i] = a + i * lda;
    }
    score_tile(acc, rows, vecs, b, ldb, a_row, k);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            real *const at = c + i * ldc + v * LANES;
            vstore(at, accumulate ? vload(at) + acc[i][v] : acc[i][v]);
        }
    }
}

SA_INLINE void
product_strip(real *c, int64_t ldc, const int vecs, const real *a, int64_t lda, const real *b,
              int64_t ldb, int m, int k, bool accumulate)
{
    int i = 0;
    for (; i + KEYS_FOR(vecs) <= m; i += KEYS_FOR(vecs)) {
        product_tile(c + i * ldc, ldc, KEYS_FOR(vecs), vecs, a + i * lda, lda, b, ldb, k,
                     accumulate);
    }
    for (; i + 4 <= m; i += 4) {
        product_tile(c + i * ldc, ldc, 4, vecs, a + i * lda, lda, b, ldb, k, accumulate);
    }
    for (; i < m; i++) {
        product_tile(c + i * ldc, ldc, 1, vecs, a + i * lda, lda, b, ldb, k, accumulate);
    }
}

/* The last n < LANES columns: plain dot products in the same order. */
static void
product_rest(real *c, int64_t ldc, const real *a, int64_t lda, const real *b, int64_t ldb, int m,
             int n, int k, bool accumulate)
{
    for (int i = 0; i < m; i++) {
        real sum[LANES] = {0};
        for (int64_t t = 0; t < k; t++) {
            for (int j = 0; j < n; j++) {
                sum[j] += a[i * lda + t] * b[t * ldb + j];
            }
        }
        for (int j = 0; j < n; j++) {
            c[i * ldc + j] = accumulate ? c[i * ldc + j] + sum[j] : sum[j];
        }
    }
}

static void
product(void *c, int64_t ldc, const void *a, int64_t lda, const void *b, int64_t ldb, int m, int n,
        int k, bool accumulate)
{
    const int wide = VECS * LANES;
    int j = 0;
    for (; j + wide <= n; j += wide) {
        product_strip((real *)c + j, ldc, VECS, a, lda, (const real *)b + j, ldb, m, k, accumulate);
    }
    for (; j + LANES <= n; j += LANES) {
        product_strip((real *)c + j, ldc, 1, a, lda, (const real *)b + j, ldb, m, k, accumulate);
    }
    if (j < n) {
        product_rest((real *)c + j, ldc, a, lda, (const real *)b + j, ldb, m, n - j, k, accumulate);
    }
}

static double
fma_peak(int64_t rounds)
{
    vreal acc[12];
    const vreal x = vset((real)0.999), y = vset((real)1e-6);
#pragma GCC unroll 16
    for (int i = 0; i < 12; i++) {
        acc[i] = vset((real)i);
    }
    for (int64_t t = 0; t < rounds; t++) {
#pragma GCC unroll 16
        for (int i = 0; i < 12; i++) {
            acc[i] = acc[i] * x + y;
        }
    }
    for (int i = 1; i < 12; i++) {
        acc[0] += acc[i];
    }
    volatile real sink = vsum(acc[0]); /* keeps the loop */
    (void)sink;
    return (double)rounds * 12 * LANES * 2;
}

static double
read_sum(const void *x, int64_t n)
{
    const real *const from = x;
    vreal acc[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        acc[i] = vset(0);
    }
    int64_t at = 0;
    for (; at + 8 * LANES <= n; at += 8 * LANES) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            acc[i] += vload(from + at + i * LANES);
        }
    }
    double rest = 0;
    for (; at < n; at++) {
        rest += (double)from[at];
    }
    for (int i = 1; i < 8; i++) {
        acc[0] += acc[i];
    }
    return (double)vsum(acc[0]) + rest;
}
