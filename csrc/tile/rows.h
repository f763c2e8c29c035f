/* rows.h - a second table beside sa_tile, per (ISA, real type): what the operators of a model do
 * to one row. void stands for the table's real type; sums of a row's own entries are double. */
#ifndef SA_ROWS_H
#define SA_ROWS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/view.h"

enum {
    SA_THIN = 4,           /* rows whose sums fit the register file */
    SA_THIN_COLUMNS = 512, /* whose sums fit L1                     */
};

/* A few rows a [m, k] times b [k, n], to be added to y [m, n]; rows of the three are lda, ldb, ldy
 * apart. 1 <= m <= SA_THIN, n <= SA_THIN_COLUMNS. */
typedef struct {
    void *y;
    const void *a, *b;
    int64_t ldy, lda, ldb, n, k;
    int m;
} sa_thin;

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
    /* y += a b for a few rows: the bits of sa_tile's product. b, of dtype, the real type or in the
     * table of float a half precision, is read once, along its rows, and widened in registers. */
    void (*times)(const sa_thin *g, sa_dtype dtype);
    /* The same for b [n, k]: y += a b^T */
    void (*times_turned)(const sa_thin *g, sa_dtype dtype);
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
