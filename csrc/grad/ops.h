/* ops.h - the forward of model operators, parallel over rows. float32 and float64; arrays C-contiguous.
 * The tape of a later issue records these same calls. */
#ifndef SA_OPS_H
#define SA_OPS_H

#include "base/ctx.h"
#include "base/view.h"

/* y[r] = x[r] * weight / sqrt(mean(x^2) + eps), rows of width dim */
sa_status sa_op_rms_norm(sa_ctx *ctx, sa_dtype dtype, void *y, const void *x, const void *weight, int64_t rows, int64_t dim, double eps);
/* y[r] = (x - mean) / sqrt(var + eps) * weight + bias; weight, bias may be NULL */
sa_status sa_op_layer_norm(sa_ctx *ctx, sa_dtype dtype, void *y, const void *x, const void *weight, const void *bias, int64_t rows, int64_t dim, double eps);
typedef enum { SA_ACT_GELU_TANH = 0, SA_ACT_GELU, SA_ACT_SILU, SA_ACT_RELU } sa_activation;
/* y = act(x) (* gate), elementwise over count */
sa_status sa_op_activate(sa_ctx *ctx, sa_dtype dtype, sa_activation act, void *y, const void *x, const void *gate, int64_t count);
/* In place on x (rows = tokens, heads, dim): rotate-half RoPE on the first `rotary` dims with tables cos/sin [positions, rotary/2];
 * pos[row] indexes the tables. */
sa_status sa_op_rope(sa_ctx *ctx, sa_dtype dtype, void *x, const void *cosine, const void *sine, const int32_t *pos, int64_t rows, int64_t heads, int64_t dim, int64_t rotary);
/* y[r] = x[r] + z[r]; may alias */
sa_status sa_op_add(sa_ctx *ctx, sa_dtype dtype, void *y, const void *x, const void *z, int64_t count);
/* nll[r] = logsumexp(logits[r]) - logits[r][target[r]]; arg[r] = index of the largest (lower index wins) */
sa_status sa_op_nll(sa_ctx *ctx, sa_dtype dtype, double *nll, int32_t *arg, const void *logits, const int32_t *target, int64_t rows, int64_t vocab);
/* kl[r] = sum_v p (log p - log q), p = softmax(base[r]), q = softmax(other[r]); float64 sums */
sa_status sa_op_kl(sa_ctx *ctx, sa_dtype dtype, double *kl, const void *base, const void *other, int64_t rows, int64_t vocab);

#endif
