/* test_pack.c - plans of packed sequences and of intervals, as sanitizers see them. */
#include <string.h>

#include "base/alloc.h"
#include "base/threads.h"
#include "check.h"
#include "trial.h"

enum { MOST = 5 };

/* Sequences of one trial: where they begin, and the plan of each. */
typedef struct {
    trial t;
    int64_t count, row[MOST + 1], key[MOST + 1];
    sa_plan *plan[MOST];
} packing;

static sa_view
cut(sa_view v, int axis, int64_t begin, int64_t end)
{
    if (v.data != NULL) {
        v.data = (char *)v.data + begin * v.stride[axis] * (int64_t)sa_dtype_size(v.dtype);
        v.size[axis] = end - begin;
    }
    return v;
}

static sa_problem
sequence(const packing *x, int64_t s)
{
    sa_problem p = x->t.p;
    const int64_t row = x->row[s], rows = x->row[s + 1], key = x->key[s], keys = x->key[s + 1];
    p.q = cut(p.q, 2, row, rows);
    p.k = cut(p.k, 2, key, keys);
    p.v = cut(p.v, 2, key, keys);
    p.mask = cut(cut(p.mask, 2, row, rows), 3, key, keys);
    p.bias = cut(cut(p.bias, 2, row, rows), 3, key, keys);
    p.key_mask = cut(p.key_mask, 3, key, keys);
    return p;
}

static void
plan_sequence(sa_ctx *ctx, packing *x, int64_t s, const char *variant)
{
    const sa_planner *planner = sa_planner_find(variant);
    trial_opts opts = opts_of(planner);
    sa_problem p = sequence(x, s);
    if (strcmp(variant, "window") == 0) {
        *(int64_t *)opts_field(planner, &opts, "left") = numbers_below(40);
        *(int64_t *)opts_field(planner, &opts, "sinks") = numbers_below(3);
    } else if (strcmp(variant, "prefix") == 0) {
        *(int64_t *)opts_field(planner, &opts, "n") = numbers_below(90);
    } else if (strcmp(variant, "dense") != 0) {
        *(int64_t *)opts_field(planner, &opts, "k") = 1 + numbers_below(20);
    }
    sa_status status = sa_problem_check(ctx, &p);
    status = status ? status : sa_plan_build(ctx, &p, planner, &opts, &x->plan[s]);
    CHECK(status == SA_OK, "%s: %s", variant, ctx->message);
}

static packing
make(sa_ctx *ctx)
{
    static const char *const variants[] = {"dense", "window", "prefix", "topk", "random"};
    packing x = {.count = 1 + numbers_below(MOST)};
    trial_shape s = trial_random_shape();
    for (int64_t i = 0; i < x.count; i++) {
        x.row[i + 1] = x.row[i] + numbers_below(4) * numbers_below(50);
        x.key[i + 1] = x.key[i] + numbers_below(4) * numbers_below(50);
    }
    s.n_q = x.row[x.count] += 1; /* trials have rows and keys */
    s.n_k = x.key[x.count] += 1;
    x.t = trial_make(ctx, &s);
    for (int64_t i = 0; i < x.count; i++) {
        plan_sequence(ctx, &x, i, variants[numbers_below(5)]);
    }
    return x;
}

static void
drop(packing *x)
{
    for (int64_t s = 0; s < x->count; s++) {
        sa_plan_free(x->plan[s]);
    }
    trial_free(&x->t);
}

/* Whether the packed plan shows what the sequences' plans show, and nothing else. */
static void
check_shown(sa_ctx *ctx, const packing *x, const sa_plan *plan)
{
    const sa_problem *const p = &x->t.p;
    unsigned char *const whole = sa_malloc((size_t)(p->n_q * p->n_k));
    unsigned char *const own = sa_malloc((size_t)(p->n_q * p->n_k));
    for (int64_t m = 0; m < p->batch * p->heads; m++) {
        const int64_t b = m / p->heads, h = m % p->heads;
        sa_status status = sa_plan_to_mask(ctx, plan, p, b, h, whole);
        int64_t shown = 0, wanted = 0;
        for (int64_t at = 0; at < p->n_q * p->n_k; at++) {
            shown += whole[at];
        }
        for (int64_t s = 0; s < x->count && status == SA_OK; s++) {
            const sa_problem one = sequence(x, s);
            sa_problem sized = one;
            status = sa_problem_check(ctx, &sized);
            status = status ? status : sa_plan_to_mask(ctx, x->plan[s], &sized, b, h, own);
            for (int64_t i = 0; status == SA_OK && i < sized.n_q; i++) {
                const unsigned char *row = whole + (x->row[s] + i) * p->n_k + x->key[s];
                for (int64_t j = 0; j < sized.n_k; j++) {
                    wanted += own[i * sized.n_k + j];
                    CHECK(row[j] == own[i * sized.n_k + j], "sequence %d, row %d, key %d", (int)s,
                          (int)i, (int)j);
                }
            }
        }
        CHECK(status == SA_OK && shown == wanted, "shows %d, wanted %d: %s", (int)shown,
              (int)wanted, ctx->message);
    }
    sa_free(whole);
    sa_free(own);
}

static void
check_packed(sa_ctx *ctx)
{
    packing x = make(ctx);
    sa_view out = trial_output(&x.t, x.t.p.dim_v), lse = trial_output(&x.t, 1);
    sa_plan *plan = NULL;
    sa_plan_counts counts;
    sa_status status = sa_plan_pack(ctx, (const sa_plan *const *)x.plan, x.count, &plan);
    CHECK(status == SA_OK, "%s", ctx->message);
    if (status == SA_OK) {
        const sa_part part = {plan, 0, x.t.p.heads};
        CHECK(sa_plan_validate(ctx, plan) == SA_OK, "%s", ctx->message);
        CHECK(sa_plan_count(ctx, plan, &x.t.p, &counts) == SA_OK, "%s", ctx->message);
        CHECK(sa_attend(ctx, out, lse, &x.t.p, &part, 1) == SA_OK, "%s", ctx->message);
        check_shown(ctx, &x, plan);
    }
    sa_plan_free(plan);
    sa_free(out.data);
    sa_free(lse.data);
    drop(&x);
}

/* Intervals in any order; what is out of range is refused. */
static void
check_intervals(sa_ctx *ctx)
{
    const int64_t n_q = numbers_below(200), n_k = numbers_below(200), batch = 1 + numbers_below(3);
    const int64_t maps = numbers_below(2) ? batch : 1;
    const sa_problem p = {.batch = batch, .heads = 2, .kv_heads = 1, .n_q = n_q, .n_k = n_k};
    int64_t *const lo = sa_malloc_array((size_t)(maps * n_q), sizeof *lo);
    int64_t *const hi = sa_malloc_array((size_t)(maps * n_q), sizeof *hi);
    sa_plan *plan = NULL;
    sa_plan_counts counts = {0};
    int64_t total = 0;
    for (int64_t i = 0; i < maps * n_q; i++) {
        lo[i] = numbers_below(n_k + 1);
        hi[i] = lo[i] + numbers_below(n_k - lo[i] + 1);
        total += hi[i] - lo[i];
    }
    CHECK(sa_plan_from_intervals(ctx, &p, maps, lo, hi, &plan) == SA_OK, "%s", ctx->message);
    CHECK(sa_plan_validate(ctx, plan) == SA_OK, "%s", ctx->message);
    CHECK(sa_plan_count(ctx, plan, &p, &counts) == SA_OK, "%s", ctx->message);
    CHECK(counts.kept == 2 * total * (batch / maps), "counts %d", (int)counts.kept);
    sa_plan_free(plan);
    sa_ctx *const other = sa_ctx_acquire();
    if (maps * n_q > 0) {
        const int64_t at = numbers_below(maps * n_q);
        const int64_t wrong[][2] = {{-1, 0}, {1, 0}, {0, n_k + 1}, {INT64_MIN, INT64_MAX}};
        const int64_t *const pair = wrong[numbers_below(4)];
        lo[at] = pair[0];
        hi[at] = pair[1];
        CHECK(sa_plan_from_intervals(other, &p, maps, lo, hi, &plan) == SA_EINVAL, "accepted");
    }
    sa_ctx_release(other);
    sa_free(lo);
    sa_free(hi);
}

/* Each allocation of a pack fails in turn. */
static void
check_failures(sa_ctx *ctx)
{
    packing x = make(ctx);
    sa_status status = SA_ENOMEM;
    for (int nth = 1; status != SA_OK && nth < 100; nth++) {
        sa_ctx *const own = sa_ctx_acquire();
        const int64_t before = sa_live_bytes();
        sa_plan *plan = NULL;
        sa_fail_set(nth);
        status = sa_plan_pack(own, (const sa_plan *const *)x.plan, x.count, &plan);
        sa_fail_set(0);
        CHECK(status == SA_OK || (status == SA_ENOMEM && plan == NULL), "allocation %d", nth);
        sa_plan_free(plan);
        CHECK(sa_live_bytes() == before, "allocation %d leaves something", nth);
        sa_ctx_release(own);
    }
    CHECK(status == SA_OK, "never enough memory");
    drop(&x);
}

void
sa_selftest_pack(void)
{
    sa_num_threads_set(2);
    sa_ctx *ctx = sa_ctx_acquire();
    check_case("sequences of any length and variant pack into one plan");
    for (int round = 0; round < 40; round++) {
        check_packed(ctx);
    }
    check_case("intervals in any order are a plan, or are refused");
    for (int round = 0; round < 100; round++) {
        check_intervals(ctx);
    }
    check_case("a pack gives back all memory when one allocation fails");
    check_failures(ctx);
    sa_ctx_release(ctx);
}
