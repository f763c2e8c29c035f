/* select.h - the n largest of a row, exactly, ties to the lower index. */
#ifndef SA_SELECT_H
#define SA_SELECT_H

#include <stddef.h>
#include <stdint.h>

/* Writes the indices of the min(count, candidates) largest of s[0..n) to index, ascending, and
 * returns how many. Candidates are all entries but -inf (unseen). NaN counts as the largest. Equal
 * values: the lower index first. O(n) whatever the values are. scratch: sa_select_scratch(n, count)
 * bytes, 64-byte aligned. */
int64_t sa_select_largest_f32(const float *s, int64_t n, int64_t count, int32_t *index,
                              void *scratch);
int64_t sa_select_largest_f64(const double *s, int64_t n, int64_t count, int32_t *index,
                              void *scratch);
size_t sa_select_scratch(int64_t n, int64_t count);

/* The textbook way, quickselect on a copy: what the benchmark compares with. Finite scores only. */
int64_t sa_select_quick_f32(const float *s, int64_t n, int64_t count, int32_t *index,
                            void *scratch);

#endif
