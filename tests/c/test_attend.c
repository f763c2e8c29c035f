/* test_attend.c - plans and attention over them against double loops. */
#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/threads.h"
#include "check.h"
#include "engine/score.h"
#include "reals.h"
#include "trial.h"

enum { VARIANTS = 6 };
static const char *const variants[VARIANTS] = {"dense", "window", "blockmask",
                                               "topk",  "random", "mask"};

/* A random plan of each kind, and how many keys a row may keep at most (-1: not said). */
typedef struct {
    sa_plan *plan;
    sa_view layout;
    void *memory;
    trial_opts opts;
    const sa_planner *planner;
    int64_t k;
} drawing;

static void
make_layout(drawing *d, const trial *t)
{
    const int64_t block = (const int64_t[]){1, 7, 16, 64}[numbers_below(4)];
    const int64_t rows = (t->p.n_q + block - 1) / block, cols = (t->p.n_k + block - 1) / block;
    unsigned char *bits = d->memory = sa_malloc((size_t)(rows * cols));
    for (int64_t i = 0; i < rows * cols; i++) {
        bits[i] = numbers_below(2);
    }
    d->layout = (sa_view){bits, SA_BOOL, {1, 1, rows, cols}, {rows * cols, rows * cols, cols, 1}};
    *(int64_t *)opts_field(d->planner, &d->opts, "block") = block;
    *(sa_view *)opts_field(d->planner, &d->opts, "layout") = d->layout;
}

static drawing
draw_plan(sa_ctx *ctx, const trial *t, int variant)
{
    drawing d = {.planner = sa_planner_find(variants[variant]), .k = -1};
    sa_status status;
    if (d.planner == NULL) { /* "mask" */
        status = sa_plan_from_mask(ctx, &t->p, &d.plan);
        CHECK(status == SA_OK, "%s: %s", trial_name(&t->shape), ctx->message);
        return d;
    }
    d.opts = opts_of(d.planner);
    if (variant == 1) {
        *(int64_t *)opts_field(d.planner, &d.opts, "left") = numbers_below(90) - 1;
        *(int64_t *)opts_field(d.planner, &d.opts, "right") = numbers_below(90) - 1;
        *(int64_t *)opts_field(d.planner, &d.opts, "sinks") = numbers_below(3) * 2;
        *(sa_ints *)opts_field(d.planner, &d.opts, "globals") = (sa_ints){2, {70, 9}};
    } else if (variant == 2) {
        make_layout(&d, t);
    } else if (variant > 2) {
        d.k = 1 + numbers_below(20);
        *(int64_t *)opts_field(d.planner, &d.opts, "k") = d.k;
    }
    status = sa_plan_build(ctx, &t->p, d.planner, &d.opts, &d.plan);
    CHECK(status == SA_OK, "%s: %s", trial_name(&t->shape), ctx->message);
    return d;
}

static void
free_drawing(drawing *d)
{
    sa_plan_free(d->plan);
    sa_free(d->memory);
}

/* Whether the pattern itself shows key j to row i: the variant's definition, once more. */
static bool
pattern_shows(const drawing *d, const trial *t, int variant, int64_t i, int64_t j)
{
    trial_opts opts = d->opts;
    if (variant == 1) {
        const int64_t at = i + (t->p.causal == SA_CAUSAL_TOP_LEFT ? 0 : t->p.n_k - t->p.n_q);
        const int64_t left = *(int64_t *)opts_field(d->planner, &opts, "left");
        const int64_t right = *(int64_t *)opts_field(d->planner, &opts, "right");
        const int64_t sinks = *(int64_t *)opts_field(d->planner, &opts, "sinks");
        const bool near = (left < 0 || j >= at - left) && (right < 0 || j <= at + right);
        return near || j < sinks || j == 70 || j == 9;
    }
    if (variant == 2) {
        const int64_t block = *(int64_t *)opts_field(d->planner, &opts, "block");
        return ((unsigned char *)d->layout.data)[i / block * d->layout.stride[2] + j / block];
    }
    return true;
}

static double
tolerance(const trial *t)
{
    /* |score| < 6 sqrt(dim): an error of eps |score| sqrt(dim) in the exponent, times |v| < 1 */
    const double eps = t->p.q.dtype == SA_F64 ? 0x1p-52 : 0x1p-23;
    return eps * (20 + 6 * (double)t->p.dim);
}

/* top-k: no key that row i dropped scores better than one that it kept. */
static void
check_best(const trial *t, int64_t b, int64_t h, int64_t i, const unsigned char *row)
{
    double worst = INFINITY, best = -INFINITY;
    for (int64_t j = 0; j < t->p.n_k; j++) {
        if (trial_visible(t, b, h, i, j)) {
            const double score = trial_score(t, b, h, i, j);
            worst = row[j] ? fmin(worst, score) : worst;
            best = row[j] ? best : fmax(best, score);
        }
    }
    CHECK(worst >= best - tolerance(t), "%s: row %d keeps %g and drops %g", trial_name(&t->shape),
          (int)i, worst, best);
}

/* mask[n_q, n_k] of one head against the definition; selectors keep min(k, visible) visible keys.
 */
static void
check_mask(const trial *t, const drawing *d, int variant, int64_t b, int64_t h,
           const unsigned char *mask)
{
    for (int64_t i = 0; i < t->p.n_q; i++) {
        int64_t visible = 0, kept = 0;
        for (int64_t j = 0; j < t->p.n_k; j++) {
            const bool allowed =
                variant == 5 ? trial_mask(t, b, h, i, j) : trial_visible(t, b, h, i, j);
            const bool may = allowed && pattern_shows(d, t, variant, i, j);
            const bool is = mask[i * t->p.n_k + j] != 0;
            visible += may;
            kept += is;
            CHECK(is == may || (is < may && d->k >= 0), "%s, %s: row %d %s key %d",
                  variants[variant], trial_name(&t->shape), (int)i, is ? "sees" : "misses", (int)j);
        }
        CHECK(d->k < 0 || kept == SA_MIN(d->k, visible), "%s, %s: row %d keeps %d of %d",
              variants[variant], trial_name(&t->shape), (int)i, (int)kept, (int)visible);
        if (variant == 3) {
            check_best(t, b, h, i, mask + i * t->p.n_k);
        }
    }
}

/* ---- attention given the plan ---- */

static void
check_output(const trial *t, sa_view out, sa_view lse, int64_t b, int64_t h,
             const unsigned char *mask)
{
    double *want = sa_malloc_array((size_t)t->p.dim_v, sizeof *want), want_lse;
    for (int64_t i = 0; i < t->p.n_q; i++) {
        trial_naive(t, b, h, i, mask + i * t->p.n_k, want, &want_lse);
        const double got = trial_get(lse, b, h, i, 0);
        CHECK(check_near(got, want_lse, tolerance(t) * (1 + fabs(want_lse))),
              "%s: lse of row %d is %.9g, not %.9g", trial_name(&t->shape), (int)i, got, want_lse);
        for (int64_t c = 0; c < t->p.dim_v; c++) {
            const double x = trial_get(out, b, h, i, c);
            CHECK(check_near(x, want[c], tolerance(t)), "%s: out[%d, %d, %d, %d] is %.9g, not %.9g",
                  trial_name(&t->shape), (int)b, (int)h, (int)i, (int)c, x, want[c]);
        }
    }
    sa_free(want);
}

static bool
same_bits(const trial *t, sa_view x, sa_view y, int64_t columns)
{
    const size_t n = (size_t)(t->p.batch * t->p.heads * t->p.n_q * columns);
    return memcmp(x.data, y.data, n * sa_dtype_size(x.dtype)) == 0;
}

/* NaN and infinities go to every key and value that no row of its group of heads sees. */
static void
spoil_unseen(const trial *t, const sa_plan *plan, sa_ctx *ctx)
{
    const sa_problem *p = &t->p;
    const int64_t group = p->heads / p->kv_heads;
    unsigned char *mask = sa_malloc((size_t)(p->n_q * p->n_k)), *seen = sa_malloc((size_t)p->n_k);
    for (int64_t b = 0; b < p->batch; b++) {
        for (int64_t g = 0; g < p->kv_heads; g++) {
            memset(seen, 0, (size_t)p->n_k);
            for (int64_t h = g * group; h < (g + 1) * group; h++) {
                CHECK(sa_plan_to_mask(ctx, plan, p, b, h, mask) == SA_OK, "%s", ctx->message);
                for (int64_t at = 0; at < p->n_q * p->n_k; at++) {
                    seen[at % p->n_k] |= mask[at];
                }
            }
            for (int64_t j = 0; j < p->n_k; j++) {
                const double x = (const double[]){NAN, INFINITY, -INFINITY}[j % 3];
                for (int64_t c = 0; !seen[j] && c < p->dim; c++) {
                    trial_put(p->k, b, g, j, c, x);
                }
                for (int64_t c = 0; !seen[j] && c < p->dim_v; c++) {
                    trial_put(p->v, b, g, j, c, x);
                }
            }
        }
    }
    sa_free(mask);
    sa_free(seen);
}

static sa_status
run(const trial *t, const sa_plan *plan, sa_view out, sa_view lse, int threads)
{
    sa_num_threads_set(threads);
    sa_ctx *ctx = sa_ctx_acquire();
    const sa_part part = {plan, 0, t->p.heads};
    const sa_status status = sa_attend(ctx, out, lse, &t->p, &part, 1);
    CHECK(status == SA_OK, "%s: %s", trial_name(&t->shape), ctx->message);
    sa_ctx_release(ctx);
    return status;
}

static void
check_trial(const trial *t, int variant)
{
    sa_ctx *ctx = sa_ctx_acquire();
    sa_num_threads_set(1 + (int)numbers_below(3));
    drawing d = draw_plan(ctx, t, variant);
    if (d.plan == NULL) {
        sa_ctx_release(ctx);
        return;
    }
    sa_view out = trial_output(t, t->p.dim_v), lse = trial_output(t, 1);
    sa_view again = trial_output(t, t->p.dim_v), lse_again = trial_output(t, 1);
    unsigned char *mask = sa_malloc((size_t)(t->p.n_q * t->p.n_k));
    CHECK(sa_plan_validate(ctx, d.plan) == SA_OK, "%s: %s", trial_name(&t->shape), ctx->message);
    run(t, d.plan, out, lse, 1);
    int64_t kept = 0;
    for (int64_t b = 0; b < t->p.batch; b++) {
        for (int64_t h = 0; h < t->p.heads; h++) {
            CHECK(sa_plan_to_mask(ctx, d.plan, &t->p, b, h, mask) == SA_OK, "%s", ctx->message);
            check_mask(t, &d, variant, b, h, mask);
            check_output(t, out, lse, b, h, mask);
            for (int64_t at = 0; at < t->p.n_q * t->p.n_k; at++) {
                kept += mask[at];
            }
        }
    }
    sa_plan_counts counts;
    CHECK(sa_plan_count(ctx, d.plan, &t->p, &counts) == SA_OK && counts.kept == kept,
          "%s: %s counts %lld, not %lld", trial_name(&t->shape), variants[variant],
          (long long)counts.kept, (long long)kept);
    run(t, d.plan, again, lse_again, 3);
    CHECK(same_bits(t, out, again, t->p.dim_v) && same_bits(t, lse, lse_again, 1),
          "%s: three threads differ", trial_name(&t->shape));
    spoil_unseen(t, d.plan, ctx);
    run(t, d.plan, again, lse_again, 2);
    CHECK(same_bits(t, out, again, t->p.dim_v) && same_bits(t, lse, lse_again, 1),
          "%s: %s reads unseen keys", trial_name(&t->shape), variants[variant]);
    void *all[] = {out.data, lse.data, again.data, lse_again.data, mask};
    for (int i = 0; i < 5; i++) {
        sa_free(all[i]);
    }
    free_drawing(&d);
    sa_ctx_release(ctx);
}

/* ---- special shapes ---- */

/* Few rows over many keys: pieces of the keys are attended apart and joined. */
static void
check_decode(sa_dtype dtype, int64_t n_q)
{
    trial_shape s = {.dtype = dtype,
                     .batch = 1,
                     .heads = 2,
                     .kv_heads = 1,
                     .n_q = n_q,
                     .n_k = 9001,
                     .dim = 24,
                     .dim_v = 24,
                     .causal = SA_CAUSAL_BOTTOM_RIGHT,
                     .scale = 1,
                     .key_mask = true};
    sa_ctx *ctx = sa_ctx_acquire();
    trial t = trial_make(ctx, &s);
    check_trial(&t, 0);
    check_trial(&t, 1);
    trial_free(&t);
    sa_ctx_release(ctx);
}

/* One call over two plans equals two calls. */
static void
check_parts(void)
{
    trial_shape s = {.dtype = SA_F32,
                     .batch = 2,
                     .heads = 4,
                     .kv_heads = 2,
                     .n_q = 70,
                     .n_k = 90,
                     .dim = 16,
                     .dim_v = 20,
                     .causal = SA_CAUSAL_BOTTOM_RIGHT,
                     .scale = 0.3};
    sa_ctx *ctx = sa_ctx_acquire();
    trial t = trial_make(ctx, &s);
    drawing a = draw_plan(ctx, &t, 0), b = draw_plan(ctx, &t, 1);
    sa_view out = trial_output(&t, s.dim_v), lse = trial_output(&t, 1);
    const sa_part parts[] = {{a.plan, 0, 2}, {b.plan, 2, 4}};
    unsigned char *mask = sa_malloc((size_t)(s.n_q * s.n_k));
    CHECK(sa_attend(ctx, out, lse, &t.p, parts, 2) == SA_OK, "%s", ctx->message);
    for (int64_t at = 0; at < 8; at++) {
        const int64_t h = at % 4;
        sa_plan_to_mask(ctx, h < 2 ? a.plan : b.plan, &t.p, at / 4, h, mask);
        check_output(&t, out, lse, at / 4, h, mask);
    }
    void *all[] = {out.data, lse.data, mask};
    for (int i = 0; i < 3; i++) {
        sa_free(all[i]);
    }
    free_drawing(&a);
    free_drawing(&b);
    trial_free(&t);
    sa_ctx_release(ctx);
}

/* Gradients of two merged parts, for a dout that is out and dlse all zeros: weights that sum to 1
 * give dout back, and what one log-sum-exp gains the other loses. */
static void
check_merge_grad(sa_ctx *ctx, const trial *t, const sa_view *outs, const sa_view *lses, sa_view out,
                 sa_view lse)
{
    const sa_view none = {0};
    sa_view douts[2], dlses[2];
    for (int part = 0; part < 2; part++) {
        douts[part] = trial_output(t, out.size[3]);
        dlses[part] = trial_output(t, 1);
        CHECK(sa_merge_grad(ctx, douts[part], dlses[part], out, none, out, lse, outs[part],
                            lses[part]) == SA_OK,
              "%s", ctx->message);
    }
    for (int64_t row = 0; row < 4 * out.size[2]; row++) {
        const double a = trial_get(dlses[0], 0, 0, row, 0), b = trial_get(dlses[1], 0, 0, row, 0);
        CHECK(check_near(a + b, 0, tolerance(t) * 8), "row %d: %g and %g", (int)row, a, b);
        for (int64_t c = 0; c < out.size[3]; c++) {
            const double want = trial_get(out, 0, 0, row, c);
            const double x = trial_get(douts[0], 0, 0, row, c),
                         y = trial_get(douts[1], 0, 0, row, c);
            CHECK(check_near(x + y, want, tolerance(t) * 4), "row %d, column %d: %g + %g, not %g",
                  (int)row, (int)c, x, y, want);
        }
    }
    CHECK(sa_merge_grad(ctx, douts[0], dlses[0], out, none, out, out, outs[0], lses[0]) ==
              SA_EINVAL,
          "an lse of another shape");
    for (int part = 0; part < 2; part++) {
        sa_free(douts[part].data);
        sa_free(dlses[part].data);
    }
}

/* The keys cut into two plans, attended apart, merged: the whole. */
static void
check_merge(sa_dtype dtype)
{
    trial_shape s = {.dtype = dtype,
                     .batch = 2,
                     .heads = 2,
                     .kv_heads = 1,
                     .n_q = 70,
                     .n_k = 70,
                     .dim = 16,
                     .dim_v = 20,
                     .scale = 0.3,
                     .mask = true};
    sa_ctx *ctx = sa_ctx_acquire();
    trial t = trial_make(ctx, &s);
    sa_view outs[3], lses[3];
    unsigned char *bits = t.p.mask.data, *whole = sa_malloc((size_t)(4 * s.n_q * s.n_k));
    memcpy(whole, bits, (size_t)(4 * s.n_q * s.n_k));
    for (int part = 0; part < 3;
         part++) { /* two halves of the keys, some rows with an empty one; then the whole */
        sa_plan *plan = NULL;
        for (int64_t at = 0; at < 4 * s.n_q * s.n_k; at++) {
            const bool second = at % s.n_k >= at / s.n_k % (s.n_k + 1);
            bits[at] = whole[at] && (part == 2 || second == part);
        }
        outs[part] = trial_output(&t, s.dim_v);
        lses[part] = trial_output(&t, 1);
        CHECK(sa_plan_from_mask(ctx, &t.p, &plan) == SA_OK, "%s", ctx->message);
        run(&t, plan, outs[part], lses[part], 2);
        sa_plan_free(plan);
    }
    sa_view out = trial_output(&t, s.dim_v), lse = trial_output(&t, 1);
    CHECK(sa_merge(ctx, out, lse, outs, lses, 2) == SA_OK, "%s", ctx->message);
    for (int64_t row = 0; row < 4 * s.n_q; row++) {
        const double want = trial_get(lses[2], 0, 0, row, 0), got = trial_get(lse, 0, 0, row, 0);
        CHECK(check_near(got, want, tolerance(&t) * 4), "lse of row %d: %g, not %g", (int)row, got,
              want);
        for (int64_t c = 0; c < s.dim_v; c++) {
            const double x = trial_get(out, 0, 0, row, c), y = trial_get(outs[2], 0, 0, row, c);
            CHECK(check_near(x, y, tolerance(&t) * 2), "row %d, column %d: %g, not %g", (int)row,
                  (int)c, x, y);
        }
    }
    check_merge_grad(ctx, &t, outs, lses, out, lse);
    for (int part = 0; part < 3; part++) {
        sa_free(outs[part].data);
        sa_free(lses[part].data);
    }
    sa_free(out.data);
    sa_free(lse.data);
    sa_free(whole);
    trial_free(&t);
    sa_ctx_release(ctx);
}

/* A rectangle of scores, with -inf where a mask hides the pair, whatever stands there. */
static void
check_score_rows(sa_dtype dtype)
{
    trial_shape s = {.dtype = dtype,
                     .batch = 2,
                     .heads = 4,
                     .kv_heads = 2,
                     .n_q = 30,
                     .n_k = 140,
                     .dim = 20,
                     .dim_v = 1,
                     .scale = 0.4,
                     .softcap = 2,
                     .mask = true,
                     .bias = true,
                     .key_mask = true};
    const int64_t i0 = 3, i1 = 27, j0 = 5, j1 = 138, ld = j1 - j0 + 2;
    sa_ctx *ctx = sa_ctx_acquire();
    trial t = trial_make(ctx, &s);
    for (int64_t j = 0; j < s.n_k; j++) { /* a padded key is not read for its value */
        if (((unsigned char *)t.p.key_mask.data)[j] == 0) {
            trial_put(t.p.k, 0, 1, j, 0, NAN);
        }
    }
    CHECK(sa_scratch_reserve(ctx, sa_score_rows_scratch(&t.p, i1 - i0)) == SA_OK, "%s",
          ctx->message);
    const size_t bytes = (size_t)((i1 - i0) * ld) * sa_dtype_size(dtype),
                 used = sa_scratch(ctx, 0)->used;
    sa_view out = {sa_malloc(bytes), dtype, {1, 1, i1 - i0, j1 - j0}, {0, 0, ld, 1}};
    CHECK(sa_score_rows(ctx, 0, &t.p, 0, 3, i0, i1, j0, j1, out.data, ld) == SA_OK, "%s",
          ctx->message);
    CHECK(sa_scratch(ctx, 0)->used == used, "scratch is not given back");
    for (int64_t i = i0; i < i1; i++) {
        for (int64_t j = j0; j < j1; j++) {
            const double want =
                trial_visible(&t, 0, 3, i, j) ? trial_score(&t, 0, 3, i, j) : -INFINITY;
            const double got = trial_get(out, 0, 0, i - i0, j - j0);
            CHECK(check_near(got, want, tolerance(&t)), "(%d, %d): %g, not %g", (int)i, (int)j, got,
                  want);
        }
    }
    sa_free(out.data);
    trial_free(&t);
    sa_ctx_release(ctx);
}

/* Every allocation of a call fails in turn: SA_ENOMEM, and nothing is kept. */
static void
check_memory(int variant)
{
    trial_shape s = {.dtype = SA_F32,
                     .batch = 1,
                     .heads = 2,
                     .kv_heads = 1,
                     .n_q = 70,
                     .n_k = 70,
                     .dim = 16,
                     .dim_v = 16,
                     .causal = SA_CAUSAL_BOTTOM_RIGHT,
                     .scale = 0.3,
                     .mask = true};
    sa_num_threads_set(2);
    sa_ctx *ctx = sa_ctx_acquire();
    trial t = trial_make(ctx, &s);
    sa_view out = trial_output(&t, s.dim_v), lse = trial_output(&t, 1);
    drawing d = draw_plan(ctx, &t, variant);
    sa_ctx_release(ctx);
    sa_scratch_trim();
    const int64_t before = sa_live_bytes();
    sa_status status = SA_ENOMEM;
    int nth = 0;
    while (status != SA_OK && nth < 500) {
        sa_plan *plan = NULL;
        ctx = sa_ctx_acquire();
        sa_fail_set(++nth);
        status = d.planner ? sa_plan_build(ctx, &t.p, d.planner, &d.opts, &plan)
                           : sa_plan_from_mask(ctx, &t.p, &plan);
        const sa_part part = {plan, 0, 2};
        status = status ? status : sa_attend(ctx, out, lse, &t.p, &part, 1);
        sa_fail_set(0);
        CHECK(status == SA_OK || (status == SA_ENOMEM && ctx->code == SA_ENOMEM),
              "%s, allocation %d: status %d, %s", variants[variant], nth, (int)status,
              ctx->message);
        sa_plan_free(plan);
        sa_ctx_release(ctx);
        sa_scratch_trim();
        CHECK(sa_live_bytes() == before, "%s, allocation %d: %lld bytes stay", variants[variant],
              nth, (long long)(sa_live_bytes() - before));
    }
    CHECK(status == SA_OK && nth > 3, "%s: %d allocations", variants[variant], nth);
    sa_free(out.data);
    sa_free(lse.data);
    free_drawing(&d);
    trial_free(&t);
}

static void
check_isa(const char *isa)
{
    for (int variant = 0; variant < VARIANTS; variant++) {
        check_case("attend over %s, %s", variants[variant], isa);
        for (int round = 0; round < 12; round++) {
            trial_shape shape = trial_random_shape();
            if (variant == 5) { /* a plan of a mask knows nothing of padding */
                shape.mask = true;
                shape.key_mask = false;
            }
            sa_ctx *ctx = sa_ctx_acquire();
            trial t = trial_make(ctx, &shape);
            sa_ctx_release(ctx);
            check_trial(&t, variant);
            trial_free(&t);
        }
    }
    check_case("few rows over many keys, %s", isa);
    for (int64_t n_q = 1; n_q < 20; n_q += 6) {
        check_decode(SA_F32, n_q);
        check_decode(SA_F64, n_q);
    }
    check_case("two plans in one call, %s", isa);
    check_parts();
    check_case("halves merged, %s", isa);
    check_merge(SA_F32);
    check_merge(SA_F64);
    check_case("rectangles of scores, %s", isa);
    check_score_rows(SA_F32);
    check_score_rows(SA_F64);
}

void
sa_selftest_attend(void)
{
    const sa_isa best = sa_isa_now();
    for (int isa = 0; isa < SA_ISA_COUNT; isa++) {
        if (sa_isa_set((sa_isa)isa)) {
            check_isa(sa_isa_name((sa_isa)isa));
        }
    }
    sa_isa_set(best);
    for (int variant = 0; variant < VARIANTS; variant++) {
        check_case("%s and attend, each allocation failing in turn", variants[variant]);
        check_memory(variant);
    }
}
