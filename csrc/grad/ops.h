/* ops.h - the forward of model operators, parallel over rows. float32 and float64; arrays
 * C-contiguous. The tape of a later issue records these same calls. Sums are float64 throughout;
 * NaN stays. */
#ifndef SA_OPS_H
#define SA_OPS_H

#include "base/ctx.h"
#include "base/view.h"
#include "tile/rows.h"

/* y[r] = x[r] * weight / sqrt(mean(x^2) + eps), rows of width dim; y may be x */
sa_status sa_op_rms_norm(sa_ctx *ctx, sa_dtype dtype, void *y, const void *x, const void *weight,
                         int64_t rows, int64_t dim, double eps);

/* y[r] = (x - mean) / sqrt(var + eps) * weight + bias; weight, bias may be NULL; y may be x */
sa_status sa_op_layer_norm(sa_ctx *ctx, sa_dtype dtype, void *y, const void *x, const void *weight,
                           const void *bias, int64_t rows, int64_t dim, double eps);

/* y = act(x) (* gate), elementwise over count; y may be x or gate */
sa_status sa_op_activate(sa_ctx *ctx, sa_dtype dtype, sa_activation act, void *y, const void *x,
                         const void *gate, int64_t count);

/* In place on x [rows = tokens, heads, dim]: rotate-half RoPE on the first `rotary` dims with
 * tables cosine, sine [positions, rotary/2]; pos[row] indexes the tables. SA_EINVAL: a position
 * outside them; rows before it may be turned. */
sa_status sa_op_rope(sa_ctx *ctx, sa_dtype dtype, void *x, const void *cosine, const void *sine,
                     const int32_t *pos, int64_t positions, int64_t rows, int64_t heads,
                     int64_t dim, int64_t rotary);

/* y = x + z, elementwise over count; y may be x or z */
sa_status sa_op_add(sa_ctx *ctx, sa_dtype dtype, void *y, const void *x, const void *z,
                    int64_t count);

/* nll[r] = logsumexp(logits[r]) - logits[r][target[r]]; arg[r] = index of the largest, the lower of
 * equals, the first NaN of a row that has one. SA_EINVAL: a target outside the vocabulary. */
sa_status sa_op_nll(sa_ctx *ctx, sa_dtype dtype, double *nll, int32_t *arg, const void *logits,
                    const int32_t *target, int64_t rows, int64_t vocab);

/* kl[r] = sum_v p (log p - log q), p = softmax(base[r]), q = softmax(other[r]); p = 0 adds 0 */
sa_status sa_op_kl(sa_ctx *ctx, sa_dtype dtype, double *kl, const void *base, const void *other,
                   int64_t rows, int64_t vocab);

/* How a token is drawn from a row of logits. */
typedef struct {
    double temperature; /* divides the logits; 0: the largest, the lower of equals               */
    int64_t top_k;      /* keeps the largest, and those equal to the last of them; vocab: all    */
    double top_p;       /* then keeps the fewest likeliest whose mass reaches this share; 1: all */
} sa_sampling;

/* token[r] = the one that the uniform number u[r] of [0, 1) points to in the distribution of row r.
 * SA_EINVAL: a row whose largest logit is not finite. */
sa_status sa_op_sample(sa_ctx *ctx, int32_t *token, const float *logits, const double *u,
                       int64_t rows, int64_t vocab, sa_sampling how);

/* to = from widened, elementwise over count; dtype SA_F16 or SA_BF16 */
sa_status sa_op_widen(sa_ctx *ctx, float *to, const void *from, sa_dtype dtype, int64_t count);

/* to = from rounded to nearest even, elementwise over count; dtype SA_F16 or SA_BF16, of to */
sa_status sa_op_narrow(sa_ctx *ctx, void *to, sa_dtype dtype, const float *from, int64_t count);

#endif
