/* planner.h - a planner fills plans; the build driver calls it in parallel over (map, rows). */
#ifndef SA_PLANNER_H
#define SA_PLANNER_H

#include "engine/fields.h"
#include "engine/plan.h"
#include "engine/sight.h"

enum { SA_READS_Q = 1, SA_READS_K = 2 };

typedef struct sa_spans sa_spans; /* growing list of the spans that one task emits; plan_build.c */

typedef struct {
    sa_ctx *ctx;
    int worker;
    const sa_problem *problem;
    const void *opts;
    const sa_sight *sight;            /* what the masks hide beyond see_lo and see_hi        */
    int64_t map, batch, head;         /* batch 0 where batches share the map; its first head */
    int64_t begin, end;               /* query rows, from a block's first                    */
    const int32_t *see_lo, *see_hi;   /* of this batch, [n_q]; 0 <= lo <= hi <= n_k          */
    const int32_t *band_lo, *band_hi; /* what planner->band filled, [n_q], or NULL           */
} sa_plan_task;

/* How the options cut rows and heads. */
typedef struct {
    int32_t rows_per_block;
    bool per_head; /* every head has its own map */
} sa_plan_shape;

typedef struct {
    const char *name;
    const sa_field *fields;
    size_t opts_size;
    unsigned reads;         /* 0: a pattern. SA_READS_Q | SA_READS_K: a selector         */
    int32_t rows_per_block; /* 64 for patterns, 1 for selectors                          */
    bool grows;             /* twice as many in a large call                             */
    int32_t span_len;       /* 0: spans carry lengths; 1: single keys                    */
    bool per_head;          /* a map a head and batch where nothing is read: random keys */
    bool applies_mask;      /* emit leaves out what masks hide; else the driver does     */
    /* Bytes of worker scratch that emit needs. NULL: none. */
    sa_status (*scratch)(sa_ctx *ctx, const sa_problem *p, const void *opts, size_t *bytes);
    /* Checks options against the problem (layout shapes, ...). NULL: nothing to check. */
    sa_status (*check)(sa_ctx *ctx, const sa_problem *p, const void *opts);
    /* Changes what the record says of rows and heads where options decide. NULL: they do not. */
    void (*shape)(const sa_problem *p, const void *opts, sa_plan_shape *shape);
    /* Fills [lo, hi) of row i's own band, 0 <= lo <= hi <= n_k; NULL: the pattern has none. Called
     * serially for all rows. */
    void (*band)(const sa_problem *p, const void *opts, int64_t i, int32_t *lo, int32_t *hi);
    sa_status (*emit)(const sa_plan_task *task, sa_spans *spans);
} sa_planner;

/* Rows [begin, end) of a block; all of them see [all_lo, all_hi), which is empty when one sees
 * nothing; some see parts of [any_lo, any_hi) and none sees more. */
typedef struct {
    int64_t begin, end;
    int32_t all_lo, all_hi, any_lo, any_hi;
} sa_row_block;

/* Called by emit, block by block in order. A pattern calls sa_spans_block at the start of each row
 * block, then adds spans in ascending order of keys, disjoint; a selector calls sa_spans_row once a
 * row. What no row of the block sees is cut off, empty spans are ignored, spans that touch are
 * joined. SA_ENOMEM. */
typedef enum { SA_SPAN_FULL = 0, SA_SPAN_SEE, SA_SPAN_BAND } sa_span_kind;
sa_status sa_spans_block(sa_spans *spans, sa_row_block *block);
sa_status sa_spans_add(sa_spans *spans, sa_span_kind kind, int64_t start, int64_t end);
/* [start, end) as far as each row sees it: a full span where all rows do, see spans around it. */
sa_status sa_spans_seen(sa_spans *spans, int64_t start, int64_t end);
/* [start, end) as far as each row has it in its band: likewise, with band spans. */
sa_status sa_spans_banded(sa_spans *spans, int64_t start, int64_t end);
/* emit of a pattern that shows every key: full spans up to the diagonal, then one see span. */
sa_status sa_spans_everything(const sa_plan_task *task, sa_spans *spans);
/* One row with n single keys base + keys[0..n), ascending. They become full spans. */
sa_status sa_spans_row(sa_spans *spans, int64_t base, const int32_t *keys, int64_t n);

/* Builds a plan. Where masks hide more than intervals say, spans are cut at multiples of 64 keys:
 * parts that the masks hide from all rows go, mixed parts become clipped spans and the plan's
 * term_mask is set. p is checked (sa_problem_check); a pattern needs its sizes and masks alone. In
 * debug builds the plan is validated. */
sa_status sa_plan_build(sa_ctx *ctx, const sa_problem *p, const sa_planner *planner,
                        const void *opts, sa_plan **plan);

/* A plan of a boolean mask array: full blocks, and see spans read through the mask, or intervals
 * alone where they say it all. Only p->mask is read; its sizes are the plan's. */
sa_status sa_plan_from_mask(sa_ctx *ctx, const sa_problem *p, sa_plan **plan);

/* A plan of one interval a row: row i of batch entry b sees lo[b, i] <= j < hi[b, i], or lo[i] and
 * hi[i] where maps is 1. lo, hi [maps, n_q] are copied, then checked. Of p only the sizes are read.
 */
sa_status sa_plan_from_intervals(sa_ctx *ctx, const sa_problem *p, int64_t maps, const int64_t *lo,
                                 const int64_t *hi, sa_plan **plan);

#endif
