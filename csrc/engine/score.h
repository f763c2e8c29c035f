/* score.h - what happens to a score after q.k: soft-cap, bias, mask.
 *
 *   s_ij = softcap(scale q_i.k_j) + bias_ij,  or unseen where the mask is false
 *
 * A term is bias_ij, or -inf where the masks hide the pair.
 */
#ifndef SA_SCORE_H
#define SA_SCORE_H

#include "engine/problem.h"

/* t[x] = term of row (b, h, i) and key keys[x], x < n, in the real type. masked: the boolean masks
 * count. */
void sa_score_terms(const sa_problem *p, bool masked, int64_t b, int64_t h, int64_t i,
                    const int32_t *keys, int n, void *t);

/* Row-major scores in the real type of query rows [i0, i1) of (b, h) and keys [j0, j1):
 * out[(i - i0) * ld + (j - j0)], with soft-cap and bias; -inf where problem->mask or key_mask is
 * false, whatever the data there. Causality is not applied. Takes sa_score_rows_scratch() bytes
 * from the worker's arena and gives them back. */
sa_status sa_score_rows(sa_ctx *ctx, int worker, const sa_problem *p, int64_t b, int64_t h,
                        int64_t i0, int64_t i1, int64_t j0, int64_t j1, void *out, int64_t ld);
size_t sa_score_rows_scratch(const sa_problem *p, int64_t rows);

#endif
