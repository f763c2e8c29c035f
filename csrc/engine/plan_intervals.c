/* plan_intervals.c - a plan of one interval of keys a row: packed documents, prefix-LM by batch
 * entry, ragged anything, without n_q x n_k memory. */
#include <string.h>

#include "engine/plan_parts.h"

enum { ROWS = 64 };

/* What the rows of a block see, joined to runs that do not touch; keys between runs are left out.
 */
static sa_status
add_runs(const sa_plan_task *task, const sa_row_block *block, sa_spans *spans)
{
    int64_t row[ROWS], n = 0, x;
    sa_status status = SA_OK;
    for (int64_t i = block->begin; i < block->end; i++) {
        for (x = n++; x > 0 && task->see_lo[row[x - 1]] > task->see_lo[i]; x--) {
            row[x] = row[x - 1];
        }
        row[x] = i;
    }
    int64_t start = 0, end = 0; /* the run under way */
    for (x = 0; x < n && status == SA_OK; x++) {
        const int64_t lo = task->see_lo[row[x]], hi = task->see_hi[row[x]];
        if (lo < hi && lo > end) {
            status = sa_spans_seen(spans, start, end);
            start = lo;
        }
        end = lo < hi ? SA_MAX(end, hi) : end;
    }
    return status ? status : sa_spans_seen(spans, start, end);
}

static sa_status
emit(const sa_plan_task *task, sa_spans *spans)
{
    sa_status status = SA_OK;
    for (int64_t i = task->begin; i < task->end && status == SA_OK;) {
        sa_row_block block;
        status = sa_spans_block(spans, &block);
        status = status ? status : add_runs(task, &block, spans);
        i = block.end;
    }
    return status;
}

/* A checked copy; of no intervals, which a batch of none may have, rows that see nothing. */
static sa_status
copy(sa_ctx *ctx, const sa_problem *p, int64_t maps, const int64_t *lo, const int64_t *hi,
     sa_sight *sight)
{
    memset(sight->lo, 0, (size_t)(sight->maps * p->n_q) * sizeof *sight->lo);
    memset(sight->hi, 0, (size_t)(sight->maps * p->n_q) * sizeof *sight->hi);
    for (int64_t x = 0; x < maps * p->n_q; x++) {
        /* read once: the arrays are the caller's, and another thread of theirs may write them */
        const int64_t from = __atomic_load_n(&lo[x], __ATOMIC_RELAXED),
                      to = __atomic_load_n(&hi[x], __ATOMIC_RELAXED);
        if (from < 0 || from > to || to > p->n_k) {
            return sa_fail(ctx, SA_EINVAL,
                           "row %lld of batch entry %lld has lo = %lld and hi = %lld; give "
                           "0 <= lo <= hi <= n_k = %lld, with lo = hi where it sees nothing",
                           (long long)(x % p->n_q), (long long)(x / p->n_q), (long long)from,
                           (long long)to, (long long)p->n_k);
        }
        if (from < to) {
            sight->lo[x] = (int32_t)from;
            sight->hi[x] = (int32_t)to;
        }
    }
    return SA_OK;
}

sa_status
sa_plan_from_intervals(sa_ctx *ctx, const sa_problem *p, int64_t maps, const int64_t *lo,
                       const int64_t *hi, sa_plan **plan)
{
    static const sa_planner intervals = {.name = "intervals", .rows_per_block = ROWS, .emit = emit};
    sa_sight sight = {.maps = SA_MAX(maps, 1)};
    *plan = NULL;
    sa_status status = sa_problem_sizes_check(ctx, p);
    if (status == SA_OK && maps != 1 && maps != p->batch) {
        status = sa_fail(ctx, SA_EINVAL,
                         "lo and hi have %lld rows of intervals for a batch of %lld; give one, or "
                         "one a batch entry",
                         (long long)maps, (long long)p->batch);
    }
    if (status != SA_OK) {
        return status;
    }
    const int64_t rows = sight.maps * p->n_q;
    sight.lo = sa_malloc_array((size_t)rows, sizeof *sight.lo);
    sight.hi = sa_malloc_array((size_t)rows, sizeof *sight.hi);
    if (sight.lo == NULL || sight.hi == NULL) {
        status =
            sa_fail(ctx, SA_ENOMEM, "no memory for the intervals of %lld rows", (long long)rows);
    }
    status = status ? status : copy(ctx, p, maps, lo, hi, &sight);
    status = status ? status : sa_plan_build_under(ctx, p, &intervals, NULL, &sight, plan);
    sa_sight_free(&sight);
    return status;
}
