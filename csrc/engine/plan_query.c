/* plan_query.c - what a plan shows: as an array, and counted. */
#include <string.h>

#include "base/threads.h"
#include "engine/plan_parts.h"

enum { TASK_ROWS = 64 };

static int64_t
tasks_of(int64_t rows)
{
    return (rows + TASK_ROWS - 1) / TASK_ROWS;
}

typedef struct {
    const sa_plan *plan;
    const sa_problem *p;
    int64_t b, h;
    unsigned char *out;
} painting;

static sa_status
paint_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const painting *const job = arg;
    const int64_t n_k = job->plan->n_k, begin = task * TASK_ROWS,
                  end = SA_MIN(begin + TASK_ROWS, job->plan->n_q);
    (void)ctx, (void)worker;
    memset(job->out + begin * n_k, 0, (size_t)((end - begin) * n_k));
    for (int64_t i = begin; i < end; i++) {
        sa_row_runs runs;
        int64_t start, stop;
        sa_row_runs_start(&runs, job->plan, job->p, job->b, job->h, i);
        while (sa_row_runs_next(&runs, &start, &stop)) {
            memset(job->out + i * n_k + start, 1, (size_t)(stop - start));
        }
    }
    return SA_OK;
}

sa_status
sa_plan_to_mask(sa_ctx *ctx, const sa_plan *plan, const sa_problem *p, int64_t b, int64_t h,
                unsigned char *out)
{
    painting job = {plan, p, b, h, out};
    const sa_status status = sa_plan_fits(ctx, plan, p);
    if (status != SA_OK) {
        return status;
    }
    if (b < 0 || b >= plan->batch || h < 0 || h >= plan->heads) {
        return sa_fail(ctx, SA_EINVAL, "batch %lld, head %lld is not in a plan of %lld x %lld",
                       (long long)b, (long long)h, (long long)plan->batch, (long long)plan->heads);
    }
    return sa_parallel(ctx, tasks_of(plan->n_q), paint_task, &job);
}

/* A count goes over `batches` x `groups` x row chunks; what all batches or all heads share is
 * counted once and multiplied. */
typedef struct {
    const sa_plan *plan;
    const sa_sight *sight; /* not NULL: count what this shows of the plan's see intervals */
    const sa_problem *p;
    int64_t batches, groups, chunks;
    int64_t group_heads;  /* heads of a group that are looked at one by one */
    sa_plan_counts *part; /* [tasks]                                        */
} counting;

static int64_t
row_keys(const counting *c, int64_t b, int64_t h, int64_t i)
{
    sa_row_runs runs;
    sa_row_runs_start(&runs, c->plan, c->p, b, h, i);
    return sa_row_runs_count(&runs);
}

static void
set_bits(uint64_t *bits, int64_t start, int64_t stop)
{
    while (start < stop) {
        const int64_t end = SA_MIN(stop, (start / 64 + 1) * 64);
        bits[start / 64] |= (~UINT64_C(0) >> (64 - (end - start))) << start % 64;
        start = end;
    }
}

/* Keys that the heads [h, h + n) of a group see of row i, together and each for itself. */
static void
union_keys(const counting *c, uint64_t *bits, int64_t b, int64_t h, int64_t n, int64_t i,
           sa_plan_counts *part)
{
    int64_t low = c->plan->n_k, high = 0;
    for (int64_t x = 0; x < n; x++) {
        sa_row_runs runs;
        int64_t start, stop;
        sa_row_runs_start(&runs, c->plan, c->p, b, h + x, i);
        while (sa_row_runs_next(&runs, &start, &stop)) {
            set_bits(bits, start, stop);
            part->kept += stop - start;
            low = SA_MIN(low, start);
            high = SA_MAX(high, stop);
        }
    }
    for (int64_t word = low / 64; word * 64 < high; word++) {
        part->union_rows += __builtin_popcountll(bits[word]);
        bits[word] = 0;
    }
}

static int64_t
sight_keys(const counting *c, int64_t b, int64_t h, int64_t i)
{
    const int64_t at = (c->sight->maps > 1 ? b * c->p->n_q : 0) + i,
                  see = (c->plan->see_maps > 1 ? b * c->p->n_q : 0) + i;
    return sa_row_bits_count(sa_row_bits_of(c->p, c->sight->mask, c->sight->key_mask, b, h, i),
                             SA_MAX(c->sight->lo[at], c->plan->see_lo[see]),
                             SA_MIN(c->sight->hi[at], c->plan->see_hi[see]));
}

static sa_status
count_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const counting *const c = arg;
    const int64_t chunk = task % c->chunks, g = task / c->chunks % c->groups,
                  b = task / c->chunks / c->groups;
    const int64_t begin = chunk * TASK_ROWS, end = SA_MIN(begin + TASK_ROWS, c->p->n_q);
    sa_plan_counts *const part = &c->part[task];
    uint64_t *bits = NULL;
    *part = (sa_plan_counts){0};
    if (c->group_heads > 1) {
        sa_arena_reset(sa_scratch(ctx, worker));
        bits = sa_arena_take_array(sa_scratch(ctx, worker), (size_t)(c->p->n_k / 64 + 1),
                                   sizeof *bits);
        if (bits == NULL) {
            return sa_fail(ctx, SA_EINTERNAL, "count: the scratch reserved is too small");
        }
        memset(bits, 0, (size_t)(c->p->n_k / 64 + 1) * sizeof *bits);
    }
    for (int64_t i = begin; i < end; i++) {
        if (c->sight != NULL) {
            part->visible += sight_keys(c, b, g, i);
        } else if (c->group_heads > 1) {
            union_keys(c, bits, b, g * c->group_heads, c->group_heads, i, part);
        } else {
            part->kept += row_keys(c, b, g * (c->p->heads / c->groups), i);
        }
    }
    return SA_OK;
}

/* Sums over all tasks. */
static sa_status
run_count(sa_ctx *ctx, counting *c, sa_plan_counts *sum)
{
    c->chunks = tasks_of(c->p->n_q);
    const int64_t n_tasks = c->batches * c->groups * c->chunks;
    *sum = (sa_plan_counts){0};
    c->part = sa_malloc_array((size_t)n_tasks, sizeof *c->part);
    if (c->part == NULL) {
        return sa_fail(ctx, SA_ENOMEM, "no memory to count a plan of %lld rows",
                       (long long)c->p->n_q);
    }
    sa_status status = SA_OK;
    if (c->group_heads > 1) {
        status = sa_scratch_reserve_array(ctx, (size_t)(c->p->n_k / 64 + 1), sizeof(uint64_t));
    }
    status = status ? status : sa_parallel(ctx, n_tasks, count_task, c);
    for (int64_t t = 0; status == SA_OK && t < n_tasks; t++) {
        sum->kept += c->part[t].kept;
        sum->visible += c->part[t].visible;
        sum->union_rows += c->part[t].union_rows;
    }
    sa_free(c->part);
    return status;
}

static bool
varies(sa_view v, int axis, bool read)
{
    return read && v.data != NULL && v.size[axis] > 1 && v.stride[axis] != 0;
}

/* Causality is in the plan's intervals: it may begin anew in each sequence of a packed call. */
static sa_status
count_visible(sa_ctx *ctx, const sa_plan *plan, const sa_problem *p, int64_t *visible)
{
    sa_problem masks = *p;
    sa_sight sight;
    masks.causal = SA_CAUSAL_NONE;
    sa_status status = sa_sight_make(ctx, &masks, &sight);
    if (status != SA_OK) {
        return status;
    }
    const bool by_batch = plan->see_maps > 1 || sight.maps > 1 || varies(p->mask, 0, sight.mask) ||
                          varies(p->key_mask, 0, sight.key_mask);
    counting c = {
        .plan = plan,
        .sight = &sight,
        .p = p,
        .batches = by_batch ? p->batch : 1,
        .groups = varies(p->mask, 1, sight.mask) ? p->heads : 1,
    };
    sa_plan_counts sum;
    status = run_count(ctx, &c, &sum);
    *visible = sum.visible * (p->batch / c.batches) * (p->heads / c.groups);
    sa_sight_free(&sight);
    return status;
}

sa_status
sa_plan_count(sa_ctx *ctx, const sa_plan *plan, const sa_problem *p, sa_plan_counts *counts)
{
    sa_plan_counts sum;
    int64_t visible = 0;
    *counts = (sa_plan_counts){0};
    sa_status status = sa_plan_fits(ctx, plan, p);
    if (status != SA_OK || plan->batch == 0) {
        return status;
    }
    const int64_t group = p->heads / p->kv_heads;
    const bool masks = plan->term_mask, shared = !plan->per_batch && plan->see_maps == 1;
    const bool by_batch = !shared || varies(p->mask, 0, masks) || varies(p->key_mask, 0, masks);
    /* heads of one group differ; groups differ */
    const bool by_group = plan->heads_per_map % group != 0 || varies(p->mask, 1, masks);
    const bool by_head = by_group || plan->heads_per_map < p->heads;
    counting c = {
        .plan = plan,
        .p = p,
        .batches = by_batch ? plan->batch : 1,
        .groups = by_head ? p->kv_heads : 1,
        .group_heads = by_group ? group : 1,
    };
    status = run_count(ctx, &c, &sum);
    status = status ? status : count_visible(ctx, plan, p, &visible);
    const int64_t batches = plan->batch / c.batches;
    if (c.group_heads > 1) {
        counts->kept = sum.kept * batches;
        counts->union_rows = sum.union_rows * batches;
    } else { /* every head of a group sees the same keys */
        counts->kept = sum.kept * batches * (p->heads / c.groups);
        counts->union_rows = sum.kept * batches * (p->kv_heads / c.groups);
    }
    counts->visible = visible;
    return status;
}
