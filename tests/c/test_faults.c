/* test_faults.c - every entry with every allocation failing in turn, and every place that allocates
 * failed at least once. */
#define _POSIX_C_SOURCE 200809L /* opendir */
#include <dirent.h>
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "base/threads.h"
#include "check.h"
#include "engine/attend_grad.h"
#include "engine/gemm.h"
#include "engine/received.h"
#include "grad/ops.h"
#include "trial.h"

enum { MOST = 500, DIM = 16, TOP = 5, MERGED = 2 };

/* What entries read and write. */
typedef struct {
    trial t;
    sa_plan *dense, *topk, *masked;
    sa_view out, lse, delta, dq, dk, dv, mass, value, index;
} room;

static sa_view
array(sa_dtype dtype, int64_t a, int64_t b, int64_t c, int64_t d)
{
    sa_view v = {NULL, dtype, {a, b, c, d}, {b * c * d, c * d, d, 1}};
    const size_t bytes = (size_t)(a * b * c * d) * sa_dtype_size(dtype);
    v.data = sa_malloc(bytes);
    memset(v.data, 0, bytes);
    return v;
}

/* The plan of a variant, whose numbers are 8 where they may be; all blocks of a layout are kept. */
static sa_status
build(sa_ctx *ctx, const room *x, const sa_planner *planner, sa_plan **plan)
{
    static unsigned char layout[1 << 12];
    trial_opts opts = opts_of(planner);
    for (const sa_field *f = planner->fields; f->name != NULL; f++) {
        if (f->type == SA_FIELD_I64) {
            *(int64_t *)opts_field(planner, &opts, f->name) = 8;
        } else if (f->type == SA_FIELD_ARRAY) {
            const int64_t rows = (x->t.p.n_q + 7) / 8, cols = (x->t.p.n_k + 7) / 8;
            memset(layout, 1, sizeof layout);
            *(sa_view *)opts_field(planner, &opts, f->name) =
                (sa_view){layout, SA_BOOL, {1, 1, rows, cols}, {0, 0, cols, 1}};
        }
    }
    return sa_plan_build(ctx, &x->t.p, planner, &opts, plan);
}

static const sa_planner *building; /* of run_build */

static sa_status
run_build(sa_ctx *ctx, room *x)
{
    sa_plan *plan = NULL;
    const sa_status status = build(ctx, x, building, &plan);
    sa_plan_free(plan);
    return status;
}

static sa_status
run_from_mask(sa_ctx *ctx, room *x)
{
    sa_plan *plan = NULL;
    const sa_status status = sa_plan_from_mask(ctx, &x->t.p, &plan);
    sa_plan_free(plan);
    return status;
}

static sa_status
run_intervals(sa_ctx *ctx, room *x)
{
    static int64_t lo[1000], hi[1000];
    sa_plan *plan = NULL;
    for (int64_t i = 0; i < x->t.p.n_q; i++) {
        hi[i] = x->t.p.n_k;
    }
    const sa_status status = sa_plan_from_intervals(ctx, &x->t.p, 1, lo, hi, &plan);
    sa_plan_free(plan);
    return status;
}

static sa_status
run_pack(sa_ctx *ctx, room *x)
{
    const sa_plan *const plans[] = {x->dense, x->topk, x->dense};
    sa_plan *plan = NULL;
    sa_status status = sa_plan_pack(ctx, plans, 3, &plan);
    sa_plan_free(plan);
    const sa_plan *const alike[] = {x->topk, x->topk}; /* spans of one length stay so */
    status = status ? status : sa_plan_pack(ctx, alike, 2, &plan);
    sa_plan_free(status ? NULL : plan);
    return status;
}

static sa_status
run_combine(sa_ctx *ctx, room *x)
{
    sa_status status = SA_OK;
    for (int op = SA_PLAN_UNION; op <= SA_PLAN_INTERSECTION && status == SA_OK; op++) {
        sa_plan *plan = NULL;
        status = sa_plan_combine(ctx, x->masked, x->topk, &x->t.p, (sa_plan_op)op, &plan);
        sa_plan_free(plan);
    }
    return status;
}

static sa_status
run_count(sa_ctx *ctx, room *x)
{
    sa_plan_counts counts;
    return sa_plan_count(ctx, x->topk, &x->t.p, &counts);
}

static sa_status
run_attend(sa_ctx *ctx, room *x)
{
    const sa_part parts[] = {{x->dense, 0, 2}, {x->topk, 2, 4}};
    return sa_attend(ctx, x->out, x->lse, &x->t.p, parts, 2);
}

static sa_status
run_attend_grad(sa_ctx *ctx, room *x)
{
    const sa_part part = {x->topk, 0, 4};
    const sa_attend_grads grads = {
        x->out, x->lse, x->delta, x->dq, x->dk, x->dv, {.data = NULL},
    };
    const sa_status status = sa_attend_delta(ctx, x->delta, x->out, x->out, (sa_view){0});
    return status ? status : sa_attend_grad(ctx, &grads, &x->t.p, &part, 1);
}

static sa_status
run_received(sa_ctx *ctx, room *x)
{
    const sa_part part = {x->dense, 0, 4};
    const sa_status status = sa_received(ctx, x->mass, x->lse, &x->t.p, &part, 1);
    return status ? status : sa_topn(ctx, x->value, x->index, x->lse, &x->t.p, &part, 1);
}

static sa_status
run_merge(sa_ctx *ctx, room *x)
{
    const sa_view outs[MERGED] = {x->dq, x->dq}, lses[MERGED] = {x->delta, x->delta};
    const sa_status status = sa_merge(ctx, x->out, x->lse, outs, lses, MERGED);
    return status ? status
                  : sa_merge_grad(ctx, x->dq, x->delta, x->out, x->lse, x->out, x->lse, x->out,
                                  x->lse);
}

static sa_status
run_gemm(sa_ctx *ctx, room *x)
{
    static float c[70 * 70];
    const sa_gemm_args g = {
        .m = 70,
        .n = 70,
        .k = DIM,
        .dtype = SA_F32,
        .b_dtype = SA_F32,
        .a = x->t.p.q.data,
        .lda = DIM,
        .b = x->t.p.k.data,
        .ldb = DIM,
        .b_transposed = true,
        .c = c,
        .ldc = 70,
    };
    return sa_gemm(ctx, &g);
}

static sa_status
run_sample(sa_ctx *ctx, room *x)
{
    const double u[] = {0.5};
    int32_t token;
    const sa_sampling how = {0.7, 3, 0.9};
    return sa_op_sample(ctx, &token, x->t.p.q.data, u, 1, DIM, how);
}

static const struct {
    const char *name;
    sa_status (*run)(sa_ctx *ctx, room *x);
} entries[] = {
    {"a plan of a mask", run_from_mask},
    {"a plan of intervals", run_intervals},
    {"plans packed", run_pack},
    {"plans combined", run_combine},
    {"a plan counted", run_count},
    {"attend", run_attend},
    {"gradients", run_attend_grad},
    {"mass and largest weights", run_received},
    {"merge and its gradients", run_merge},
    {"a product", run_gemm},
    {"a token", run_sample},
};

/* One call in a context that keeps nothing; the context is the caller's first allocation. */
static sa_status
call(sa_status (*run)(sa_ctx *ctx, room *x), room *x, int nth)
{
    sa_fail_set(nth);
    sa_ctx *const ctx = sa_ctx_acquire();
    const sa_status status = ctx != NULL ? run(ctx, x) : SA_ENOMEM;
    sa_fail_set(0);
    CHECK(ctx == NULL || status == SA_OK || ctx->message[0] != '\0', "allocation %d is not said",
          nth);
    sa_ctx_release(ctx);
    sa_scratch_trim();
    return status;
}

static void
check_entry(const char *name, sa_status (*run)(sa_ctx *ctx, room *x), room *x)
{
    check_case("%s, each allocation failing in turn", name);
    CHECK(call(run, x, 0) == SA_OK, "with all memory");
    const int64_t before = sa_live_bytes();
    sa_status status = SA_ENOMEM;
    int nth = 0;
    while (status != SA_OK && nth < MOST) {
        status = call(run, x, ++nth);
        CHECK(status == SA_OK || status == SA_ENOMEM, "allocation %d: status %d", nth, (int)status);
        CHECK(sa_live_bytes() == before, "allocation %d: %lld bytes stay", nth,
              (long long)(sa_live_bytes() - before));
        CHECK(call(run, x, 0) == SA_OK, "the call after allocation %d", nth);
    }
    CHECK(status == SA_OK && nth > 1, "%d allocations", nth);
}

static room
room_make(int64_t n_q, int64_t n_k)
{
    const trial_shape s = {.dtype = SA_F32,
                           .batch = 1,
                           .heads = 4,
                           .kv_heads = 2,
                           .n_q = n_q,
                           .n_k = n_k,
                           .dim = DIM,
                           .dim_v = DIM,
                           .scale = 0.3,
                           .mask = n_q * n_k < 10000};
    sa_ctx *const ctx = sa_ctx_acquire();
    room x = {.t = trial_make(ctx, &s)};
    const sa_view none = {0}, mask = x.t.p.mask;
    CHECK(mask.data == NULL || sa_plan_from_mask(ctx, &x.t.p, &x.masked) == SA_OK, "masked");
    x.t.p.mask = none;
    CHECK(build(ctx, &x, sa_planner_find("dense"), &x.dense) == SA_OK, "dense");
    CHECK(build(ctx, &x, sa_planner_find("topk"), &x.topk) == SA_OK, "topk");
    x.t.p.mask = mask;
    x.out = array(SA_F32, 1, 4, n_q, DIM);
    x.dq = array(SA_F32, 1, 4, n_q, DIM);
    x.dk = array(SA_F32, 1, 2, n_k, DIM);
    x.dv = array(SA_F32, 1, 2, n_k, DIM);
    x.lse = array(SA_F32, 1, 4, n_q, 1);
    x.delta = array(SA_F32, 1, 4, n_q, 1);
    x.mass = array(SA_F32, 1, 4, n_k, 1);
    x.value = array(SA_F32, 1, 4, n_q, TOP);
    x.index = array(SA_I64, 1, 4, n_q, TOP);
    sa_ctx_release(ctx);
    sa_scratch_trim();
    return x;
}

static void
room_free(room *x)
{
    const sa_view views[] = {x->out, x->lse,  x->delta, x->dq,   x->dk,
                             x->dv,  x->mass, x->value, x->index};
    for (size_t i = 0; i < sizeof views / sizeof *views; i++) {
        sa_free(views[i].data);
    }
    sa_plan_free(x->dense);
    sa_plan_free(x->topk);
    sa_plan_free(x->masked);
    trial_free(&x->t);
}

static bool
has_failed(const char *path, int line)
{
    char first[400], next[400]; /* a call may end on the line after */
    snprintf(first, sizeof first, "%s:%d", path, line);
    snprintf(next, sizeof next, "%s:%d", path, line + 1);
    for (int i = 0; sa_failed_site(i) != NULL; i++) {
        if (strcmp(sa_failed_site(i), first) == 0 || strcmp(sa_failed_site(i), next) == 0) {
            return true;
        }
    }
    return false;
}

/* Sites of one source file; returns how many. */
static int
check_file(const char *path)
{
    FILE *const file = fopen(path, "r");
    char text[300];
    int sites = 0;
    for (int line = 1; file != NULL && fgets(text, sizeof text, file) != NULL; line++) {
        if (strstr(text, "#define") == NULL &&
            (strstr(text, "sa_malloc(") != NULL || strstr(text, "sa_malloc_array(") != NULL)) {
            sites++;
            CHECK(has_failed(path, line), "%s:%d never failed", path, line);
        }
    }
    CHECK(file != NULL && fclose(file) == 0, "%s cannot be read", path);
    return sites;
}

/* All places in the sources, where these lie below the working directory. */
static void
check_sites(void)
{
    static const char *const folders[] = {"csrc/base", "csrc/tile", "csrc/engine", "csrc/variants",
                                          "csrc/grad"};
    int sites = 0;
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        DIR *const folder = opendir(folders[i]);
        if (folder == NULL) {
            printf("sites are not counted: no folder %s here\n", folders[i]);
            return;
        }
        for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
            const size_t length = strlen(entry->d_name);
            char path[300];
            snprintf(path, sizeof path, "%s/%s", folders[i], entry->d_name);
            sites +=
                length > 2 && strcmp(entry->d_name + length - 2, ".c") == 0 ? check_file(path) : 0;
        }
        closedir(folder);
    }
    CHECK(sites > 20, "only %d places allocate", sites);
}

void
sa_selftest_faults(void)
{
    sa_num_threads_set(2);
    room x = room_make(70, 70);
    for (int i = 0; (building = sa_planner_at(i)) != NULL; i++) {
        check_entry(building->name, run_build, &x);
    }
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
        check_entry(entries[i].name, entries[i].run, &x);
    }
    room_free(&x);
    x = room_make(1, 5000); /* few rows over many keys: partial results */
    check_entry("few rows", run_attend, &x);
    room_free(&x);
    x = room_make(5000, 70); /* few keys of many rows: partial sums */
    check_entry("few keys", run_received, &x);
    room_free(&x);
    check_case("every place that allocates has failed");
    check_sites();
}
