/* plan_build.c - the driver: every task fills a list of spans, then the lists join in order. */
#include <assert.h>
#include <string.h>

#include "base/threads.h"
#include "engine/plan_parts.h"

enum {
    GRID = 64,           /* keys: where masks are looked at, what full spans are multiples of */
    SELECTOR_ROWS = 64,  /* rows of a task that computes scores                               */
    MASKED_ROWS = 128,   /* ... that reads masks                                              */
    PATTERN_ROWS = 4096, /* ... that reads nothing                                           */
    LONG_ROWS = 2048,    /* of a head, or LARGE_ROWS of all: a large call                  */
    LARGE_ROWS = 4096
};

/* Spans in the order of emission. len NULL: all have the plan's span_len. */
typedef struct {
    int32_t *start, *len;
    int64_t count, room;
} span_list;

/* What remains of a task. */
typedef struct {
    span_list list;
    int64_t base; /* place of its first span in the plan */
    bool mixed;
} task_spans;

typedef struct {
    sa_plan *plan;
    const sa_plan_job *job;
    int64_t chunks; /* tasks a map */
    task_spans *tasks;
} filling;

/* Keys that some row's band holds, and those that every row's does, as far as it may see. */
typedef struct {
    int64_t any_lo, any_hi, all_lo, all_hi;
} band_hull;

struct sa_spans {
    const filling *f;
    const sa_plan_task *task;
    task_spans *result;
    span_list kind[3]; /* of the block under way */
    sa_row_block block;
    band_hull hull;
    int64_t slot; /* map * n_blocks + block that comes next */
    bool open;
};

static void
list_free(span_list *list)
{
    sa_free(list->start);
    sa_free(list->len);
    *list = (span_list){0};
}

/* Room for `more` spans. */
static sa_status
list_reserve(sa_ctx *ctx, span_list *list, int64_t more, bool lengths)
{
    if (list->room - list->count >= more) {
        return SA_OK;
    }
    const int64_t room = SA_MAX(SA_MAX(2 * list->room, list->count + more), 16);
    span_list grown = {.count = list->count, .room = room};
    grown.start = sa_malloc_array((size_t)room, sizeof *grown.start);
    grown.len = lengths ? sa_malloc_array((size_t)room, sizeof *grown.len) : NULL;
    if (grown.start == NULL || (lengths && grown.len == NULL)) {
        list_free(&grown);
        return sa_fail(ctx, SA_ENOMEM, "no memory for the plan's spans");
    }
    if (list->count > 0) {
        memcpy(grown.start, list->start, (size_t)list->count * sizeof *grown.start);
        if (lengths) {
            memcpy(grown.len, list->len, (size_t)list->count * sizeof *grown.len);
        }
    }
    list_free(list);
    *list = grown;
    return SA_OK;
}

static sa_status
push(sa_spans *spans, sa_span_kind kind, int64_t start, int64_t end)
{
    span_list *const list = &spans->kind[kind];
    if (start >= end) {
        return SA_OK;
    }
    if (list->count > 0 && list->start[list->count - 1] + list->len[list->count - 1] == start) {
        list->len[list->count - 1] += (int32_t)(end - start);
        return SA_OK;
    }
    const sa_status status = list_reserve(spans->task->ctx, list, 1, true);
    if (status == SA_OK) {
        list->start[list->count] = (int32_t)start;
        list->len[list->count++] = (int32_t)(end - start);
    }
    return status;
}

/* Moves the spans of the block under way to the task's list; its pointers count from there until
 * the lists join. */
static sa_status
close_block(sa_spans *spans)
{
    sa_plan *const plan = spans->f->plan;
    span_list *const all = &spans->result->list;
    int64_t *const pointer[3] = {plan->row_ptr, plan->see_ptr, plan->band_ptr};
    if (!spans->open) {
        return SA_OK;
    }
    const int64_t count = spans->kind[0].count + spans->kind[1].count + spans->kind[2].count;
    const sa_status status = list_reserve(spans->task->ctx, all, count, true);
    if (status != SA_OK) {
        return status;
    }
    for (int x = 0; x < 3; x++) {
        span_list *const list = &spans->kind[x];
        pointer[x][spans->slot] = all->count;
        if (list->count > 0) {
            memcpy(all->start + all->count, list->start, (size_t)list->count * sizeof *list->start);
            memcpy(all->len + all->count, list->len, (size_t)list->count * sizeof *list->len);
        }
        all->count += list->count;
        list->count = 0;
    }
    spans->slot++;
    spans->open = false;
    return SA_OK;
}

static sa_row_block
block_of(const sa_plan_task *task, int64_t begin, int64_t end)
{
    int32_t all_lo = 0, all_hi = INT32_MAX, any_lo = INT32_MAX, any_hi = 0;
    for (int64_t i = begin; i < end; i++) {
        const int32_t lo = task->see_lo[i], hi = task->see_hi[i];
        all_lo = SA_MAX(all_lo, lo);
        all_hi = SA_MIN(all_hi, hi);
        if (lo < hi) {
            any_lo = SA_MIN(any_lo, lo);
            any_hi = SA_MAX(any_hi, hi);
        }
    }
    return (sa_row_block){begin, end, all_lo, all_hi, any_lo, any_hi};
}

static band_hull
hull_of(const sa_plan_task *task, const sa_row_block *rows)
{
    band_hull w = {task->problem->n_k, 0, rows->all_lo, rows->all_hi};
    for (int64_t i = rows->begin; i < rows->end; i++) {
        const int32_t lo = SA_MAX(task->band_lo[i], task->see_lo[i]),
                      hi = SA_MIN(task->band_hi[i], task->see_hi[i]);
        w.all_lo = SA_MAX(w.all_lo, lo);
        w.all_hi = SA_MIN(w.all_hi, hi);
        if (lo < hi) {
            w.any_lo = SA_MIN(w.any_lo, lo);
            w.any_hi = SA_MAX(w.any_hi, hi);
        }
    }
    w.all_hi = SA_MAX(w.all_hi, w.all_lo);
    if (w.all_hi < w.any_hi) { /* the band span that follows takes the ragged tail */
        w.all_hi -= (w.all_hi - w.all_lo) % GRID;
    }
    return w;
}

sa_status
sa_spans_block(sa_spans *spans, sa_row_block *block)
{
    const sa_plan *const plan = spans->f->plan;
    const sa_status status = close_block(spans);
    if (status != SA_OK) {
        return status;
    }
    const int64_t at = spans->slot % plan->n_blocks;
    spans->block = block_of(spans->task, plan->row_start[at], sa_plan_block_end(plan, at));
    if (spans->task->band_lo != NULL) {
        spans->hull = hull_of(spans->task, &spans->block);
    }
    spans->open = true;
    *block = spans->block;
    return SA_OK;
}

sa_status
sa_spans_add(sa_spans *spans, sa_span_kind kind, int64_t start, int64_t end)
{
    start = SA_MAX(start, spans->block.any_lo);
    end = SA_MIN(end, spans->block.any_hi);
    if (!spans->f->job->filtered) {
        return push(spans, kind, start, end);
    }
    while (start < end) {
        const int64_t stop = SA_MIN(end, (start / GRID + 1) * GRID);
        const sa_block_state state =
            sa_mask_block(spans->task, &spans->block, kind == SA_SPAN_BAND, start, stop);
        sa_span_kind as = kind;
        if (state == SA_BLOCK_MIXED) {
            spans->result->mixed = true;
            as = kind == SA_SPAN_FULL ? SA_SPAN_SEE : kind;
        }
        const sa_status status = state == SA_BLOCK_EMPTY ? SA_OK : push(spans, as, start, stop);
        if (status != SA_OK) {
            return status;
        }
        start = stop;
    }
    return SA_OK;
}

sa_status
sa_spans_seen(sa_spans *spans, int64_t start, int64_t end)
{
    const sa_row_block *const block = &spans->block;
    int64_t first = SA_MAX(start, block->all_lo), last = SA_MIN(end, block->all_hi);
    if (first < last && last < SA_MIN(end, block->any_hi)) {
        last -= (last - first) % GRID; /* the see span that follows takes the ragged tail */
    }
    if (first >= last) {
        return sa_spans_add(spans, SA_SPAN_SEE, start, end);
    }
    sa_status status = sa_spans_add(spans, SA_SPAN_SEE, start, first);
    status = status ? status : sa_spans_add(spans, SA_SPAN_FULL, first, last);
    return status ? status : sa_spans_add(spans, SA_SPAN_SEE, last, end);
}

sa_status
sa_spans_banded(sa_spans *spans, int64_t start, int64_t end)
{
    const band_hull *const w = &spans->hull;
    const int64_t lo = SA_MAX(start, w->any_lo), hi = SA_MIN(end, w->any_hi);
    const int64_t a = SA_MIN(SA_MAX(w->all_lo, lo), hi), z = SA_MIN(SA_MAX(w->all_hi, a), hi);
    if (a >= z) {
        return sa_spans_add(spans, SA_SPAN_BAND, lo, hi);
    }
    sa_status status = sa_spans_add(spans, SA_SPAN_BAND, lo, a);
    status = status ? status : sa_spans_add(spans, SA_SPAN_FULL, a, z);
    return status ? status : sa_spans_add(spans, SA_SPAN_BAND, z, hi);
}

sa_status
sa_spans_everything(const sa_plan_task *task, sa_spans *spans)
{
    sa_status status = SA_OK;
    for (int64_t i = task->begin; i < task->end && status == SA_OK;) {
        sa_row_block block;
        status = sa_spans_block(spans, &block);
        status = status ? status : sa_spans_seen(spans, 0, task->problem->n_k);
        i = block.end;
    }
    return status;
}

sa_status
sa_spans_row(sa_spans *spans, int64_t base, const int32_t *keys, int64_t n)
{
    sa_plan *const plan = spans->f->plan;
    span_list *const all = &spans->result->list;
    const sa_status status = list_reserve(spans->task->ctx, all, n, false);
    if (status != SA_OK) {
        return status;
    }
    plan->row_ptr[spans->slot] = all->count;
    for (int64_t x = 0; x < n; x++) {
        all->start[all->count + x] = (int32_t)(base + keys[x]);
    }
    all->count += n;
    plan->see_ptr[spans->slot] = plan->band_ptr[spans->slot] = all->count;
    spans->slot++;
    return SA_OK;
}

static int64_t
first_slot(const filling *f, int64_t task)
{
    const int64_t blocks = f->job->rows / f->plan->rows_per_block; /* of a task */
    return task / f->chunks * f->plan->n_blocks + task % f->chunks * blocks;
}

static sa_status
emit_task(sa_ctx *ctx, void *arg, int64_t index, int worker)
{
    const filling *const f = arg;
    const sa_plan *const plan = f->plan;
    const int64_t map = index / f->chunks, begin = index % f->chunks * f->job->rows;
    const int64_t maps = plan->heads / plan->heads_per_map; /* of a batch entry */
    const int64_t batch = plan->per_batch ? map / maps : 0;
    const int64_t see = plan->see_maps > 1 ? batch * plan->n_q : 0,
                  band = plan->band_maps > 1 ? map * plan->n_q : 0;
    const sa_plan_task task = {
        .ctx = ctx,
        .worker = worker,
        .problem = f->job->problem,
        .opts = f->job->opts,
        .sight = f->job->sight,
        .map = map,
        .batch = batch,
        .head = map % maps * plan->heads_per_map,
        .begin = begin,
        .end = SA_MIN(begin + f->job->rows, plan->n_q),
        .see_lo = plan->see_lo + see,
        .see_hi = plan->see_hi + see,
        .band_lo = plan->band_lo ? plan->band_lo + band : NULL,
        .band_hi = plan->band_hi ? plan->band_hi + band : NULL,
    };
    sa_spans spans = {
        .f = f, .task = &task, .result = &f->tasks[index], .slot = first_slot(f, index)};
    if (f->job->scratch > 0) {
        sa_arena_reset(sa_scratch(ctx, worker));
    }
    sa_status status = f->job->emit(&task, &spans);
    status = status ? status : close_block(&spans);
    for (int x = 0; x < 3; x++) {
        list_free(&spans.kind[x]);
    }
    const int64_t rows = task.end - task.begin,
                  blocks = (rows + plan->rows_per_block - 1) / plan->rows_per_block;
    if (status == SA_OK && spans.slot != first_slot(f, index) + blocks) {
        return sa_fail(ctx, SA_EINTERNAL, "a planner left out row blocks");
    }
    return status;
}

static sa_status
join_task(sa_ctx *ctx, void *arg, int64_t index, int worker)
{
    const filling *const f = arg;
    sa_plan *const plan = f->plan;
    task_spans *const from = &f->tasks[index];
    const int64_t blocks = f->job->rows / plan->rows_per_block, first = first_slot(f, index);
    const int64_t last = SA_MIN(first + blocks, (index / f->chunks + 1) * plan->n_blocks);
    (void)ctx, (void)worker;
    for (int64_t slot = first; slot < last; slot++) {
        plan->row_ptr[slot] += from->base;
        plan->see_ptr[slot] += from->base;
        plan->band_ptr[slot] += from->base;
    }
    if (from->list.count > 0) {
        const size_t bytes = (size_t)from->list.count * sizeof *plan->start;
        memcpy(plan->start + from->base, from->list.start, bytes);
        if (plan->len != NULL) {
            memcpy(plan->len + from->base, from->list.len, bytes);
        }
    }
    list_free(&from->list);
    return SA_OK;
}

static sa_status
join(sa_ctx *ctx, filling *f, int64_t n_tasks)
{
    sa_plan *const plan = f->plan;
    int64_t total = 0;
    bool mixed = false;
    for (int64_t t = 0; t < n_tasks; t++) {
        f->tasks[t].base = total;
        total += f->tasks[t].list.count;
        mixed = mixed || f->tasks[t].mixed;
    }
    plan->start = sa_malloc_array((size_t)total, sizeof *plan->start);
    plan->len = plan->span_len == 0 ? sa_malloc_array((size_t)total, sizeof *plan->len) : NULL;
    if (plan->start == NULL || (plan->span_len == 0 && plan->len == NULL)) {
        return sa_fail(ctx, SA_ENOMEM, "no memory for the %lld spans of a plan", (long long)total);
    }
    plan->n_spans = plan->row_ptr[plan->n_maps * plan->n_blocks] = total;
    plan->term_mask = mixed;
    return sa_parallel(ctx, n_tasks, join_task, f);
}

sa_status
sa_plan_fill(sa_ctx *ctx, sa_plan *plan, const sa_plan_job *job)
{
    filling f = {.plan = plan, .job = job, .chunks = (plan->n_q + job->rows - 1) / job->rows};
    const int64_t n_tasks = plan->n_maps * f.chunks;
    assert(job->rows % plan->rows_per_block == 0);
    f.tasks = sa_malloc_array((size_t)n_tasks, sizeof *f.tasks);
    if (f.tasks == NULL) {
        return sa_fail(ctx, SA_ENOMEM, "no memory for the %lld parts of a plan",
                       (long long)n_tasks);
    }
    memset(f.tasks, 0, (size_t)n_tasks * sizeof *f.tasks);
    sa_status status = job->scratch > 0 ? sa_scratch_reserve(ctx, job->scratch) : SA_OK;
    status = status ? status : sa_parallel(ctx, n_tasks, emit_task, &f);
    status = status ? status : join(ctx, &f, n_tasks);
    for (int64_t t = 0; t < n_tasks; t++) {
        list_free(&f.tasks[t].list);
    }
    sa_free(f.tasks);
    return status;
}

/* Twice the record's rows a block halve how often keys come from memory and gradients go there.
 * Small calls keep more tasks, and masks are looked at in blocks of 64 x 64. */
static int32_t
block_rows(const sa_problem *p, const sa_planner *planner)
{
    const int64_t all = p->batch * p->heads * p->n_q;
    const bool large = p->n_q >= LONG_ROWS || (p->n_q > GRID && all >= LARGE_ROWS);
    return planner->grows && large && p->mask.data == NULL ? 2 * planner->rows_per_block
                                                           : planner->rows_per_block;
}

/* Which heads and batches share a map, how many rows share a list. */
static sa_plan
sizes_of(const sa_problem *p, const sa_planner *planner, const void *opts, const sa_sight *sight,
         bool filtered)
{
    const bool addressed = planner->reads != 0 || planner->per_head;
    const bool mask = filtered && sight->mask, keys = filtered && sight->key_mask;
    sa_plan_shape shape = {block_rows(p, planner), addressed};
    if (planner->shape != NULL) {
        planner->shape(p, opts, &shape);
    }
    const bool per_head = shape.per_head || (mask && p->mask.stride[1] != 0);
    return (sa_plan){
        .n_q = p->n_q,
        .n_k = p->n_k,
        .batch = p->batch,
        .heads = p->heads,
        .rows_per_block = shape.rows_per_block,
        .heads_per_map = per_head ? 1 : (int32_t)p->heads,
        .per_batch = addressed || sight->maps > 1 || (mask && p->mask.stride[0] != 0) ||
                     (keys && p->key_mask.stride[0] != 0),
        .span_len = planner->span_len,
        .see_maps = sight->maps,
        .band_maps = planner->band != NULL,
    };
}

sa_status
sa_plan_build_under(sa_ctx *ctx, const sa_problem *p, const sa_planner *planner, const void *opts,
                    const sa_sight *sight, sa_plan **result)
{
    const bool filtered = !planner->applies_mask && (sight->mask || sight->key_mask);
    const sa_plan sizes = sizes_of(p, planner, opts, sight, filtered);
    const int64_t rows = planner->rows_per_block == 1 ? SELECTOR_ROWS
                         : filtered                   ? MASKED_ROWS
                                                      : PATTERN_ROWS;
    sa_plan_job job = {
        .problem = p, .opts = opts, .emit = planner->emit, .sight = sight, .filtered = filtered};
    job.rows = SA_MAX(rows / sizes.rows_per_block, 1) * sizes.rows_per_block;
    sa_plan *plan;
    sa_status status = planner->scratch ? planner->scratch(ctx, p, opts, &job.scratch) : SA_OK;
    status = status ? status : sa_plan_new(ctx, &sizes, &plan);
    if (status != SA_OK) {
        return status;
    }
    memcpy(plan->see_lo, sight->lo, (size_t)(sight->maps * p->n_q) * sizeof *plan->see_lo);
    memcpy(plan->see_hi, sight->hi, (size_t)(sight->maps * p->n_q) * sizeof *plan->see_hi);
    for (int64_t i = 0; planner->band != NULL && i < p->n_q; i++) {
        planner->band(p, opts, i, &plan->band_lo[i], &plan->band_hi[i]);
    }
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

sa_status
sa_plan_build(sa_ctx *ctx, const sa_problem *p, const sa_planner *planner, const void *opts,
              sa_plan **plan)
{
    sa_sight sight;
    *plan = NULL;
    sa_status status = planner->check ? planner->check(ctx, p, opts) : SA_OK;
    status = status ? status : sa_sight_make(ctx, p, &sight);
    if (status != SA_OK) {
        return status;
    }
    status = sa_plan_build_under(ctx, p, planner, opts, &sight, plan);
    sa_sight_free(&sight);
    return status;
}
