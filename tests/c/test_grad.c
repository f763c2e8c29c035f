/* test_grad.c - the backward over plans against double loops. */
#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/cpu.h"
#include "base/threads.h"
#include "check.h"
#include "engine/attend_grad.h"
#include "engine/dropout.h"
#include "trial.h"

enum { KINDS = 4, TRIALS = 60, GRADS = 4 };
static const char *const kinds[KINDS] = {"dense", "window", "topk", "mask"};

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
        } else if (kind == 2) {
            *(int64_t *)opts_field(planner, &opts, "k") = 1 + numbers_below(20);
        }
        status = sa_plan_build(ctx, &t->p, planner, &opts, &plan);
    }
    CHECK(status == SA_OK, "%s: %s", trial_name(&t->shape), ctx->message);
    return plan;
}

/* Zeroed, in double, contiguous. */
static sa_view
doubles(int64_t a, int64_t b, int64_t c, int64_t d)
{
    sa_view v = {NULL, SA_F64, {a, b, c, d}, {b * c * d, c * d, d, 1}};
    v.data = sa_malloc_array((size_t)(a * b * c * d), sizeof(double));
    memset(v.data, 0, (size_t)(a * b * c * d) * sizeof(double));
    return v;
}

typedef struct {
    sa_view grad[GRADS]; /* dq, dk, dv, dbias */
} gradients;

static gradients
new_gradients(const sa_problem *p, bool bias)
{
    gradients g = {{doubles(p->batch, p->heads, p->n_q, p->dim),
                    doubles(p->batch, p->kv_heads, p->n_k, p->dim),
                    doubles(p->batch, p->kv_heads, p->n_k, p->dim_v),
                    doubles(1, p->heads, p->n_q, bias ? p->n_k : 0)}};
    return g;
}

static void
add(sa_view v, int64_t a, int64_t b, int64_t c, int64_t d, double x)
{
    ((double *)sa_view_row(v, a, b, c))[d] += x;
}

/* One row of the backward by its definition. [algorithms 1.3] */
static void
naive_row(const trial *t, sa_view dout, sa_view lse, sa_view delta, int64_t b, int64_t h, int64_t i,
          const unsigned char *seen, gradients *want)
{
    const sa_problem *const p = &t->p;
    const int64_t g = h * p->kv_heads / p->heads;
    for (int64_t j = 0; j < p->n_k; j++) {
        const int32_t key = (int32_t)j;
        double keep = 1, dp = 0, slope = 1;
        float keep_f32;
        if (!seen[j]) {
            continue;
        }
        if (p->dropout_p > 0) {
            sa_dropout_row(p, b, h, i, &key, 1, p->q.dtype == SA_F64 ? (void *)&keep : &keep_f32);
            keep = p->q.dtype == SA_F64 ? keep : (double)keep_f32;
        }
        const double score = trial_score(t, b, h, i, j);
        if (p->softcap > 0) {
            const double bias = p->bias.data ? trial_get(p->bias, b, h, i, j) : 0;
            slope = 1 - pow((score - bias) / p->softcap, 2);
        }
        const double weight = exp(score - trial_get(lse, b, h, i, 0));
        for (int64_t c = 0; c < p->dim_v; c++) {
            dp += trial_get(dout, b, h, i, c) * trial_get(p->v, b, g, j, c);
            add(want->grad[2], b, g, j, c, weight * keep * trial_get(dout, b, h, i, c));
        }
        const double ds = weight * (dp * keep - trial_get(delta, b, h, i, 0));
        if (want->grad[3].size[3] > 0) {
            add(want->grad[3], 0, h, i, j, ds);
        }
        for (int64_t c = 0; c < p->dim; c++) {
            add(want->grad[0], b, h, i, c, p->scale * ds * slope * trial_get(p->k, b, g, j, c));
            add(want->grad[1], b, g, j, c, p->scale * ds * slope * trial_get(p->q, b, h, i, c));
        }
    }
}

/* Everything of one backward: outputs of the forward, what comes in, what goes out. */
typedef struct {
    sa_view out, lse, dout, dlse, delta;
    sa_view grad[GRADS];
} backward;

static sa_view
grad_view(sa_dtype dtype, sa_view like)
{
    sa_view v = like;
    const int64_t count = like.size[0] * like.size[1] * like.size[2] * like.size[3];
    v.dtype = dtype;
    v.data = sa_malloc_array((size_t)count, sa_dtype_size(dtype));
    return v;
}

static void
run(const trial *t, const sa_plan *plan, backward *w, int threads)
{
    sa_num_threads_set(threads);
    sa_ctx *const ctx = sa_ctx_acquire();
    const sa_part part = {plan, 0, t->p.heads};
    sa_view dbias = w->grad[3];
    if (dbias.size[3] == 0) {
        dbias.data = NULL;
    } else {
        memset(dbias.data, 0,
               (size_t)(dbias.stride[0]) * sa_dtype_size(dbias.dtype)); /* it is added to */
        dbias.size[0] = t->p.batch;
        dbias.stride[0] = 0;
    }
    const sa_attend_grads grads = {.dout = w->dout,
                                   .lse = w->lse,
                                   .delta = w->delta,
                                   .dq = w->grad[0],
                                   .dk = w->grad[1],
                                   .dv = w->grad[2],
                                   .dbias = dbias};
    CHECK(sa_attend(ctx, w->out, w->lse, &t->p, &part, 1) == SA_OK &&
              sa_attend_delta(ctx, w->delta, w->out, w->dout, w->dlse) == SA_OK &&
              sa_attend_grad(ctx, &grads, &t->p, &part, 1) == SA_OK,
          "%s: %s", trial_name(&t->shape), ctx->message);
    sa_ctx_release(ctx);
}

static void
compare(const trial *t, const backward *w, const gradients *want, const char *kind)
{
    static const char *const names[] = {"dq", "dk", "dv", "dbias"};
    /* sums of up to batch n_q group terms below 10, of errors some 20 + dim times eps each */
    const double eps = t->p.q.dtype == SA_F64 ? 0x1p-52 : 0x1p-23;
    const double bound = eps * (20 + 6 * (double)(t->p.dim + t->p.dim_v)) * 40;
    for (int x = 0; x < GRADS; x++) {
        const sa_view v = want->grad[x];
        double worst = 0;
        bool near = true;
        for (int64_t at = 0; at < v.size[0] * v.stride[0]; at++) {
            const double right = ((const double *)v.data)[at];
            const double got = w->grad[x].dtype == SA_F64
                                   ? ((const double *)w->grad[x].data)[at]
                                   : (double)((const float *)w->grad[x].data)[at];
            near = near && check_near(got, right, bound * (1 + fabs(right)));
            worst = fmax(worst, fabs(got - right));
        }
        CHECK(near, "%s: %s over %s is off by %g", trial_name(&t->shape), names[x], kind, worst);
    }
}

static void
check_trial(trial *t, int kind)
{
    sa_ctx *const ctx = sa_ctx_acquire();
    sa_plan *const plan = draw_plan(ctx, t, kind);
    const sa_problem *const p = &t->p;
    backward w = {trial_output(t, p->dim_v), trial_output(t, 1), trial_output(t, p->dim_v),
                  trial_output(t, 1),        trial_output(t, 1), {{0}}};
    gradients want = new_gradients(p, p->bias.data != NULL), again;
    unsigned char *const mask = sa_malloc((size_t)(p->n_q * p->n_k));
    for (int64_t at = 0; at < p->batch * p->heads * p->n_q; at++) {
        const int64_t b = at / p->n_q / p->heads, h = at / p->n_q % p->heads, i = at % p->n_q;
        trial_put(w.dlse, b, h, i, 0, numbers_real());
        for (int64_t c = 0; c < p->dim_v; c++) {
            trial_put(w.dout, b, h, i, c, numbers_real());
        }
    }
    for (int x = 0; x < GRADS; x++) {
        w.grad[x] = grad_view(p->q.dtype, want.grad[x]);
        again.grad[x] = w.grad[x];
    }
    run(t, plan, &w, 1);
    for (int64_t b = 0; b < p->batch; b++) {
        for (int64_t h = 0; h < p->heads; h++) {
            CHECK(sa_plan_to_mask(ctx, plan, p, b, h, mask) == SA_OK, "%s", ctx->message);
            for (int64_t i = 0; i < p->n_q; i++) {
                naive_row(t, w.dout, w.lse, w.delta, b, h, i, mask + i * p->n_k, &want);
            }
        }
    }
    compare(t, &w, &want, kinds[kind]);
    for (int x = 0; x < GRADS; x++) {
        w.grad[x] = grad_view(p->q.dtype, want.grad[x]);
    }
    run(t, plan, &w, 3);
    for (int x = 0; x < GRADS; x++) {
        const size_t bytes =
            (size_t)(want.grad[x].size[0] * want.grad[x].stride[0]) * sa_dtype_size(p->q.dtype);
        CHECK(memcmp(w.grad[x].data, again.grad[x].data, bytes) == 0, "%s: three threads differ",
              trial_name(&t->shape));
        sa_free(w.grad[x].data);
        sa_free(again.grad[x].data);
        sa_free(want.grad[x].data);
    }
    void *all[] = {w.out.data, w.lse.data, w.dout.data, w.dlse.data, w.delta.data, mask};
    for (int x = 0; x < 6; x++) {
        sa_free(all[x]);
    }
    sa_plan_free(plan);
    sa_ctx_release(ctx);
}

static void
check_trials(int kind, const char *isa)
{
    check_case("gradients over %s plans, %s", kinds[kind], isa);
    for (int x = 0; x < TRIALS; x++) {
        sa_ctx *const ctx = sa_ctx_acquire();
        trial_shape shape = trial_random_shape();
        if (kind == 3) {
            shape.mask = true;
            shape.key_mask = false;
            shape.causal = SA_CAUSAL_NONE;
        }
        trial t = trial_make(ctx, &shape);
        double sinks[8];
        if (numbers_below(3) == 0) {
            t.p.dropout_p = 0.3;
            t.p.seed = (uint64_t)x;
        }
        if (numbers_below(3) == 0) {
            t.p.sink = (sa_view){sinks, t.p.q.dtype, {1, t.p.heads, 1, 1}, {t.p.heads, 1, 1, 1}};
            for (int64_t h = 0; h < t.p.heads; h++) {
                trial_put(t.p.sink, 0, h, 0, 0, 3 * numbers_real());
            }
        }
        check_trial(&t, kind);
        trial_free(&t);
        sa_ctx_release(ctx);
    }
}

void
sa_selftest_grad(void)
{
    const sa_isa best = sa_isa_now();
    const int threads = sa_num_threads();
    for (int isa = 0; isa < SA_ISA_COUNT; isa++) {
        for (int kind = 0; sa_isa_set((sa_isa)isa) && kind < KINDS; kind++) {
            check_trials(kind, sa_isa_name((sa_isa)isa));
        }
    }
    sa_isa_set(best);
    sa_num_threads_set(threads);
}
