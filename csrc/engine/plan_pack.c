/* plan_pack.c - the plans of several sequences as one plan over all of them, one after the other.
 */
#include "base/threads.h"
#include "engine/plan_parts.h"

typedef struct {
    const sa_plan *const *plans;
    int64_t count;
    sa_plan *plan;
    int64_t *row, *key, *block; /* [count + 1]: where a sequence's begin                   */
    int64_t *span;              /* [n_maps * count + 1]: of map m and sequence s, likewise */
} packing;

/* Map of sequence s that map m of the result stands for. */
static int64_t
source_map(const packing *job, int64_t m, int64_t s)
{
    const int64_t maps = job->plan->heads / job->plan->heads_per_map; /* of a batch entry */
    return sa_plan_map(job->plans[s], job->plan->per_batch ? m / maps : 0,
                       m % maps * job->plan->heads_per_map);
}

/* The scalars of the result: what suits all sequences. */
static sa_status
join_sizes(sa_ctx *ctx, const sa_plan *const *plans, int64_t count, sa_plan *sizes)
{
    const sa_plan *const first = plans[0];
    *sizes = (sa_plan){.batch = first->batch,
                       .heads = first->heads,
                       .rows_per_block = 1,
                       .heads_per_map = (int32_t)first->heads,
                       .span_len = 1,
                       .see_maps = 1};
    for (int64_t s = 0; s < count; s++) {
        const sa_plan *const p = plans[s];
        if (p->batch != first->batch || p->heads != first->heads) {
            return sa_fail(ctx, SA_EINVAL,
                           "plan %lld is for batch %lld and %lld heads, but the first is for %lld "
                           "and %lld; pack plans of one batch and as many heads",
                           (long long)s, (long long)p->batch, (long long)p->heads,
                           (long long)first->batch, (long long)first->heads);
        }
        sizes->n_q += p->n_q;
        sizes->n_k += p->n_k;
        sizes->n_blocks += p->n_blocks;
        sizes->rows_per_block = SA_MAX(sizes->rows_per_block, p->rows_per_block);
        sizes->heads_per_map = (int32_t)sa_common_divisor(sizes->heads_per_map, p->heads_per_map);
        sizes->per_batch = sizes->per_batch || p->per_batch;
        sizes->term_mask = sizes->term_mask || p->term_mask;
        sizes->see_maps = SA_MAX(sizes->see_maps, p->see_maps);
        sizes->band_maps = SA_MAX(sizes->band_maps, p->band_lo == NULL ? 0 : 1);
        if (p->len != NULL || p->span_len != 1) {
            sizes->span_len = 0; /* a longer span may be cut at the end of its sequence */
        }
    }
    for (int64_t s = 0; s < count; s++) {
        if (plans[s]->band_lo != NULL && plans[s]->band_maps > 1) {
            sizes->band_maps =
                (sizes->per_batch ? sizes->batch : 1) * (sizes->heads / sizes->heads_per_map);
        }
    }
    const sa_problem all = {.batch = sizes->batch,
                            .heads = sizes->heads,
                            .kv_heads = sizes->heads,
                            .n_q = sizes->n_q,
                            .n_k = sizes->n_k};
    return sa_problem_sizes_check(ctx, &all);
}

/* An interval of keys, `by` further on; one that holds none stays (0, 0). */
static void
shift(int32_t *lo, int32_t *hi, int32_t from_lo, int32_t from_hi, int64_t by)
{
    *lo = from_lo < from_hi ? (int32_t)(from_lo + by) : 0;
    *hi = from_lo < from_hi ? (int32_t)(from_hi + by) : 0;
}

/* What the rows of sequence s see, and their bands. A sequence without bands gets all its keys. */
static void
fill_rows(const packing *job, int64_t s)
{
    const sa_plan *const from = job->plans[s];
    sa_plan *const to = job->plan;
    if (from->n_q == 0) { /* of however many batch entries */
        return;
    }
    for (int64_t m = 0; m < to->see_maps; m++) {
        const int64_t x = from->see_maps > 1 ? m * from->n_q : 0, y = m * to->n_q + job->row[s];
        for (int64_t i = 0; i < from->n_q; i++) {
            shift(&to->see_lo[y + i], &to->see_hi[y + i], from->see_lo[x + i], from->see_hi[x + i],
                  job->key[s]);
        }
    }
    for (int64_t m = 0; m < to->band_maps; m++) {
        const int64_t x = from->band_maps > 1 ? source_map(job, m, s) * from->n_q : 0;
        const int64_t y = m * to->n_q + job->row[s];
        for (int64_t i = 0; i < from->n_q; i++) {
            const bool band = from->band_lo != NULL;
            shift(&to->band_lo[y + i], &to->band_hi[y + i], band ? from->band_lo[x + i] : 0,
                  band ? from->band_hi[x + i] : (int32_t)from->n_k, job->key[s]);
        }
    }
    for (int64_t b = 0; b < from->n_blocks; b++) {
        to->row_start[job->block[s] + b] = (int32_t)(from->row_start[b] + job->row[s]);
    }
}

/* The row blocks and spans of one map and sequence. */
static sa_status
copy_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const packing *const job = arg;
    const int64_t m = task / job->count, s = task % job->count;
    const sa_plan *const from = job->plans[s];
    sa_plan *const to = job->plan;
    const int64_t x = source_map(job, m, s) * from->n_blocks, y = m * to->n_blocks + job->block[s];
    const int64_t first = from->row_ptr[x], by = job->span[task] - first;
    (void)ctx, (void)worker;
    for (int64_t b = 0; b < from->n_blocks; b++) {
        to->row_ptr[y + b] = from->row_ptr[x + b] + by;
        to->see_ptr[y + b] = from->see_ptr[x + b] + by;
        to->band_ptr[y + b] = from->band_ptr[x + b] + by;
    }
    for (int64_t a = first; a < from->row_ptr[x + from->n_blocks]; a++) {
        to->start[a + by] = (int32_t)(from->start[a] + job->key[s]);
        if (to->len != NULL) {
            to->len[a + by] = sa_plan_span_len(from, a);
        }
    }
    return SA_OK;
}

static sa_status
fill(sa_ctx *ctx, packing *job)
{
    sa_plan *const plan = job->plan;
    size_t pairs = 0;
    const bool sane =
        plan->n_blocks == 0 || sa_mul((size_t)plan->n_maps, (size_t)job->count, &pairs);
    const int64_t n_tasks = (int64_t)pairs; /* none where there are no rows */
    job->row = sa_malloc_array((size_t)job->count + 1, 3 * sizeof *job->row);
    job->span = sane ? sa_malloc_array(pairs + 1, sizeof *job->span) : NULL;
    if (job->row == NULL || job->span == NULL) {
        return sa_fail(ctx, SA_ENOMEM, "no memory to pack %lld plans", (long long)job->count);
    }
    job->key = job->row + job->count + 1;
    job->block = job->key + job->count + 1;
    job->row[0] = job->key[0] = job->block[0] = job->span[0] = 0;
    for (int64_t s = 0; s < job->count; s++) {
        job->row[s + 1] = job->row[s] + job->plans[s]->n_q;
        job->key[s + 1] = job->key[s] + job->plans[s]->n_k;
        job->block[s + 1] = job->block[s] + job->plans[s]->n_blocks;
        fill_rows(job, s);
    }
    for (int64_t t = 0; t < n_tasks; t++) {
        const sa_plan *const from = job->plans[t % job->count];
        const int64_t x = source_map(job, t / job->count, t % job->count) * from->n_blocks;
        job->span[t + 1] = job->span[t] + from->row_ptr[x + from->n_blocks] - from->row_ptr[x];
    }
    plan->n_spans = plan->row_ptr[plan->n_maps * plan->n_blocks] = job->span[n_tasks];
    plan->start = sa_malloc_array((size_t)plan->n_spans, sizeof *plan->start);
    plan->len =
        plan->span_len == 0 ? sa_malloc_array((size_t)plan->n_spans, sizeof *plan->len) : NULL;
    if (plan->start == NULL || (plan->span_len == 0 && plan->len == NULL)) {
        return sa_fail(ctx, SA_ENOMEM, "no memory for the %lld spans of a plan",
                       (long long)plan->n_spans);
    }
    return sa_parallel(ctx, n_tasks, copy_task, job);
}

sa_status
sa_plan_pack(sa_ctx *ctx, const sa_plan *const *plans, int64_t count, sa_plan **result)
{
    packing job = {.plans = plans, .count = count};
    sa_plan sizes;
    *result = NULL;
    if (count < 1) {
        return sa_fail(ctx, SA_EINVAL, "there is no plan to pack; give at least one");
    }
    sa_status status = join_sizes(ctx, plans, count, &sizes);
    status = status ? status : sa_plan_new(ctx, &sizes, &job.plan);
    if (status != SA_OK) {
        return status;
    }
    status = fill(ctx, &job);
#ifndef NDEBUG
    status = status ? status : sa_plan_validate(ctx, job.plan);
#endif
    sa_free(job.row);
    sa_free(job.span);
    if (status != SA_OK) {
        sa_plan_free(job.plan);
        return status;
    }
    *result = job.plan;
    return SA_OK;
}
