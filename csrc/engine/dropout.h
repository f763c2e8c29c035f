/* dropout.h - which attention weights dropout keeps: a function of the element's address.
 *
 * Weight (b, h, i, j) reads number j % 8 of the 32-bit numbers in the block of key (seed, tag) and
 * counter (j / 8, i, h, b), the lower half of each word first, and stays where that is at least
 * dropout_p 2^32. Kept weights grow by 1 / (1 - dropout_p). [Srivastava et al. 2014]
 */
#ifndef SA_DROPOUT_H
#define SA_DROPOUT_H

#include "engine/problem.h"

/* keep[x] = 1 / (1 - p) or 0 of row (b, h, i) and key keys[x], x < n, in the real type. */
void sa_dropout_row(const sa_problem *p, int64_t b, int64_t h, int64_t i, const int32_t *keys,
                    int n, void *keep);

#endif
