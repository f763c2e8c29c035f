/* blas.h - the two functions of OpenBLAS that gemm.c calls; only gemm*.c include this. */
#ifndef SA_BLAS_H
#define SA_BLAS_H

/* cblas_?gemm with 32-bit integers: order, op(a), op(b), m, n, k, alpha, a, lda, b, ldb, beta, c,
 * ldc. */
typedef void (*sa_sgemm_fn)(int, int, int, int, int, int, float, const float *, int, const float *,
                            int, float, float *, int);
typedef void (*sa_dgemm_fn)(int, int, int, int, int, int, double, const double *, int,
                            const double *, int, double, double *, int);

enum { SA_CBLAS_ROWS = 101, SA_CBLAS_AS_IS = 111, SA_CBLAS_TRANSPOSED = 112 };

typedef struct {
    sa_sgemm_fn sgemm;
    sa_dgemm_fn dgemm;
} sa_blas;

/* The library, opened by the first call and held at one thread. NULL: there is none, tiles serve.
 */
const sa_blas *sa_blas_get(void);

#endif
