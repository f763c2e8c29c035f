/* rows.h - a second table beside sa_tile, per (ISA, real type): what the operators of a model do
 * to one row. void stands for the table's real type; sums of a row's own entries are double. */
#ifndef SA_ROWS_H
#define SA_ROWS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/view.h"

typedef enum { SA_ACT_GELU_TANH = 0, SA_ACT_GELU, SA_ACT_SILU, SA_ACT_RELU } sa_activation;

typedef struct {
    /* y = act(x), times gate unless that is NULL; y may be x or gate */
    void (*activate)(sa_activation act, void *y, const void *x, const void *gate, int64_t n);
    /* y = (x - mean) / sqrt(mean((x - mean)^2) + eps) weight + bias, mean taken as 0 unless
     * centred; weight, bias: NULL for 1, 0; y may be x */
    void (*norm)(void *y, const void *x, const void *weight, const void *bias, int64_t n,
                 double eps, bool centred);
    /* The largest of n >= 1 entries; *at: where, the first of equals. With a NaN: NaN, and where
     * the first NaN is. */
    double (*peak)(const void *x, int64_t n, int64_t *at);
    /* y[n] += a[k] b[k, n], b's rows ldb apart: the bits of a row of sa_tile's product, b read
     * along its rows. dtype, of b: the real type, or a half precision in the table of float */
    void (*times)(void *y, const void *a, const void *b, sa_dtype dtype, int64_t ldb, int64_t n,
                  int64_t k);
    /* The same for b [n, k]: y[n] += b[n, k] a[k] */
    void (*times_turned)(void *y, const void *a, const void *b, sa_dtype dtype, int64_t ldb,
                         int64_t n, int64_t k);
    /* sum exp(x - top) */
    double (*exp_sum)(const void *x, int64_t n, double top);
    /* With a = x - x_top, b = y - y_top: sums = { sum exp(a), sum exp(b), sum exp(a) (a - b) };
     * a = -inf adds 0 to the last, whatever b is */
    void (*kl_sums)(const void *x, const void *y, int64_t n, double x_top, double y_top,
                    double sums[3]);
} sa_rows;

/* Table of the instruction set in force; f64 selects double. */
const sa_rows *sa_rows_for(bool f64);

#endif
