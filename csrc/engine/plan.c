/* plan.c - a plan's memory, and the checks that make a plan from outside safe to run. */
#include "engine/plan.h"

#include <string.h>

#include "engine/plan_parts.h"

typedef long long ll;

void
sa_plan_free(sa_plan *plan)
{
    if (plan == NULL) {
        return;
    }
    sa_free(plan->row_start);
    sa_free(plan->row_ptr);
    sa_free(plan->see_ptr);
    sa_free(plan->band_ptr);
    sa_free(plan->start);
    sa_free(plan->len);
    sa_free(plan->see_lo);
    sa_free(plan->see_hi);
    sa_free(plan->band_lo);
    sa_free(plan->band_hi);
    sa_free(plan);
}

int64_t
sa_plan_bytes(const sa_plan *plan)
{
    const int64_t slots = plan->n_maps * plan->n_blocks;
    const int64_t rows =
        plan->see_maps * plan->n_q + (plan->band_lo ? plan->band_maps * plan->n_q : 0);
    const int64_t spans = plan->n_spans * (plan->len ? 2 : 1);
    return (int64_t)sizeof *plan + (3 * slots + 1) * (int64_t)sizeof(int64_t) +
           (plan->n_blocks + spans + 2 * rows) * (int64_t)sizeof(int32_t);
}

sa_status
sa_plan_fits(sa_ctx *ctx, const sa_plan *plan, const sa_problem *p)
{
    if (plan->batch == p->batch && plan->heads == p->heads && plan->n_q == p->n_q &&
        plan->n_k == p->n_k) {
        return SA_OK;
    }
    return sa_fail(ctx, SA_EINVAL,
                   "the plan is for (batch, heads, n_q, n_k) = (%lld, %lld, %lld, %lld), got "
                   "(%lld, %lld, %lld, %lld); "
                   "make one for these sizes",
                   (ll)plan->batch, (ll)plan->heads, (ll)plan->n_q, (ll)plan->n_k, (ll)p->batch,
                   (ll)p->heads, (ll)p->n_q, (ll)p->n_k);
}

sa_status
sa_plan_new(sa_ctx *ctx, const sa_plan *sizes, sa_plan **result)
{
    sa_plan *const plan = sa_malloc(sizeof *plan);
    if (plan == NULL) {
        return sa_fail(ctx, SA_ENOMEM, "no memory for a plan");
    }
    *plan = *sizes;
    if (sizes->n_blocks == 0) {
        plan->n_blocks = (plan->n_q + plan->rows_per_block - 1) / plan->rows_per_block;
    }
    plan->n_maps = (plan->per_batch ? plan->batch : 1) * (plan->heads / plan->heads_per_map);
    size_t slots = 0;
    const bool sane = sa_mul((size_t)plan->n_maps, (size_t)plan->n_blocks, &slots);
    const size_t see = (size_t)(plan->see_maps * plan->n_q),
                 band = (size_t)(plan->band_maps * plan->n_q);
    plan->row_start = sa_malloc_array((size_t)plan->n_blocks, sizeof *plan->row_start);
    plan->row_ptr = sane ? sa_malloc_array(slots + 1, sizeof *plan->row_ptr) : NULL;
    plan->see_ptr = sane ? sa_malloc_array(slots, sizeof *plan->see_ptr) : NULL;
    plan->band_ptr = sane ? sa_malloc_array(slots, sizeof *plan->band_ptr) : NULL;
    plan->see_lo = sa_malloc_array(see, sizeof *plan->see_lo);
    plan->see_hi = sa_malloc_array(see, sizeof *plan->see_hi);
    plan->band_lo = band ? sa_malloc_array(band, sizeof *plan->band_lo) : NULL;
    plan->band_hi = band ? sa_malloc_array(band, sizeof *plan->band_hi) : NULL;
    plan->start = plan->len = NULL;
    plan->n_spans = 0;
    if (!plan->row_start || !plan->row_ptr || !plan->see_ptr || !plan->band_ptr || !plan->see_lo ||
        !plan->see_hi || (band && (!plan->band_lo || !plan->band_hi))) {
        sa_plan_free(plan);
        return sa_fail(ctx, SA_ENOMEM, "no memory for a plan of %lld rows", (ll)sizes->n_q);
    }
    for (int64_t b = 0; sizes->n_blocks == 0 && b < plan->n_blocks; b++) {
        plan->row_start[b] = (int32_t)(b * plan->rows_per_block);
    }
    *result = plan;
    return SA_OK;
}

static sa_status
refuse(sa_ctx *ctx, const char *what)
{
    return sa_fail(
        ctx, SA_EINVAL,
        "the plan is not valid: %s; build it with plan() or give what Plan.arrays() gave", what);
}

static sa_status
refuse_at(sa_ctx *ctx, const char *what, int64_t at)
{
    return sa_fail(
        ctx, SA_EINVAL,
        "the plan is not valid: %s at %lld; build it with plan() or give what Plan.arrays() gave",
        what, (ll)at);
}

static sa_status
check_scalars(sa_ctx *ctx, const sa_plan *plan)
{
    if (plan->n_q < 0 || plan->n_q > SA_MAX_KEYS || plan->n_k < 0 || plan->n_k > SA_MAX_KEYS) {
        return refuse(ctx, "n_q and n_k must be in [0, 2^30]");
    }
    if (plan->batch < 0 || plan->heads < 1 || plan->heads_per_map < 1 ||
        plan->heads % plan->heads_per_map != 0) {
        return refuse(ctx, "heads_per_map must divide heads");
    }
    size_t maps, pairs;
    if (!sa_mul(plan->per_batch ? (size_t)plan->batch : 1,
                (size_t)(plan->heads / plan->heads_per_map), &maps) ||
        maps > INT64_MAX || plan->n_maps != (int64_t)maps) {
        return refuse(ctx,
                      "n_maps must be heads / heads_per_map, times batch where per_batch is set");
    }
    if (!sa_mul((size_t)SA_MAX(plan->batch, 1), (size_t)plan->heads, &pairs) ||
        !sa_mul(pairs, (size_t)SA_MAX(plan->n_q, 1), &pairs) ||
        !sa_mul(pairs, (size_t)SA_MAX(plan->n_k, 1), &pairs) || pairs > INT64_MAX / 8) {
        return refuse(ctx, "batch, heads, n_q and n_k are too large together");
    }
    if (plan->rows_per_block < 1 || plan->n_blocks > plan->n_q ||
        plan->n_blocks <
            plan->n_q / plan->rows_per_block + (plan->n_q % plan->rows_per_block != 0)) {
        return refuse(ctx, "n_blocks must be n_q / rows_per_block, rounded up, or up to n_q");
    }
    if ((plan->see_maps != 1 && plan->see_maps != plan->batch) || plan->see_maps < 1 ||
        plan->see_lo == NULL || plan->see_hi == NULL) {
        return refuse(ctx, "see_maps must be 1 or batch, and see_lo and see_hi must be there");
    }
    if ((plan->band_lo == NULL) != (plan->band_hi == NULL) ||
        (plan->band_lo != NULL && plan->band_maps != 1 && plan->band_maps != plan->n_maps)) {
        return refuse(ctx,
                      "band_maps must be 1 or n_maps, with both band_lo and band_hi or neither");
    }
    if (plan->n_spans < 0 || (plan->len == NULL && plan->span_len < 1)) {
        return refuse(ctx, "spans need lengths or a span_len of at least 1");
    }
    return SA_OK;
}

static sa_status
check_intervals(sa_ctx *ctx, const char *what, const int32_t *lo, const int32_t *hi, int64_t count,
                int64_t n_k)
{
    for (int64_t i = 0; i < count; i++) {
        if (lo[i] < 0 || lo[i] > hi[i] || hi[i] > n_k) {
            return refuse_at(ctx, what, i);
        }
    }
    return SA_OK;
}

static sa_status
check_pointers(sa_ctx *ctx, const sa_plan *plan)
{
    const int64_t slots = plan->n_maps * plan->n_blocks;
    for (int64_t b = 0; b < plan->n_blocks; b++) {
        const int64_t start = plan->row_start[b], rows = sa_plan_block_end(plan, b) - start;
        if ((b == 0 && start != 0) || rows < 1 || rows > plan->rows_per_block) {
            return refuse_at(ctx,
                             "row_start must begin at 0 and count up by 1 to rows_per_block; it "
                             "does not",
                             b);
        }
    }
    if (plan->row_ptr[0] != 0 || plan->row_ptr[slots] != plan->n_spans) {
        return refuse(ctx, "row_ptr must go from 0 to n_spans");
    }
    for (int64_t x = 0; x < slots; x++) {
        if (plan->row_ptr[x] > plan->see_ptr[x] || plan->see_ptr[x] > plan->band_ptr[x] ||
            plan->band_ptr[x] > plan->row_ptr[x + 1]) {
            return refuse_at(ctx, "row_ptr, see_ptr, band_ptr decrease", x);
        }
        if (plan->band_ptr[x] < plan->row_ptr[x + 1] && plan->band_lo == NULL) {
            return refuse_at(ctx, "band spans without band_lo and band_hi", x);
        }
    }
    return SA_OK;
}

/* Largest see_lo and smallest see_hi of a block's rows, over all batches that share map m. */
static void
common_sight(const sa_plan *plan, int64_t m, int64_t block, int64_t *lo, int64_t *hi)
{
    const int64_t maps = plan->heads / plan->heads_per_map;
    const int64_t batch = plan->per_batch && plan->see_maps > 1 ? m / maps : 0;
    const int64_t last = plan->per_batch && plan->see_maps > 1 ? batch + 1 : plan->see_maps;
    const int64_t begin = plan->row_start[block], end = sa_plan_block_end(plan, block);
    *lo = 0;
    *hi = plan->n_k;
    for (int64_t b = batch; b < last; b++) {
        for (int64_t i = begin; i < end; i++) {
            *lo = SA_MAX(*lo, plan->see_lo[b * plan->n_q + i]);
            *hi = SA_MIN(*hi, plan->see_hi[b * plan->n_q + i]);
        }
    }
}

/* The spans of one row block: in range, full ones seen by all rows, and disjoint, which a merge of
 * the three ascending lists shows. */
static sa_status
check_block(sa_ctx *ctx, const sa_plan *plan, int64_t slot, int64_t lo, int64_t hi)
{
    int64_t next[3] = {plan->row_ptr[slot], plan->see_ptr[slot], plan->band_ptr[slot]};
    const int64_t end[3] = {next[1], next[2], plan->row_ptr[slot + 1]};
    int64_t covered = 0, kind_covered[3] = {0};
    for (;;) {
        int kind = -1;
        for (int x = 0; x < 3; x++) {
            if (next[x] < end[x] && (kind < 0 || plan->start[next[x]] < plan->start[next[kind]])) {
                kind = x;
            }
        }
        if (kind < 0) {
            return SA_OK;
        }
        const int64_t s = next[kind]++, start = plan->start[s];
        if (start < 0 || start >= plan->n_k) {
            return refuse_at(ctx, "a span starts outside the keys,", s);
        }
        const int64_t stop = start + sa_plan_span_len(plan, s);
        if (stop <= start || stop > plan->n_k) {
            return refuse_at(ctx, "a span is empty or ends outside the keys,", s);
        }
        if (start < kind_covered[kind]) {
            return refuse_at(ctx, "the spans of a row block are not in ascending order,", s);
        }
        if (start < covered) {
            return refuse_at(ctx, "a key stands in two spans of a row block,", s);
        }
        if (kind == SA_SPAN_FULL && (start < lo || stop > hi)) {
            return refuse_at(ctx, "a full span holds keys that some row of its block may not see,",
                             s);
        }
        covered = kind_covered[kind] = stop;
    }
}

sa_status
sa_plan_validate(sa_ctx *ctx, const sa_plan *plan)
{
    sa_status status = check_scalars(ctx, plan);
    if (status != SA_OK) {
        return status;
    }
    status =
        check_intervals(ctx, "see_lo and see_hi must satisfy 0 <= lo <= hi <= n_k; they do not",
                        plan->see_lo, plan->see_hi, plan->see_maps * plan->n_q, plan->n_k);
    if (status == SA_OK && plan->band_lo != NULL) {
        status = check_intervals(
            ctx, "band_lo and band_hi must satisfy 0 <= lo <= hi <= n_k; they do not",
            plan->band_lo, plan->band_hi, plan->band_maps * plan->n_q, plan->n_k);
    }
    status = status ? status : check_pointers(ctx, plan);
    for (int64_t slot = 0; status == SA_OK && slot < plan->n_maps * plan->n_blocks; slot++) {
        int64_t lo = 0, hi = plan->n_k;
        if (plan->row_ptr[slot] < plan->see_ptr[slot]) {
            common_sight(plan, slot / plan->n_blocks, slot % plan->n_blocks, &lo, &hi);
        }
        status = check_block(ctx, plan, slot, lo, hi);
    }
    return status;
}
