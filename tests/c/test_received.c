/* test_received.c - mass of keys and largest weights of rows against double loops. */
#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/threads.h"
#include "check.h"
#include "engine/received.h"
#include "reals.h"
#include "trial.h"

enum { KINDS = 5, TRIALS = 12 };
static const char *const kinds[KINDS] = {"dense", "window", "topk", "random", "mask"};

/* ---- the functions of tiles ---- */

static void
check_tile(const sa_tile *t)
{
    enum { KEYS = 61 };
    const int wide = t->strip_max, w = wide + t->lanes;
    void *const s = real_random(t, KEYS * w, 4), *const lse = real_random(t, w, 2);
    void *const sum = real_random(t, KEYS * t->lanes, 1);
    void *const before = real_copy(t, sum, KEYS * t->lanes);
    void *const peak = real_array(t, KEYS * w);
    check_case("%s: sums of weights, and peaks", table_name(t));
    for (int given = 0; given < 2; given++) { /* weights, then scores and lse */
        t->received(sum, s, w, wide, KEYS, given ? lse : NULL);
        for (int j = 0; j < KEYS; j++) {
            double want = 0, got = 0;
            for (int r = 0; r < wide; r++) {
                const double x = real_get(t, s, j * w + r);
                want += given ? exp(x - real_get(t, lse, r)) : x;
            }
            for (int i = 0; i < t->lanes; i++) {
                const int at = j * t->lanes + i;
                got += real_get(t, sum, at) - real_get(t, before, at);
                real_put(t, sum, at, real_get(t, before, at));
            }
            CHECK(check_near(got, want, 300 * wide * real_eps(t)), "key %d: %g, not %g", j, got,
                  want);
        }
        real_put(t, s, 5 * w, -INFINITY);
    }
    t->peaks(peak, s, w, wide, KEYS);
    for (int j0 = 0; j0 < KEYS; j0 += SA_PEAK_KEYS) {
        for (int r = 0; r < w; r++) {
            const int at = j0 / SA_PEAK_KEYS * w + r;
            double high = -INFINITY;
            for (int j = j0; j < SA_MIN(j0 + SA_PEAK_KEYS, KEYS); j++) {
                high = fmax(high, real_get(t, s, j * w + r));
            }
            CHECK(r < wide ? real_get(t, peak, at) == high : real_untouched(t, peak, at),
                  "group of key %d, column %d", j0, r);
        }
    }
    void *const all[] = {s, lse, sum, before, peak};
    for (int i = 0; i < 5; i++) {
        sa_free(all[i]);
    }
}

/* ---- whole calls ---- */

static sa_plan *
draw_plan(sa_ctx *ctx, const trial *t, int kind)
{
    const sa_planner *const planner = sa_planner_find(kinds[kind]);
    sa_plan *plan = NULL;
    sa_status status;
    if (planner == NULL) { /* "mask" */
        status = sa_plan_from_mask(ctx, &t->p, &plan);
    } else {
        trial_opts opts = opts_of(planner);
        if (kind == 1) {
            *(int64_t *)opts_field(planner, &opts, "left") = numbers_below(90);
            *(int64_t *)opts_field(planner, &opts, "right") = numbers_below(90) - 1;
            *(int64_t *)opts_field(planner, &opts, "sinks") = numbers_below(3);
        } else if (kind > 1) {
            *(int64_t *)opts_field(planner, &opts, "k") = 1 + numbers_below(40);
        }
        status = sa_plan_build(ctx, &t->p, planner, &opts, &plan);
    }
    CHECK(status == SA_OK, "%s: %s", trial_name(&t->shape), ctx->message);
    return plan;
}

/* What both calls give; n weights a row. */
typedef struct {
    sa_view mass, value, index;
} answer;

static sa_view
array(sa_dtype dtype, int64_t a, int64_t b, int64_t c, int64_t d)
{
    sa_view v = {NULL, dtype, {a, b, c, d}, {b * c * d, c * d, d, 1}};
    v.data = sa_malloc_array((size_t)(a * b * c * d), sa_dtype_size(dtype));
    return v;
}

static answer
run(const trial *t, const sa_plan *plan, sa_view lse, int64_t n, int threads)
{
    const sa_problem *const p = &t->p;
    const sa_part part = {plan, 0, p->heads};
    const answer a = {array(lse.dtype, p->batch, p->heads, p->n_k, 1),
                      array(lse.dtype, p->batch, p->heads, p->n_q, n),
                      array(SA_I64, p->batch, p->heads, p->n_q, n)};
    sa_num_threads_set(threads);
    sa_ctx *const ctx = sa_ctx_acquire();
    CHECK(sa_received(ctx, a.mass, lse, p, &part, 1) == SA_OK, "%s", ctx->message);
    CHECK(sa_topn(ctx, a.value, a.index, lse, p, &part, 1) == SA_OK, "%s", ctx->message);
    sa_ctx_release(ctx);
    return a;
}

static void
free_answer(answer *a)
{
    sa_free(a->mass.data);
    sa_free(a->value.data);
    sa_free(a->index.data);
}

static bool
same_bits(sa_view x, sa_view y)
{
    const int64_t n = x.size[0] * x.size[1] * x.size[2] * x.size[3];
    return memcmp(x.data, y.data, (size_t)n * sa_dtype_size(x.dtype)) == 0;
}

static double
tolerance(const trial *t)
{
    const double eps = t->p.q.dtype == SA_F64 ? 0x1p-52 : 0x1p-23;
    return eps * (20 + 6 * (double)t->p.dim);
}

/* Entries of one row: seen keys, each once, downwards, no better key left out. */
static void
check_row(const trial *t, const answer *a, sa_view lse, int64_t b, int64_t h, int64_t i,
          const unsigned char *seen)
{
    const int64_t n = a->value.size[3];
    const int64_t *const key = sa_view_row(a->index, b, h, i);
    unsigned char *const left = sa_malloc((size_t)t->p.n_k);
    int64_t count = 0, listed = 0;
    double worst = INFINITY, best = -INFINITY;
    for (int64_t j = 0; j < t->p.n_k; j++) {
        left[j] = seen[j];
        count += seen[j];
    }
    for (int64_t x = 0; x < n; x++) {
        const double got = trial_get(a->value, b, h, i, x);
        const double last = x > 0 ? trial_get(a->value, b, h, i, x - 1) : INFINITY;
        if (key[x] < 0) {
            CHECK(got == 0 && key[x] == -1, "%s: past the end", trial_name(&t->shape));
            continue;
        }
        CHECK(listed == x && left[key[x]], "%s: row %d lists key %d", trial_name(&t->shape), (int)i,
              (int)key[x]);
        const double score = trial_score(t, b, h, i, key[x]);
        const double want = exp(score - trial_get(lse, b, h, i, 0));
        CHECK(check_near(got, want, tolerance(t)), "%s: row %d, key %d: %g, not %g",
              trial_name(&t->shape), (int)i, (int)key[x], got, want);
        CHECK(last > got || (last == got && key[x] > key[x - 1]), "%s: row %d is not in order",
              trial_name(&t->shape), (int)i);
        left[key[x]] = 0;
        worst = fmin(worst, score);
        listed++;
    }
    for (int64_t j = 0; j < t->p.n_k; j++) {
        best = left[j] ? fmax(best, trial_score(t, b, h, i, j)) : best;
    }
    CHECK(listed == SA_MIN(n, count), "%s: row %d has %d entries of %d", trial_name(&t->shape),
          (int)i, (int)listed, (int)count);
    CHECK(worst >= best - tolerance(t), "%s: row %d lists %g and leaves out %g",
          trial_name(&t->shape), (int)i, worst, best);
    sa_free(left);
}

static void
check_head(const trial *t, const answer *a, sa_view lse, int64_t b, int64_t h,
           const unsigned char *mask)
{
    const sa_problem *const p = &t->p;
    for (int64_t i = 0; i < p->n_q; i++) {
        check_row(t, a, lse, b, h, i, mask + i * p->n_k);
    }
    for (int64_t j = 0; j < p->n_k; j++) {
        double want = 0;
        for (int64_t i = 0; i < p->n_q; i++) {
            want += mask[i * p->n_k + j]
                        ? exp(trial_score(t, b, h, i, j) - trial_get(lse, b, h, i, 0))
                        : 0;
        }
        const double got = trial_get(a->mass, b, h, j, 0);
        CHECK(check_near(got, want, tolerance(t) * (1 + want)), "%s: mass of key %d: %g, not %g",
              trial_name(&t->shape), (int)j, got, want);
    }
}

/* NaN goes to every key that no row sees. */
static void
spoil_unseen(const trial *t, const sa_plan *plan, sa_ctx *ctx)
{
    const sa_problem *const p = &t->p;
    const int64_t group = p->heads / p->kv_heads;
    unsigned char *const mask = sa_malloc((size_t)(p->n_q * p->n_k));
    for (int64_t at = 0; at < p->batch * p->kv_heads; at++) {
        for (int64_t j = 0; j < p->n_k; j++) {
            bool seen = false;
            for (int64_t h = 0; h < group; h++) {
                const int64_t head = at % p->kv_heads * group + h;
                if (j == 0 || group > 1) {
                    sa_plan_to_mask(ctx, plan, p, at / p->kv_heads, head, mask);
                }
                for (int64_t i = 0; i < p->n_q; i++) {
                    seen |= mask[i * p->n_k + j];
                }
            }
            for (int64_t c = 0; !seen && c < p->dim; c++) {
                trial_put(p->k, at / p->kv_heads, at % p->kv_heads, j, c, NAN);
            }
        }
    }
    sa_free(mask);
}

static void
check_trial(const trial *t, int kind, int64_t n)
{
    sa_ctx *const ctx = sa_ctx_acquire();
    sa_plan *const plan = draw_plan(ctx, t, kind);
    const sa_part part = {plan, 0, t->p.heads};
    sa_view out = trial_output(t, t->p.dim_v), lse = trial_output(t, 1);
    unsigned char *const mask = sa_malloc((size_t)(t->p.n_q * t->p.n_k));
    CHECK(sa_attend(ctx, out, lse, &t->p, &part, 1) == SA_OK, "%s", ctx->message);
    answer a = run(t, plan, lse, n, 1), b = run(t, plan, lse, n, 3);
    for (int64_t at = 0; at < t->p.batch * t->p.heads; at++) {
        sa_plan_to_mask(ctx, plan, &t->p, at / t->p.heads, at % t->p.heads, mask);
        check_head(t, &a, lse, at / t->p.heads, at % t->p.heads, mask);
    }
    CHECK(same_bits(a.mass, b.mass) && same_bits(a.value, b.value) && same_bits(a.index, b.index),
          "%s: three threads differ", trial_name(&t->shape));
    free_answer(&b);
    spoil_unseen(t, plan, ctx);
    b = run(t, plan, lse, n, 2);
    CHECK(same_bits(a.mass, b.mass) && same_bits(a.value, b.value) && same_bits(a.index, b.index),
          "%s: %s reads unseen keys", trial_name(&t->shape), kinds[kind]);
    free_answer(&a);
    free_answer(&b);
    sa_free(out.data);
    sa_free(lse.data);
    sa_free(mask);
    sa_plan_free(plan);
    sa_ctx_release(ctx);
}

/* Few keys under many rows, and the other way round: pieces of rows, long runs of keys. */
static void
check_long(sa_dtype dtype, int64_t n_q, int64_t n_k)
{
    trial_shape s = {.dtype = dtype,
                     .batch = 1,
                     .heads = 1,
                     .kv_heads = 1,
                     .n_q = n_q,
                     .n_k = n_k,
                     .dim = 5,
                     .dim_v = 1,
                     .causal = SA_CAUSAL_BOTTOM_RIGHT,
                     .scale = 0.5};
    sa_ctx *const ctx = sa_ctx_acquire();
    trial t = trial_make(ctx, &s);
    check_trial(&t, 0, 7);
    check_trial(&t, 2, 7);
    trial_free(&t);
    sa_ctx_release(ctx);
}

static void
check_trials(int kind, const char *isa)
{
    check_case("mass and largest weights of %s plans, %s", kinds[kind], isa);
    for (int x = 0; x < TRIALS; x++) {
        sa_ctx *const ctx = sa_ctx_acquire();
        trial_shape shape = trial_random_shape();
        shape.mask = shape.mask || kind == KINDS - 1; /* "mask" is made of one */
        trial t = trial_make(ctx, &shape);
        check_trial(&t, kind, 1 + numbers_below(30));
        trial_free(&t);
        sa_ctx_release(ctx);
    }
}

void
sa_selftest_received(void)
{
    const sa_isa best = sa_isa_now();
    const int threads = sa_num_threads();
    each_table(check_tile);
    for (int isa = 0; isa < SA_ISA_COUNT; isa++) {
        for (int kind = 0; sa_isa_set((sa_isa)isa) && kind < KINDS; kind++) {
            check_trials(kind, sa_isa_name((sa_isa)isa));
        }
    }
    sa_isa_set(best);
    check_case("mass and largest weights of long and of wide calls");
    check_long(SA_F32, 9000, 40);
    check_long(SA_F32, 1, 9001);
    check_long(SA_F64, 2, 5000);
    sa_num_threads_set(threads);
}
