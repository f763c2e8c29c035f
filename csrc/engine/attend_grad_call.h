/* attend_grad_call.h - what the two paths of the backward share: the call, one group of rows. */
#ifndef SA_ATTEND_GRAD_CALL_H
#define SA_ATTEND_GRAD_CALL_H

#include "engine/ahead.h"
#include "engine/attend_grad.h"

/* A head's rows and keys are cut into `runs` runs each. In round r the rows of run x meet the keys
 * of run (x + r) % runs: no two tasks of a round write one row or one key, and every sum has its
 * order whatever the threads. */
typedef struct {
    sa_attend_call call; /* problem, parts, tile */
    const sa_attend_grads *grads;
    int64_t runs, round, run_keys;
    int64_t kv_tasks; /* batch * kv heads */
} sa_grad_call;

/* Scratch of a worker beside sa_attend_scratch; strips are [dim][w], rows [rows][ld]. */
typedef struct {
    char *dot, *dq;          /* [strips][dim_v][w], [strips][dim][w]                         */
    char *lse, *delta;       /* [strips * w], at least [KEYS + w]; delta times ds_scale      */
    char *q, *dout;          /* [strips * w][ld_q], [strips * w][ld_v]: the rows as they lie */
    char *p, *ds, *seen;     /* [strips][KEYS + STEP][w]                                     */
    char *capped;            /* [KEYS + STEP][w]                                             */
    void **dk_row, **dv_row; /* [KEYS]                                                       */
} sa_grad_scratch;

/* Rows as they lie, ld reals apart. */
typedef struct {
    const char *at;
    int64_t ld;
} sa_grad_rows_at;

/* Keys [lo, hi) of each row of a group. */
typedef struct {
    int32_t lo[SA_STRIP_MAX * SA_GROUP_STRIPS], hi[SA_STRIP_MAX * SA_GROUP_STRIPS];
} sa_grad_sight;

/* One group of query rows of one block; a sa_group to who does not know better. */
typedef struct sa_grad_group {
    sa_group g;
    const sa_grad_call *call;
    sa_grad_scratch s;
    int w, n_strips;
    sa_grad_sight see, band; /* what the rows see of spans of either kind; none past the last row */
    int64_t step;            /* reals between strips of p, ds, seen */
    sa_grad_rows_at q, dout; /* of the group, as they lie     */
    double ds_scale;         /* what multiplies ds: scale for dq and dk, 1 for dbias         */
    bool raw;                /* ds without the derivative of the soft-cap, as dbias takes it */
    bool sums;               /* dk or dv is wanted                                           */
    bool plain;              /* a score is scale q.k and no more                             */
    int64_t cleared;         /* first key of the task whose dk and dv nobody has set to 0 yet */
    sa_ahead ahead;
    int64_t finite_lo, finite_hi; /* keys whose rows of k have been found finite */
    int rows_finite;              /* whether q and dout of the group are; -1: not looked at yet   */
    /* dbias: takes ds of row r, [key]; r < 0: of the rows of strip `strip`. NULL otherwise. */
    void (*bias_sums)(struct sa_grad_group *g, int r, const sa_key_tile *tile, int a, int n);
    int strip;
} sa_grad_group;

/* A group of this call, for the part that a head belongs to. SA_EINTERNAL. */
sa_status sa_grad_group_begin(sa_ctx *ctx, const sa_grad_call *call, int64_t b, int64_t head,
                              int worker, sa_grad_group *gg, const sa_part **part);
sa_status sa_grad_bias(sa_ctx *ctx, const sa_grad_call *call); /* the pass for dbias */

static inline double
sa_real_at(const void *at, bool f64)
{
    return f64 ? *(const double *)at : (double)*(const float *)at;
}

static inline void
sa_real_put(void *at, bool f64, double x)
{
    if (f64) {
        *(double *)at = x;
    } else {
        *(float *)at = (float)x;
    }
}

void sa_grad_strips(sa_grad_group *g); /* tile path */
void sa_grad_rows(sa_grad_group *g);   /* row path  */

/* lse of a row, and its delta times ds_scale. A row that sees nothing has lse -inf: +inf in its
 * place makes every weight 0. */
void sa_grad_row(const sa_grad_group *g, const void *lse_at, const void *delta_at, double *lse,
                 double *delta);
/* Row r of the group, of `from`, as it lies into to[ld], whole vectors wide. */
void sa_grad_load(const sa_grad_group *g, char *to, int64_t ld, sa_view from, int r, int dim);
/* dk and dv of the task's keys before `end` become 0, unless they have been: when a tile first adds
 * to them, so that they are in the cache then. */
void sa_grad_clear(sa_grad_group *g, int64_t end);
/* dk_row, dv_row of a tile's keys. */
void sa_grad_key_rows(const sa_grad_group *g, const sa_key_tile *tile);

#endif
