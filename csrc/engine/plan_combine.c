/* plan_combine.c - union and intersection of two plans: ascending runs of each row, merged. */
#include "engine/plan_parts.h"

enum { TASK_ROWS = 64 };

typedef struct {
    const sa_plan *a, *b;
    sa_plan_op op;
} sides;

/* A run of one side; done when start is past all keys. */
typedef struct {
    sa_row_runs runs;
    int64_t start, end;
} side;

static void
advance(side *s)
{
    if (!sa_row_runs_next(&s->runs, &s->start, &s->end)) {
        s->start = s->end = INT64_MAX;
    }
}

static sa_status
add_union(side *a, side *b, sa_spans *spans)
{
    sa_status status = SA_OK;
    int64_t start = 0, end = 0; /* the run under way */
    while (status == SA_OK && (a->start != INT64_MAX || b->start != INT64_MAX)) {
        side *const next = a->start <= b->start ? a : b;
        if (next->start > end) {
            status = sa_spans_add(spans, SA_SPAN_FULL, start, end);
            start = next->start;
            end = next->end;
        }
        end = SA_MAX(end, next->end);
        advance(next);
    }
    return status ? status : sa_spans_add(spans, SA_SPAN_FULL, start, end);
}

static sa_status
add_intersection(side *a, side *b, sa_spans *spans)
{
    sa_status status = SA_OK;
    while (status == SA_OK && a->start != INT64_MAX && b->start != INT64_MAX) {
        status =
            sa_spans_add(spans, SA_SPAN_FULL, SA_MAX(a->start, b->start), SA_MIN(a->end, b->end));
        advance(a->end <= b->end ? a : b);
    }
    return status;
}

static sa_status
emit(const sa_plan_task *task, sa_spans *spans)
{
    const sides *const opts = task->opts;
    sa_status status = SA_OK;
    for (int64_t i = task->begin; i < task->end && status == SA_OK; i++) {
        sa_row_block block;
        side a, b;
        status = sa_spans_block(spans, &block);
        if (status == SA_OK) {
            sa_row_runs_start(&a.runs, opts->a, task->problem, task->batch, task->head, i);
            sa_row_runs_start(&b.runs, opts->b, task->problem, task->batch, task->head, i);
            advance(&a);
            advance(&b);
            status = (opts->op == SA_PLAN_UNION ? add_union : add_intersection)(&a, &b, spans);
        }
    }
    return status;
}

/* What a row of the result may see: what it may see in both plans, or the hull of what it may see
 * in either. */
static void
fill_sight(const sa_plan *a, const sa_plan *b, sa_plan_op op, sa_plan *plan)
{
    for (int64_t m = 0; m < plan->see_maps; m++) {
        for (int64_t i = 0; i < plan->n_q; i++) {
            const int64_t x = (a->see_maps > 1 ? m * plan->n_q : 0) + i,
                          y = (b->see_maps > 1 ? m * plan->n_q : 0) + i;
            int32_t lo = SA_MAX(a->see_lo[x], b->see_lo[y]),
                    hi = SA_MIN(a->see_hi[x], b->see_hi[y]);
            if (op == SA_PLAN_UNION) {
                const bool in_a = a->see_lo[x] < a->see_hi[x], in_b = b->see_lo[y] < b->see_hi[y];
                lo = !in_a   ? b->see_lo[y]
                     : !in_b ? a->see_lo[x]
                             : SA_MIN(a->see_lo[x], b->see_lo[y]);
                hi = !in_a   ? b->see_hi[y]
                     : !in_b ? a->see_hi[x]
                             : SA_MAX(a->see_hi[x], b->see_hi[y]);
            }
            plan->see_lo[m * plan->n_q + i] = lo < hi ? lo : 0;
            plan->see_hi[m * plan->n_q + i] = lo < hi ? hi : 0;
        }
    }
}

sa_status
sa_plan_combine(sa_ctx *ctx, const sa_plan *a, const sa_plan *b, const sa_problem *p, sa_plan_op op,
                sa_plan **result)
{
    const sides opts = {a, b, op};
    *result = NULL;
    sa_status status = sa_plan_fits(ctx, a, p);
    status = status ? status : sa_plan_fits(ctx, b, p);
    if (status != SA_OK) {
        return status;
    }
    const bool masks = a->term_mask || b->term_mask, mask = masks && p->mask.data != NULL;
    const bool keys = masks && p->key_mask.data != NULL;
    const sa_plan sizes = {
        .n_q = a->n_q,
        .n_k = a->n_k,
        .batch = a->batch,
        .heads = a->heads,
        .rows_per_block = 1,
        .heads_per_map = mask && p->mask.stride[1] != 0
                             ? 1
                             : (int32_t)sa_common_divisor(a->heads_per_map, b->heads_per_map),
        .per_batch = a->per_batch || b->per_batch || a->see_maps > 1 || b->see_maps > 1 ||
                     (mask && p->mask.stride[0] != 0) || (keys && p->key_mask.stride[0] != 0),
        .see_maps = SA_MAX(a->see_maps, b->see_maps),
    };
    const sa_plan_job job = {.problem = p, .opts = &opts, .emit = emit, .rows = TASK_ROWS};
    sa_plan *plan;
    status = sa_plan_new(ctx, &sizes, &plan);
    if (status != SA_OK) {
        return status;
    }
    fill_sight(a, b, op, plan);
    status = sa_plan_fill(ctx, plan, &job);
#ifndef NDEBUG
    status = status ? status : sa_plan_validate(ctx, plan);
#endif
    if (status != SA_OK) {
        sa_plan_free(plan);
        return status;
    }
    *result = plan;
    return SA_OK;
}
