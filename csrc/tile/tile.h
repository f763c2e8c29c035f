/* tile.h - a table of functions on small real matrices, one table per (ISA, real type).
 *
 * Queries sit in the SIMD lanes: a strip is up to strip_max query rows, transposed to [dim][w], w
 * its stride, a multiple of lanes; functions work on its first `wide` columns, a multiple of lanes
 * too, at most strip_max. Key and value rows are read where they lie through row pointers, and
 * broadcast. Reals are float or double; void stands for the table's real type. Storage types exist
 * only in load_* and store_*.
 */
#ifndef SA_TILE_H
#define SA_TILE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/cpu.h"
#include "base/view.h"

#define SA_TILE_KEYS 64 /* keys of one tile at most; scores and P are [SA_TILE_KEYS][w] */
#define SA_STRIP_MAX 64 /* no table has a wider strip                                  */
#define SA_STALE 20.0   /* nats by which scores may exceed a running maximum           */

#define SA_PEAK_KEYS 8  /* keys of a group whose largest score is taken               */
#define SA_TILE_STEP 12 /* scores rows are written in groups of up to this many        */

/* Row r sees key j of a tile when lo[r] <= first + j < hi[r]. */
typedef struct {
    int32_t first;
    const int32_t *lo, *hi;
} sa_clip;

/* Sums over the queries of strips: p_i[j] stands at p[i / w * step + j * w + i % w], i < n_rows;
 * b is [n_rows][ldb], readable up to whole vectors past dim. seen NULL, or scores laid out as p.
 * begin, end: NULL, or [n_keys] each, both ascending: p_i[j] is 0 unless begin[j] <= i < end[j]. */
typedef struct {
    const void *p, *seen, *b;
    const int32_t *begin, *end;
    int64_t step, ldb;
    int w, n_rows, n_keys, dim;
    bool fresh; /* rows are set, not added to */
} sa_strip_sums;

/* Rows one after another: `step` bytes from one to the next, in the real type or, where that is
 * float, float16 or bfloat16. */
typedef struct {
    const void *row;
    int64_t step;
    sa_dtype dtype;
} sa_run;

/* A few queries of the row path and where their softmax stands: query r has q[r * dim],
 * s[r * SA_TILE_KEYS], m[r], l[r], o[r * dim_v]. */
typedef struct {
    const void *q;
    void *s, *m, *l, *o;
    int n_rows, dim, dim_v;
} sa_queries;

typedef struct sa_tile {
    sa_isa isa;
    int real_bytes; /* 4 or 8                                   */
    int lanes;      /* reals in a vector                        */
    int strip_max;  /* widest strip that `scores` takes         */

    /* rows[r * ld + c] = scale * src[r][c], r < n_rows, c < dim; src rows are row_stride elements
     * apart. */
    void (*load_rows)(void *rows, int64_t ld, const void *src, sa_dtype dtype, int64_t row_stride,
                      int n_rows, int dim, double scale);
    /* cols[c * w + r] = scale * src_row[r][c]; rows n_rows .. w-1 become 0. src_row: n_rows
     * addresses. */
    void (*load_cols)(void *cols, int w, const void *const *src_row, sa_dtype dtype, int n_rows,
                      int dim, double scale);
    /* dst_row[r][c] = cols[c * w + r] * factor[r]; a zero is written as +0 */
    void (*store_cols)(void *const *dst_row, sa_dtype dtype, const void *cols, int w, int n_rows,
                       int dim, const void *factor);
    /* dst[c] = src[c] * factor[0] for one row of reals; likewise */
    void (*store_row)(void *dst, sa_dtype dtype, const void *src, int dim, const void *factor);

    /* s[j * w + r] = sum_c qt[c * w + r] k_row[j][c]. s has room for n_keys rounded up to
     * SA_TILE_STEP rows; the rows past n_keys are scratch. */
    void (*scores)(void *s, const void *qt, int w, int wide, const void *const *k_row, int n_keys,
                   int dim);
    /* As scores, then p = exp(s - m[r]); l[r] += sum_j p. False, with s undefined and l untouched,
     * when some score exceeds its stale maximum m by more than SA_STALE, or m is -inf: the caller
     * then uses scores, clip and fold. clip: NULL, or what the rows see. */
    bool (*scores_exp)(void *p, const void *qt, int w, int wide, const void *const *k_row,
                       int n_keys, int dim, const void *m, void *l, const sa_clip *clip);
    /* Softmax fold of a tile of scores into (m, l, o): raises m where the tile's maximum exceeds it
     * by SA_STALE or nothing was seen yet, rescales l and o[dim_v][w] in those lanes only; s
     * becomes exp(s - m), l += sums. */
    void (*fold)(void *s, int w, int wide, int n_keys, void *m, void *l, void *o, int dim_v);
    /* s[j][r] = -inf where row r does not see key j */
    void (*clip)(void *s, int w, int wide, int n_keys, const sa_clip *clip);
    /* o[c * w + r] += sum_j p[j * w + r] v_row[j][c] */
    void (*values)(void *o, const void *p, int w, int wide, const void *const *v_row, int n_keys,
                   int dim_v);
    /* The same, but whatever v holds is nothing to a lane that does not see key j: where p is 0 and
     * seen[j * w + r], the score before the fold, is -inf. A weight that underflowed still counts:
     * 0 NaN is NaN. Same bits where v is finite, but for the sign of a zero. */
    void (*values_select)(void *o, const void *p, const void *seen, int w, int wide,
                          const void *const *v_row, int n_keys, int dim_v);
    /* s = cap tanh(s / cap), elementwise */
    void (*softcap)(void *s, int64_t count, double cap);
    /* s += t, but -inf where t is -inf, whatever s is */
    void (*add_term)(void *s, const void *t, int64_t count);
    /* s *= t, elementwise */
    void (*weigh)(void *s, const void *t, int64_t count);
    /* true when every entry of the rows is finite */
    bool (*finite)(const void *const *v_row, int n_keys, int dim_v);

    /* Row path: one query row. s[j] = q . k_row[j] */
    void (*dots)(void *s, const void *q, const void *const *k_row, int n_keys, int dim);
    /* Folds scores into scalar (m, l) and o[dim_v], rescaled when m rises; s becomes exp(s - m). */
    void (*fold_row)(void *s, int n_keys, void *m, void *l, void *o, int dim_v);
    /* o[c] += sum_j p[j] v_row[j][c] over keys with seen[j] > -inf or NaN, as in values_select;
     * seen NULL: over all. */
    void (*axpys)(void *o, const void *p, const void *seen, const void *const *v_row, int n_keys,
                  int dim_v);

    /* Joins a second (m, l, o[dim_v]) of one row, over other keys, into the first. */
    void (*join_row)(void *m, void *l, void *o, const void *m2, const void *l2, const void *o2,
                     int dim_v);
    /* factor[r] = 1 / l[r] and, unless lse is NULL, lse[r] = m[r] + log l[r]; 0 and -inf where
     * l = 0 */
    void (*finish)(void *factor, void *lse, const void *m, const void *l, int n);
    /* dst[0..count) = x */
    void (*fill)(void *dst, int64_t count, double x);

    /* c[m, n] (+)= a[m, k] b[k, n], row-major with leading strides */
    void (*product)(void *c, int64_t ldc, const void *a, int64_t lda, const void *b, int64_t ldb,
                    int m, int n, int k, bool accumulate);

    /* Selection (tile_select.h). count of s[i] >= t; indices of s[i] >= t appended to index,
     * returns how many. */
    int64_t (*count_ge)(const void *s, int64_t n, double t);
    int64_t (*compress_ge)(const void *s, int64_t n, double t, int32_t *index);

    /* Backward (tile_grad.h). p = exp(s - lse[r]), s as in scores, 0 where unseen. p, ds: as s in
     * scores, with scratch rows. */
    void (*strip_weights)(void *p, const void *qt, int w, int wide, const void *const *k_row,
                          int n_keys, int dim, const void *lse, const sa_clip *clip);
    /* ds = p (dO.v - delta[r]), 0 where unseen */
    void (*strip_grads)(void *ds, const void *p, const void *dot, int w, int wide,
                        const void *const *v_row, int n_keys, int dim_v, const void *delta,
                        const sa_clip *clip);
    /* The same from scores s, -inf where unseen, and products dp: s becomes p keep = keep exp(s -
     * lse), dp becomes ds = p (keep dp - delta) (1 - (capped / cap)^2). keep, capped: NULL or as s.
     */
    void (*weights_grad)(void *s, void *dp, const void *capped, const void *keep, int w, int wide,
                         int n_keys, const void *lse, const void *delta, double cap);
    /* row[j][c] += sum_i p_i[j] b_i[c], j < n_keys, c < dim; queries that do not see key j add
     * nothing, whatever b holds, where seen says so. Same bits with seen where b is finite. */
    void (*sums)(void *const *row, const sa_strip_sums *sums);
    /* sum_c a[c] b[c], in double */
    double (*inner)(const void *a, const void *b, int64_t n);

    /* Multiply-adds of a register-only loop: flops done. For the benchmark's FMA peak. */
    double (*fma_peak)(int64_t rounds);

    /* What keys receive (tile_received.h). sum[j * lanes + ..] += weights of key j, one sum a lane:
     * s[j * w + r], or with lse exp(s - lse[r]). */
    void (*received)(void *sum, const void *s, int w, int wide, int n_keys, const void *lse);
    /* peak[g * w + r] = largest of s[j * w + r] over keys j of group g, SA_PEAK_KEYS to each. */
    void (*peaks)(void *peak, const void *s, int w, int wide, int n_keys);

    /* Row path over a run of keys, several queries at once (tile_run.h): query r has q[r * dim],
     * s[r * SA_TILE_KEYS], o[r * dim_v]. As dots and axpys; seen NULL, or laid out as s. For each
     * row that is read memory is asked for one of `ahead`, which comes next; NULL: for none. */
    void (*run_dots)(void *s, const void *q, int n_rows, const sa_run *k, int n_keys, int dim,
                     const sa_run *ahead);
    void (*run_axpys)(void *o, const void *p, const void *seen, int n_rows, const sa_run *v,
                      int n_keys, int dim_v, const sa_run *ahead);
    /* run_dots, fold_row and run_axpys for `step` keys after `step` keys, of which all are seen;
     * memory is asked for each in time, then for `next`. False, and nothing done, for 3 or more
     * than 4 queries, and where k and v differ in type. */
    bool (*run_attend)(const sa_queries *rows, const sa_run *k, const sa_run *v, int64_t n_keys,
                       int step, const sa_run *next);

    /* Sum of n reals that lie together. For the benchmark's rate of reading. */
    double (*read_sum)(const void *x, int64_t n);
} sa_tile;

/* Table of the instruction set in force (sa_isa_now()); f64 selects double. */
const sa_tile *sa_tile_for(bool f64);

#endif
