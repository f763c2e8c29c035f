/* fuzz_intervals.c - lists of intervals from outside, and packed calls of them: a plan that is made
 * is valid and shows what the intervals say, no more and no less. */
#include "base/threads.h"
#include "bytes.h"
#include "engine/plan.h"
#include "engine/planner.h"

enum { MOST = 512, COPIES = 3 };

static int64_t *
numbers(bytes *b, int64_t count)
{
    int64_t *const made = malloc((size_t)SA_MAX(count, 1) * sizeof *made);
    EXPECT(made != NULL);
    for (int64_t x = 0; x < count; x++) {
        made[x] = take_number(b);
    }
    return made;
}

/* Row by row, what the intervals say; rows and keys of a copy follow those of the one before. */
static void
expect_shown(sa_ctx *ctx, const sa_plan *plan, const sa_problem *p, const int64_t *lo,
             const int64_t *hi, int64_t maps, int64_t copies)
{
    const int64_t n_q = p->n_q * copies, n_k = p->n_k * copies;
    sa_problem whole = *p;
    whole.n_q = n_q;
    whole.n_k = n_k;
    EXPECT(sa_plan_validate(ctx, plan) == SA_OK);
    EXPECT(plan->n_q == n_q && plan->n_k == n_k && plan->batch == p->batch);
    if ((p->batch + 1) * (n_q + 1) * (n_k + 1) > 1 << 15) {
        return;
    }
    unsigned char *const mask = malloc((size_t)(n_q * n_k) + 1);
    EXPECT(mask != NULL);
    for (int64_t b = 0; b < p->batch; b++) {
        const int64_t at = maps > 1 ? b * p->n_q : 0;
        EXPECT(sa_plan_to_mask(ctx, plan, &whole, b, p->heads - 1, mask) == SA_OK);
        for (int64_t x = 0; x < n_q * n_k; x++) {
            const int64_t i = x / n_k % p->n_q, j = x % n_k % p->n_k;
            const bool own = x / n_k / p->n_q == x % n_k / p->n_k;
            EXPECT(mask[x] == (own && lo[at + i] <= j && j < hi[at + i]));
        }
    }
    free(mask);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    bytes b = {data, size};
    sa_num_threads_set(1);
    sa_problem p = {.batch = take_number(&b),
                    .heads = 1 + take_below(&b, 3),
                    .kv_heads = 1,
                    .n_q = take_number(&b),
                    .n_k = take_number(&b)};
    const int64_t maps = take_number(&b), copies = 1 + take_below(&b, COPIES - 1);
    size_t count;
    if (maps < 0 || p.n_q < 0 || !sa_mul((size_t)SA_MAX(maps, 1), (size_t)p.n_q, &count) ||
        count > MOST) {
        return 0; /* no arrays of that length */
    }
    count = (size_t)(maps * p.n_q);
    int64_t *const lo = numbers(&b, (int64_t)count), *const hi = numbers(&b, (int64_t)count);
    sa_ctx *const ctx = sa_ctx_acquire();
    EXPECT(ctx != NULL);
    sa_plan *plan = NULL, *packed = NULL;
    const sa_status status = sa_plan_from_intervals(ctx, &p, maps, lo, hi, &plan);
    EXPECT((status == SA_OK) == (plan != NULL) && (status == SA_OK || ctx->message[0] != '\0'));
    if (status == SA_OK) {
        const sa_plan *const parts[COPIES] = {plan, plan, plan};
        expect_shown(ctx, plan, &p, lo, hi, maps, 1);
        if (sa_plan_pack(ctx, parts, copies, &packed) == SA_OK) {
            expect_shown(ctx, packed, &p, lo, hi, maps, copies);
        }
    }
    sa_plan_free(packed);
    sa_plan_free(plan);
    sa_ctx_release(ctx);
    free(lo);
    free(hi);
    return 0;
}
