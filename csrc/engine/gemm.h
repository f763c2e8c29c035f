/* gemm.h - large products. The only user of OpenBLAS, which is held at one thread. */
#ifndef SA_GEMM_H
#define SA_GEMM_H

#include "base/ctx.h"
#include "base/view.h"

/* c[m,n] = a[m,k] b[k,n] (+ bias[n]) in float32 or float64, rows contiguous with leading strides.
 * b_transposed: b is [n,k]. Cut into blocks by shape, one single-threaded BLAS call or tile
 * products per task: same bits for any thread count. Row i of c depends on row i of a alone; on
 * tiles its bits do too, with OpenBLAS they may change with m and i. */
typedef struct {
    int64_t m, n, k;
    sa_dtype dtype; /* SA_F32 or SA_F64; b may be SA_F16 or SA_BF16, widened block by block */
    sa_dtype b_dtype;
    const void *a;
    int64_t lda;
    const void *b;
    int64_t ldb;
    bool b_transposed;
    void *c;
    int64_t ldc;
    const void *bias; /* [n] in dtype, or NULL */
} sa_gemm_args;
sa_status sa_gemm(sa_ctx *ctx, const sa_gemm_args *args);

/* Opens the library if the first product is still to come and a library is to serve it; sa_gemm
 * does so itself. While it loads, `environ` is another array: a caller who can keep others from
 * changing the environment calls this. */
void sa_gemm_prepare(void);

/* Where OpenBLAS comes from: set once by python/ before first use (path of the library in _libs;
 * NULL: none). */
void sa_blas_path_set(const char *path);
const char *sa_blas_config(void); /* what runs: OpenBLAS's own words, or "tiles" */

#endif
