/* attend_grad.h - gradients of softmax attention over the keys a plan lists; plans are constants.
 *
 *   p_ij = exp(s_ij - lse_i)          delta_i = dout_i.out_i - dlse_i
 *   ds_ij = p_ij (dout_i.v_j - delta_i)
 *   ds' = ds times the derivative of the soft-cap
 *   dq_i = scale sum_j ds'_ij k_j     dk_j = scale sum_i ds'_ij q_i
 *   dv_j = sum_i p_ij dout_i          dbias_ij = ds_ij                  [algorithms 1.3]
 *
 * Under dropout p is multiplied by keep / (1 - dropout_p) in dv, and dout.v in ds. A row that sees
 * no key adds nothing anywhere; what is not seen is never touched. A weight carries the rounding of
 * lse, |lse| eps: beyond 1e6 in float32 the weights of a row no longer add up to 1.
 */
#ifndef SA_ATTEND_GRAD_H
#define SA_ATTEND_GRAD_H

#include "engine/attend.h"

typedef struct {
    sa_view dout;       /* (batch, heads, n_q, dim_v) in any storage type; data NULL: zeros       */
    sa_view lse, delta; /* (batch, heads, n_q, 1), in the real type                               */
    sa_view dq, dk, dv; /* shapes of q, k, v in the real type; data NULL: not wanted              */
    sa_view dbias;      /* (batch, heads, n_q, n_k) in float32 or float64, strides 0 where bias was
                           broadcast: added to. data NULL: not wanted */
} sa_attend_grads;

/* Writes dq, dk, dv whole. SA_EINVAL: shapes disagree; SA_ENOMEM: before any output is written. */
sa_status sa_attend_grad(sa_ctx *ctx, const sa_attend_grads *grads, const sa_problem *p,
                         const sa_part *parts, int n_parts);

/* delta = sum_c dout out - dlse, (batch, heads, n_q, 1) in the real type; dlse data NULL: 0. */
sa_status sa_attend_delta(sa_ctx *ctx, sa_view delta, sa_view out, sa_view dout, sa_view dlse);

#endif
