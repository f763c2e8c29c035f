/* test_plan.c - what validation must refuse, and that no damage to a plan's numbers gets past it to
 * crash. */
#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/threads.h"
#include "check.h"
#include "trial.h"

enum { N = 200 };

static trial
causal_trial(sa_ctx *ctx)
{
    const trial_shape s = {.dtype = SA_F32,
                           .batch = 1,
                           .heads = 2,
                           .kv_heads = 1,
                           .n_q = N,
                           .n_k = N,
                           .dim = 8,
                           .dim_v = 8,
                           .causal = SA_CAUSAL_BOTTOM_RIGHT,
                           .scale = 0.3};
    return trial_make(ctx, &s);
}

/* Window with sinks and a global column: block 2, rows 128 to 191, has all three kinds of span. */
static sa_plan *
window_plan(sa_ctx *ctx, const trial *t)
{
    const sa_planner *planner = sa_planner_find("window");
    trial_opts opts = opts_of(planner);
    sa_plan *plan = NULL;
    *(int64_t *)opts_field(planner, &opts, "left") = 150;
    *(int64_t *)opts_field(planner, &opts, "sinks") = 2;
    *(sa_ints *)opts_field(planner, &opts, "globals") = (sa_ints){1, {150}};
    CHECK(sa_plan_build(ctx, &t->p, planner, &opts, &plan) == SA_OK, "%s", ctx->message);
    return plan;
}

static void
expect_refusal(const sa_plan *plan, const char *what)
{
    sa_ctx *ctx = sa_ctx_acquire();
    CHECK(sa_plan_validate(ctx, plan) == SA_EINVAL && ctx->message[0] != '\0', "accepted: %s",
          what);
    sa_ctx_release(ctx);
}

/* Sets one number, expects a refusal, sets it back. */
#define REFUSED(where, value)                                                                      \
    do {                                                                                           \
        const int64_t kept = (where);                                                              \
        (where) = (value);                                                                         \
        expect_refusal(p, #where " = " #value);                                                    \
        (where) = kept;                                                                            \
    } while (0)

static void
check_scalars(sa_plan *p)
{
    check_case("a plan whose scalars do not fit is refused");
    REFUSED(p->n_q, -1);
    REFUSED(p->n_q, N + 1000);
    REFUSED(p->n_q, INT64_MAX);
    REFUSED(p->n_k, N / 2);
    REFUSED(p->n_k, -1);
    REFUSED(p->n_blocks, p->n_blocks - 1);
    REFUSED(p->n_blocks, N + 1);
    REFUSED(p->n_maps, p->n_maps + 1);
    REFUSED(p->n_maps, INT64_MAX);
    REFUSED(p->heads, 0);
    REFUSED(p->heads, 3);
    REFUSED(p->heads_per_map, 0);
    REFUSED(p->heads_per_map, 5);
    REFUSED(p->rows_per_block, 0);
    REFUSED(p->rows_per_block, -64);
    REFUSED(p->rows_per_block, 1);
    REFUSED(p->see_maps, 0);
    REFUSED(p->see_maps, 7);
    REFUSED(p->band_maps, 9);
    REFUSED(p->batch, -1);
    REFUSED(p->batch, INT64_MAX);
    REFUSED(p->n_spans, p->n_spans + 1);
    REFUSED(p->n_spans, -1);
    sa_plan broken = *p;
    broken.see_lo = NULL;
    expect_refusal(&broken, "see_lo missing");
    broken = *p;
    broken.band_hi = NULL;
    expect_refusal(&broken, "band_hi missing");
    broken.band_lo = NULL;
    expect_refusal(&broken, "band spans without bands");
}

static void
check_numbers(sa_plan *p)
{
    const int64_t slot = 2, first = p->row_ptr[slot], see = p->see_ptr[slot],
                  band = p->band_ptr[slot];
    check_case("a plan whose numbers are wrong is refused");
    if (!CHECK(first < see && see < band && band < p->row_ptr[slot + 1],
               "block 2 should have all kinds")) {
        return;
    }
    REFUSED(p->start[first], -1);
    REFUSED(p->start[first], N);
    REFUSED(p->start[first], INT32_MIN);
    REFUSED(p->start[band], INT32_MAX);
    REFUSED(p->len[first], 0);
    REFUSED(p->len[first], -3);
    REFUSED(p->len[first], INT32_MAX);
    REFUSED(p->len[band], N);
    REFUSED(p->start[band], p->start[see]); /* a key in two spans */
    REFUSED(p->row_ptr[0], 1);
    REFUSED(p->row_ptr[slot], p->row_ptr[slot + 1] + 1);
    REFUSED(p->row_ptr[slot + 1], p->n_spans - 1);
    REFUSED(p->see_ptr[slot], first - 1);
    REFUSED(p->see_ptr[slot], INT64_MAX);
    REFUSED(p->band_ptr[slot], see - 1);
    REFUSED(p->row_start[0], 1);
    REFUSED(p->row_start[slot], -64);
    REFUSED(p->see_hi[N - 1], N + 1);
    REFUSED(p->see_lo[N - 1], -1);
    REFUSED(p->see_lo[3], p->see_hi[3] + 1);
    REFUSED(p->band_lo[5], -1);
    REFUSED(p->band_hi[5], N + 1);

    check_case("a full span that leaks is refused");
    const int32_t begin = p->row_start[slot];
    REFUSED(p->see_hi[begin], 1);       /* the first row of the block may not see its full span */
    REFUSED(p->see_lo[191], 191);       /* nor the last                                          */
    REFUSED(p->see_ptr[slot], see + 1); /* a clipped span taken for a full one */
    REFUSED(p->see_ptr[slot], band);    /* all of them                          */
    CHECK(p->n_spans > 0, "no spans");
}

static sa_status
attend_over(const trial *t, const sa_plan *plan, sa_view out, sa_view lse)
{
    sa_ctx *ctx = sa_ctx_acquire();
    const sa_part part = {plan, 0, t->p.heads};
    const sa_status status = sa_attend(ctx, out, lse, &t->p, &part, 1);
    sa_ctx_release(ctx);
    return status;
}

/* One number of the plan becomes another; what validation lets pass must run without reading or
 * writing out of bounds (which sanitizers see) and count what it shows. */
static void
damage_once(sa_ctx *ctx, const trial *t, sa_plan *p, sa_view out, sa_view lse, unsigned char *mask)
{
    const int64_t slots = p->n_maps * p->n_blocks;
    const struct {
        void *at;
        int64_t count;
        bool wide;
    } arrays[] = {{p->row_start, p->n_blocks, false},
                  {p->row_ptr, slots + 1, true},
                  {p->see_ptr, slots, true},
                  {p->band_ptr, slots, true},
                  {p->start, p->n_spans, false},
                  {p->len, p->n_spans, false},
                  {p->see_lo, N, false},
                  {p->see_hi, N, false},
                  {p->band_lo, N, false},
                  {p->band_hi, N, false}};
    const int which = (int)numbers_below(10);
    const int64_t i = numbers_below(arrays[which].count);
    const int64_t far[] = {-1, 0, INT32_MAX, INT32_MIN, N, N + 1, numbers_below(N), p->n_spans};
    const int64_t kept =
        arrays[which].wide ? ((int64_t *)arrays[which].at)[i] : ((int32_t *)arrays[which].at)[i];
    const int64_t value = numbers_below(3) ? kept + numbers_below(9) - 4 : far[numbers_below(8)];
    if (arrays[which].wide) {
        ((int64_t *)arrays[which].at)[i] = value;
    } else {
        ((int32_t *)arrays[which].at)[i] = (int32_t)value;
    }
    if (sa_plan_validate(ctx, p) == SA_OK) {
        sa_plan_counts counts;
        int64_t shown = 0;
        CHECK(attend_over(t, p, out, lse) == SA_OK, "array %d", which);
        CHECK(sa_plan_count(ctx, p, &t->p, &counts) == SA_OK, "array %d", which);
        for (int64_t h = 0; h < t->p.heads; h++) {
            CHECK(sa_plan_to_mask(ctx, p, &t->p, 0, h, mask) == SA_OK, "array %d", which);
            for (int64_t at = 0; at < (int64_t)N * N; at++) {
                shown += mask[at];
            }
        }
        CHECK(shown == counts.kept, "shows %lld, counts %lld", (long long)shown,
              (long long)counts.kept);
    }
    if (arrays[which].wide) {
        ((int64_t *)arrays[which].at)[i] = kept;
    } else {
        ((int32_t *)arrays[which].at)[i] = (int32_t)kept;
    }
}

static void
check_damage(sa_ctx *ctx, const trial *t, sa_plan *p)
{
    check_case("a damaged plan is refused, or safe to run");
    sa_view out = trial_output(t, t->p.dim_v), lse = trial_output(t, 1);
    unsigned char *mask = sa_malloc((size_t)N * N);
    for (int round = 0; round < 3000; round++) {
        damage_once(ctx, t, p, out, lse, mask);
    }
    CHECK(sa_plan_validate(ctx, p) == SA_OK, "the plan was put together again");
    sa_free(out.data);
    sa_free(lse.data);
    sa_free(mask);
}

static void
check_sizes(sa_ctx *ctx, const trial *t, const sa_plan *p)
{
    check_case("a plan for other sizes is refused");
    sa_view out = trial_output(t, t->p.dim_v), lse = trial_output(t, 1);
    trial other = *t;
    other.p.n_k = other.p.k.size[2] = other.p.v.size[2] = N - 1;
    CHECK(attend_over(&other, p, out, lse) == SA_EINVAL, "one key less");
    const sa_part half = {p, 0, 1};
    CHECK(sa_attend(ctx, out, lse, &t->p, &half, 1) == SA_EINVAL, "heads left out");
    sa_free(out.data);
    sa_free(lse.data);
}

void
sa_selftest_plan(void)
{
    sa_num_threads_set(2);
    sa_ctx *ctx = sa_ctx_acquire();
    check_case("a plan to damage");
    trial t = causal_trial(ctx);
    sa_plan *plan = window_plan(ctx, &t);
    if (plan != NULL) {
        check_scalars(plan);
        check_numbers(plan);
        check_damage(ctx, &t, plan);
        check_sizes(ctx, &t, plan);
    }
    sa_plan_free(plan);
    trial_free(&t);
    sa_ctx_release(ctx);
}
