/* attend.h - exact softmax attention over the keys a plan lists.
 *
 *   out[b,h,i] = sum_j p_ij v[b,g,j]     p_i = softmax_j(s_ij) over the keys j that the plan shows
 * to row i lse[b,h,i] = log sum_j exp s_ij      g = h kv_heads / heads
 *
 * A row that sees no key gets out = 0 and lse = -inf. What is not seen is never touched: NaN there
 * changes nothing.
 */
#ifndef SA_ATTEND_H
#define SA_ATTEND_H

#include "engine/plan.h"

/* One plan and the query heads [head_begin, head_end) it serves (multiples of the group size). */
typedef struct {
    const sa_plan *plan;
    int64_t head_begin, head_end;
} sa_part;

/* out (batch, heads, n_q, dim_v) in the dtype of q or the real type; lse (batch, heads, n_q, 1) in
 * the real type, or data NULL. The parts cover every head once, in one parallel region. SA_EINVAL:
 * shapes disagree with a plan. SA_ENOMEM: before any output is written. */
sa_status sa_attend(sa_ctx *ctx, sa_view out, sa_view lse, const sa_problem *p,
                    const sa_part *parts, int n_parts);

/* out, lse of n parts over disjoint keys (algorithms 0.8): outs[a] (batch, heads, n_q, dim_v). */
sa_status sa_merge(sa_ctx *ctx, sa_view out, sa_view lse, const sa_view *outs, const sa_view *lses,
                   int n);

/* Of that, the gradients of one part: w = exp(lse_a - lse), dout_a = w dout, dlse_a = w (<dout,
 * out_a - out> + dlse); dout, dlse with data NULL: zeros. */
sa_status sa_merge_grad(sa_ctx *ctx, sa_view dout_a, sa_view dlse_a, sa_view dout, sa_view dlse,
                        sa_view out, sa_view lse, sa_view out_a, sa_view lse_a);

#endif
