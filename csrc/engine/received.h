/* received.h - what comes of the weights of attention without a row of them for every query:
 *
 *   mass_j = sum_i p_ij     p_ij = exp(s_ij - lse_i) over the keys j that the plan shows to row i
 *   the n largest p_ij of each row i, and their keys
 *
 * lse is what attend gave; a sink has its share of it and stands in no list. Dropout is left out. A
 * row whose lse is -inf has no weights. Of v nothing is read.
 */
#ifndef SA_RECEIVED_H
#define SA_RECEIVED_H

#include "engine/attend.h"

/* mass (batch, heads, n_k, 1) and lse (batch, heads, n_q, 1), both in the real type. Each entry is
 * summed in one order, whatever the threads. SA_EINVAL: shapes disagree; SA_ENOMEM: before any
 * output is written. */
sa_status sa_received(sa_ctx *ctx, sa_view mass, sa_view lse, const sa_problem *p,
                      const sa_part *parts, int n_parts);

/* value (batch, heads, n_q, n) in the real type, index alike in int64, rows contiguous: the largest
 * weights downwards, equal ones by key upwards; past the keys that the row sees, weight 0 and index
 * -1. A row whose lse is NaN has NaN for its first n keys. */
sa_status sa_topn(sa_ctx *ctx, sa_view value, sa_view index, sa_view lse, const sa_problem *p,
                  const sa_part *parts, int n_parts);

#endif
