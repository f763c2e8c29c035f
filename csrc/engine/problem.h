/* problem.h - one attention call: sizes, tensors, who may see what. All shape checks live here. */
#ifndef SA_PROBLEM_H
#define SA_PROBLEM_H

#include "base/ctx.h"
#include "base/view.h"

#define SA_MAX_KEYS ((int64_t)1 << 30)

typedef enum { SA_CAUSAL_NONE = 0, SA_CAUSAL_BOTTOM_RIGHT, SA_CAUSAL_TOP_LEFT } sa_causal;

/* q (batch, heads, n_q, dim); k (batch, kv_heads, n_k, dim); v (batch, kv_heads, n_k, dim_v);
 * out (batch, heads, n_q, dim_v); lse (batch, heads, n_q, 1) in the real type: float64 for f64
 * inputs, else float32. out has the dtype of q, or the real type; k and v each have the real type,
 * or float16 or bfloat16 where that is float32. Query head h reads kv head h kv_heads / heads. */
typedef struct {
    sa_view q, k, v;
    sa_view mask;     /* bool (batch, heads, n_q, n_k), 0 strides where broadcast, true = sees */
    sa_view bias;     /* real type, likewise; added to scores after soft-cap                 */
    sa_view key_mask; /* bool (batch, 1, 1, n_k): padding                                    */
    sa_view sink;     /* real type (1, heads, 1, 1): the score of one more key, of value 0.
                         data NULL in these four: none */
    sa_causal causal;
    double scale;     /* multiplies q.k                                                  */
    double softcap;   /* c tanh(s / c); 0 means none                                     */
    double dropout_p; /* share of weights that become 0, the others growing by 1 / (1 - p) */
    uint64_t seed;    /* of the dropout: engine/dropout.h                                */
    /* filled by sa_problem_check: */
    int64_t batch, heads, kv_heads, n_q, n_k, dim, dim_v;
} sa_problem;

/* Fills the sizes, clears strides that are never taken, and refuses what does not fit, naming the
 * argument and the value. v.data may be NULL (planning needs no values). */
sa_status sa_problem_check(sa_ctx *ctx, sa_problem *p);
/* Of that, only the sizes of a plan: batch, heads, kv_heads, n_q, n_k as they stand in p. */
sa_status sa_problem_sizes_check(sa_ctx *ctx, const sa_problem *p);

/* First key past what row i may see by causality alone; n_k without causality. May be <= 0. */
static inline int64_t
sa_causal_end(const sa_problem *p, int64_t i)
{
    if (p->causal == SA_CAUSAL_NONE) {
        return p->n_k;
    }
    return i + 1 + (p->causal == SA_CAUSAL_BOTTOM_RIGHT ? p->n_k - p->n_q : 0);
}

static inline bool
sa_real_is_f64(sa_dtype dtype)
{
    return dtype == SA_F64;
}

/* What a storage type is computed in. */
static inline sa_dtype
sa_real_of(sa_dtype dtype)
{
    return dtype == SA_F64 ? SA_F64 : SA_F32;
}

static inline size_t
sa_real_size(sa_dtype dtype)
{
    return sa_dtype_size(sa_real_of(dtype));
}

#endif
