/* plan_parts.h - what the plan_*.c files share: empty plans, the driver, the keys of a row. */
#ifndef SA_PLAN_PARTS_H
#define SA_PLAN_PARTS_H

#include "engine/planner.h"

/* A plan with the scalars of `sizes` (n_maps follows from the others), room for row_start, for the
 * pointers and the intervals of rows; band_maps 0: no bands. No spans yet. With sizes->n_blocks 0
 * there are as few blocks as can be, and row_start is filled. SA_ENOMEM. */
sa_status sa_plan_new(sa_ctx *ctx, const sa_plan *sizes, sa_plan **plan);

/* Emits all rows of all maps in parallel, `rows` rows a task, and joins the spans in order. */
typedef struct {
    const sa_problem *problem;
    const void *opts;
    sa_status (*emit)(const sa_plan_task *task, sa_spans *spans);
    const sa_sight *sight;
    bool filtered;  /* spans are cut where the masks of `sight` say */
    int64_t rows;   /* a multiple of rows_per_block                 */
    size_t scratch; /* bytes a worker                               */
} sa_plan_job;
sa_status sa_plan_fill(sa_ctx *ctx, sa_plan *plan, const sa_plan_job *job);

/* sa_plan_build where what rows may see is known: masks of p are read as far as `sight` says. */
sa_status sa_plan_build_under(sa_ctx *ctx, const sa_problem *p, const sa_planner *planner,
                              const void *opts, const sa_sight *sight, sa_plan **plan);

/* SA_EINVAL unless the plan was made for sizes like these. */
sa_status sa_plan_fits(sa_ctx *ctx, const sa_plan *plan, const sa_problem *p);

/* plan_mask.c: what the masks show of keys [start, end) to the rows of a block, as far as each row
 * sees them (and, with band, has them in its band). */
typedef enum { SA_BLOCK_EMPTY = 0, SA_BLOCK_FULL, SA_BLOCK_MIXED } sa_block_state;
sa_block_state sa_mask_block(const sa_plan_task *task, const sa_row_block *rows, bool band,
                             int64_t start, int64_t end);

/* plan_rows.c: the keys that row i of (b, h) sees, as ascending disjoint runs (which may touch). */
typedef struct {
    const sa_plan *plan;
    sa_row_bits bits;        /* masks of clipped spans, or none */
    int64_t next[3], end[3]; /* spans left of each kind         */
    int32_t lo[3], hi[3];    /* what the row sees of each kind  */
    int64_t at, stop;        /* rest of a span under a mask     */
} sa_row_runs;
void sa_row_runs_start(sa_row_runs *runs, const sa_plan *plan, const sa_problem *p, int64_t b,
                       int64_t h, int64_t i);
bool sa_row_runs_next(sa_row_runs *runs, int64_t *start, int64_t *end);
int64_t sa_row_runs_count(sa_row_runs *runs); /* keys of all runs, at once */

#endif
