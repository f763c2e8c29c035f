/* test_attend_rows.c - the row path of attend: queries that share a walk over the keys get the bits
 * that each gets alone, and halves the bits of the same numbers in float. */
#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/threads.h"
#include "check.h"
#include "reals.h"
#include "trial.h"

enum { VARIANTS = 4 };
static const char *const variants[VARIANTS] = {"dense", "window", "blockmask", "topk"};

static sa_plan *
plan_of(sa_ctx *ctx, const sa_problem *p, int variant)
{
    const sa_planner *const planner = sa_planner_find(variants[variant]);
    trial_opts opts = opts_of(planner);
    sa_plan *plan = NULL;
    const int64_t rows = (p->n_q + 7) / 8, cols = (p->n_k + 7) / 8;
    unsigned char *const layout = sa_malloc((size_t)(rows * cols));
    if (variant == 1) {
        *(int64_t *)opts_field(planner, &opts, "left") = 70;
        *(int64_t *)opts_field(planner, &opts, "right") = -1;
        *(int64_t *)opts_field(planner, &opts, "sinks") = 3;
    } else if (variant == 2) { /* runs of 8 keys, too short to be read as runs */
        for (int64_t i = 0; i < rows * cols; i++) {
            layout[i] = i % 5 % 2;
        }
        *(int64_t *)opts_field(planner, &opts, "block") = 8;
        *(sa_view *)opts_field(planner, &opts, "layout") =
            (sa_view){layout, SA_BOOL, {1, 1, rows, cols}, {rows * cols, rows * cols, cols, 1}};
    } else if (variant == 3) {
        *(int64_t *)opts_field(planner, &opts, "k") = 21;
    }
    CHECK(sa_plan_build(ctx, p, planner, &opts, &plan) == SA_OK, "%s", ctx->message);
    sa_free(layout);
    return plan;
}

static sa_view
heads_of(sa_view v, int64_t begin, int64_t end)
{
    v.data = v.data == NULL ? NULL : sa_view_row(v, 0, begin, 0);
    v.size[1] = end - begin;
    return v;
}

/* Attention of p with the plan of a variant into out (batch, heads, n_q, dim_v) and lse. */
static void
attend(const sa_problem *p, int variant, sa_view out, sa_view lse)
{
    sa_ctx *ctx = sa_ctx_acquire();
    sa_problem call = *p;
    CHECK(sa_problem_check(ctx, &call) == SA_OK, "%s", ctx->message);
    sa_plan *plan = plan_of(ctx, &call, variant);
    if (plan != NULL) {
        const sa_part part = {plan, 0, call.heads};
        CHECK(sa_attend(ctx, out, lse, &call, &part, 1) == SA_OK, "%s", ctx->message);
    }
    sa_plan_free(plan);
    sa_ctx_release(ctx);
}

/* Whether row (0, h, i) of a, `columns` long, is that of row (0, g, i) of b. */
static bool
same_row(sa_view a, int64_t h, sa_view b, int64_t g, int64_t i, int64_t columns)
{
    return memcmp(sa_view_row(a, 0, h, i), sa_view_row(b, 0, g, i),
                  (size_t)columns * sa_dtype_size(a.dtype)) == 0;
}

/* So many query heads over one head of keys, against one query head at a time. */
static void
check_group(const trial_shape *shape, int variant)
{
    sa_ctx *ctx = sa_ctx_acquire();
    trial t = trial_make(ctx, shape);
    sa_view out = trial_output(&t, shape->dim_v), lse = trial_output(&t, 1);
    sa_num_threads_set(1 + (int)numbers_below(3));
    attend(&t.p, variant, out, lse);
    trial_shape one = *shape;
    one.heads = 1;
    trial alone = {.shape = one, .p = t.p};
    alone.p.heads = 1;
    sa_view out1 = trial_output(&alone, shape->dim_v), lse1 = trial_output(&alone, 1);
    for (int64_t h = 0; h < shape->heads; h++) {
        alone.p.q = heads_of(t.p.q, h, h + 1);
        alone.p.mask = heads_of(t.p.mask, h, h + 1);
        alone.p.bias = heads_of(t.p.bias, h, h + 1);
        attend(&alone.p, variant, out1, lse1);
        for (int64_t i = 0; i < shape->n_q; i++) {
            CHECK(same_row(out, h, out1, 0, i, shape->dim_v) && same_row(lse, h, lse1, 0, i, 1),
                  "%s, %s: head %d, row %d: %g alone, %g in the group", trial_name(shape),
                  variants[variant], (int)h, (int)i, trial_get(out1, 0, 0, i, 0),
                  trial_get(out, 0, h, i, 0));
        }
    }
    void *all[] = {out.data, lse.data, out1.data, lse1.data};
    for (int i = 0; i < 4; i++) {
        sa_free(all[i]);
    }
    trial_free(&t);
    sa_ctx_release(ctx);
}

static void
check_groups(const sa_tile *t)
{
    check_case("%s: groups of queries", table_name(t));
    for (int trial = 0; trial < 24; trial++) {
        trial_shape s = trial_random_shape();
        s.dtype = t->real_bytes == 8 ? SA_F64 : SA_F32;
        s.batch = s.kv_heads = 1;
        s.heads = 1 + numbers_below(t->lanes); /* more rows go to the strips */
        s.n_q = 1 + numbers_below(t->lanes / s.heads);
        s.n_k = trial % 8 == 0 ? 9000 : 1 + numbers_below(400);
        s.causal = SA_CAUSAL_BOTTOM_RIGHT;
        check_group(&s, trial % VARIANTS);
    }
}

/* The numbers of v, rounded to a half type and, in the second view, widened again. */
static void
halve(sa_view v, sa_dtype dtype, sa_view *half, sa_view *wide)
{
    const sa_tile *const t = sa_tile_for(false);
    const int64_t dim = v.size[3];
    const float one = 1;
    *half = *wide = v;
    for (int axis = 2; axis >= 0; axis--) {
        half->stride[axis] = axis == 2 ? dim : half->stride[axis + 1] * v.size[axis + 1];
        wide->stride[axis] = half->stride[axis];
    }
    half->dtype = dtype;
    half->data = sa_malloc((size_t)(v.size[0] * half->stride[0]) * sizeof(uint16_t));
    wide->data = sa_malloc((size_t)(v.size[0] * half->stride[0]) * sizeof(float));
    for (int64_t at = 0; at < v.size[0] * v.size[1] * v.size[2]; at++) {
        const int64_t b = at / (v.size[1] * v.size[2]), h = at / v.size[2] % v.size[1];
        void *const to = sa_view_row(*half, b, h, at % v.size[2]);
        t->store_row(to, dtype, sa_view_row(v, b, h, at % v.size[2]), (int)dim, &one);
        t->load_rows(sa_view_row(*wide, b, h, at % v.size[2]), dim, to, dtype, 0, 1, (int)dim, 1);
    }
}

static void
check_half(const trial_shape *shape, int variant, sa_dtype k_type, sa_dtype v_type)
{
    sa_ctx *ctx = sa_ctx_acquire();
    trial t = trial_make(ctx, shape);
    sa_problem half = t.p, wide = t.p;
    sa_view out = trial_output(&t, shape->dim_v), lse = trial_output(&t, 1);
    sa_view out2 = trial_output(&t, shape->dim_v), lse2 = trial_output(&t, 1);
    halve(t.p.k, k_type, &half.k, &wide.k);
    halve(t.p.v, v_type, &half.v, &wide.v);
    attend(&half, variant, out, lse);
    attend(&wide, variant, out2, lse2);
    for (int64_t h = 0; h < shape->heads; h++) {
        for (int64_t i = 0; i < shape->n_q; i++) {
            CHECK(same_row(out, h, out2, h, i, shape->dim_v) && same_row(lse, h, lse2, h, i, 1),
                  "%s, %s: head %d, row %d: %g, widened %g", trial_name(shape), variants[variant],
                  (int)h, (int)i, trial_get(out, 0, h, i, 0), trial_get(out2, 0, h, i, 0));
        }
    }
    void *all[] = {out.data,    lse.data,    out2.data,   lse2.data,
                   half.k.data, half.v.data, wide.k.data, wide.v.data};
    for (int i = 0; i < 8; i++) {
        sa_free(all[i]);
    }
    trial_free(&t);
    sa_ctx_release(ctx);
}

static void
check_halves(const sa_tile *t)
{
    static const sa_dtype types[] = {SA_F16, SA_BF16};
    if (t->real_bytes == 8) {
        return; /* halves go with float alone */
    }
    check_case("%s: halves", table_name(t));
    for (int trial = 0; trial < 40; trial++) {
        trial_shape s = trial_random_shape();
        s.dtype = SA_F32;
        s.batch = 1;
        s.n_q = 1 + trial % 2 * numbers_below(40); /* the row path, and the strips */
        s.n_k = trial % 10 == 0 ? 8500 : 1 + numbers_below(300);
        s.causal = SA_CAUSAL_BOTTOM_RIGHT;
        check_half(&s, trial % VARIANTS, types[trial / 4 % 2], types[numbers_below(2)]);
    }
}

void
sa_selftest_attend_rows(void)
{
    each_table(check_groups);
    each_table(check_halves);
}
