/* attend_grad.c - cuts a backward into rounds of tasks by shape; one pass gives dq, dk and dv. */
#include "engine/attend_grad.h"

#include <math.h>
#include <string.h>

#include "base/threads.h"
#include "engine/attend_grad_call.h"

enum {
    WANTED_TASKS = 64, /* keep any number of threads busy ...                 */
    RUN_KEYS = 1024,   /* ... with runs this long: loading rows again costs    */
    LEAST_TASKS = 16,  /* what few heads are cut into, however short the runs */
    LEAST_RUN_KEYS = 128,
    MOST_RUNS = 16
};

static double
real_at(const void *at, bool f64)
{
    return f64 ? *(const double *)at : (double)*(const float *)at;
}

void
sa_grad_row(const sa_grad_group *gg, int r, double *lse, double *delta)
{
    const sa_query *const q = &gg->g.s.query[r];
    const sa_attend_grads *const grads = gg->call->grads;
    const bool f64 = gg->g.call->real_bytes == 8;
    *lse = real_at(sa_view_row(grads->lse, gg->g.b, q->head, q->i), f64);
    *delta = gg->ds_scale * real_at(sa_view_row(grads->delta, gg->g.b, q->head, q->i), f64);
    if (*lse == -INFINITY) {
        *lse = INFINITY;
        *delta = 0;
    }
}

void
sa_grad_load(const sa_grad_group *gg, char *to, int64_t ld, sa_view from, int r, int dim)
{
    const sa_query *const q = &gg->g.s.query[r];
    const sa_tile *const t = gg->g.call->tile;
    t->load_rows(to, ld, sa_view_row(from, gg->g.b, q->head, q->i), from.dtype, 0, 1, dim, 1.0);
    t->fill(to + (size_t)dim * gg->g.call->real_bytes, ld - dim, 0.0);
}

void
sa_grad_key_rows(const sa_grad_group *gg, const sa_key_tile *tile)
{
    const sa_attend_grads *const grads = gg->call->grads;
    for (int x = 0; x < tile->n; x++) {
        if (grads->dk.data != NULL) {
            gg->s.dk_row[x] = sa_view_row(grads->dk, gg->g.b, gg->g.g, tile->keys[x]);
        }
        if (grads->dv.data != NULL) {
            gg->s.dv_row[x] = sa_view_row(grads->dv, gg->g.b, gg->g.g, tile->keys[x]);
        }
    }
}

/* Carves a worker's scratch; with arena NULL only counts the bytes. */
static size_t
carve(const sa_attend_call *call, sa_arena *arena, sa_attend_scratch *a, sa_grad_scratch *s)
{
    const size_t real = call->real_bytes, lanes = (size_t)call->tile->lanes;
    const size_t w = (size_t)call->tile->strip_max, rows = w * SA_GROUP_STRIPS;
    const size_t keys = SA_TILE_KEYS + SA_TILE_STEP, row = SA_MAX(rows, keys + lanes) * real;
    const size_t ld_q = ((size_t)call->p->dim + lanes - 1) / lanes * lanes;
    const size_t ld_v = ((size_t)call->p->dim_v + lanes - 1) / lanes * lanes;
    return sa_attend_carve(call, arena, a) + sa_take(arena, &s->dot, rows * ld_v * real) +
           sa_take(arena, &s->dq, rows * ld_q * real) + sa_take(arena, &s->lse, row) +
           sa_take(arena, &s->delta, row) + sa_take(arena, &s->q, rows * ld_q * real) +
           sa_take(arena, &s->dout, rows * ld_v * real) +
           sa_take(arena, &s->p, SA_GROUP_STRIPS * keys * w * real) +
           sa_take(arena, &s->ds, SA_GROUP_STRIPS * keys * w * real) +
           sa_take(arena, &s->seen, SA_GROUP_STRIPS * keys * w * real) +
           sa_take(arena, &s->capped, keys * w * real) +
           sa_take(arena, &s->dk_row, SA_TILE_KEYS * sizeof(void *)) +
           sa_take(arena, &s->dv_row, SA_TILE_KEYS * sizeof(void *));
}

static void
run_group(sa_group *g, bool few)
{
    sa_grad_group *const gg = (sa_grad_group *)(void *)g;
    (few ? sa_grad_rows : sa_grad_strips)(gg);
}

/* A group of this call, for the part that head belongs to. */
static sa_status
group_begin(sa_ctx *ctx, const sa_grad_call *call, int64_t b, int64_t head, int worker,
            sa_grad_group *gg, const sa_part **part)
{
    const sa_problem *const p = call->call.p;
    int at = 0;
    while (head >= call->call.parts[at].head_end) {
        at++;
    }
    *part = &call->call.parts[at];
    *gg = (sa_grad_group){.call = call, .ds_scale = p->scale};
    gg->g = (sa_group){.ctx = ctx, .call = &call->call, .worker = worker, .run = run_group};
    gg->g.b = b;
    gg->g.g = head * p->kv_heads / p->heads;
    gg->g.plan = (*part)->plan;
    gg->g.key_lo = 0;
    gg->g.key_hi = (int32_t)p->n_k;
    gg->g.masked = gg->g.plan->term_mask && (p->mask.data != NULL || p->key_mask.data != NULL);
    gg->g.terms = p->bias.data != NULL;
    sa_arena_reset(sa_scratch(ctx, worker));
    carve(&call->call, sa_scratch(ctx, worker), &gg->g.s, &gg->s);
    return gg->s.dv_row != NULL
               ? SA_OK
               : sa_fail(ctx, SA_EINTERNAL, "attend_grad: the scratch reserved is too small");
}

/* dk and dv of keys [lo, hi) become 0. */
static void
clear_keys(const sa_grad_call *call, int64_t b, int64_t g, int64_t lo, int64_t hi)
{
    const sa_view views[] = {call->grads->dk, call->grads->dv};
    for (int v = 0; v < 2; v++) {
        for (int64_t j = lo; j < hi && views[v].data != NULL; j++) {
            memset(sa_view_row(views[v], b, g, j), 0,
                   (size_t)views[v].size[3] * call->call.real_bytes);
        }
    }
}

/* Rows of run x and keys of run (x + round) % runs of one kv head. */
static sa_status
grad_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const sa_grad_call *const call = arg;
    const sa_problem *const p = call->call.p;
    const int64_t x = call->runs - 1 - task / call->kv_tasks; /* later rows see more: first */
    const int64_t g = task % call->kv_tasks % p->kv_heads, b = task % call->kv_tasks / p->kv_heads;
    const int64_t group = p->heads / p->kv_heads, y = (x + call->round) % call->runs;
    const int64_t lo = y * call->run_keys, hi = SA_MIN(lo + call->run_keys, p->n_k);
    sa_grad_group gg;
    const sa_part *part;
    const sa_status status = group_begin(ctx, call, b, g * group, worker, &gg, &part);
    if (status != SA_OK) {
        return status;
    }
    if (call->round == 0) {
        clear_keys(call, b, g, lo, hi);
    }
    if (lo >= hi && call->round > 0) {
        return SA_OK;
    }
    gg.sums = call->grads->dk.data != NULL || call->grads->dv.data != NULL;
    gg.g.key_lo = (int32_t)SA_MIN(lo, p->n_k);
    gg.g.key_hi = (int32_t)SA_MAX(hi, gg.g.key_lo);
    const int64_t heads = sa_part_heads(p, part), n_blocks = gg.g.plan->n_blocks;
    for (int64_t head = g * group; head < (g + 1) * group; head += heads) {
        gg.g.map = sa_plan_map(gg.g.plan, b, head);
        const int64_t end = (x + 1) * n_blocks / call->runs;
        for (int64_t block = x * n_blocks / call->runs; block < end; block++) {
            if (sa_stopped(ctx)) {
                return SA_OK;
            }
            sa_group_block(&gg.g, block, true, head, heads);
        }
    }
    return SA_OK;
}

/* ---- dbias -------------------------------------------------------------------------------------
 * One task writes an entry of bias: batches, heads, rows over which bias was broadcast are summed
 * in order inside of the task.
 */

static void
add_bias(sa_view dbias, int64_t b, const sa_query *q, int32_t key, double ds)
{
    void *const row = sa_view_row(dbias, b, q->head, q->i);
    const int64_t at = key * dbias.stride[3];
    if (dbias.dtype == SA_F64) {
        ((double *)row)[at] += ds;
    } else {
        ((float *)row)[at] += (float)ds;
    }
}

static void
bias_sums(sa_grad_group *gg, int r, const sa_key_tile *tile, int a, int n)
{
    const sa_view dbias = gg->call->grads->dbias;
    const size_t bytes = gg->g.call->real_bytes;
    const int first = r < 0 ? gg->strip * gg->w : r;
    const int end = r < 0 ? SA_MIN(first + gg->w, gg->g.n_rows) : r + 1;
    for (int row = first; row < end; row++) {
        for (int x = 0; x < n; x++) {
            const int64_t at =
                r < 0 ? gg->strip * gg->step + (int64_t)(a + x) * gg->w + (row - first) : x;
            add_bias(dbias, gg->g.b, &gg->g.s.query[row], tile->keys[a + x],
                     real_at(gg->s.ds + (size_t)at * bytes, bytes == 8));
        }
    }
}

/* How many tasks share out an axis: all of it is one task's where bias is broadcast over it. */
typedef struct {
    int64_t batches, heads, rows, keys;
} bias_cut;

static bias_cut
cut_bias(const sa_grad_call *call)
{
    const sa_problem *const p = call->call.p;
    const sa_view bias = call->grads->dbias;
    bias_cut c = {1, 1, 1, 1};
    c.batches = bias.stride[0] != 0 ? p->batch : 1;
    c.heads = bias.stride[1] != 0 ? p->heads : 1;
    if (bias.stride[2] != 0 && call->call.n_parts == 1) {
        c.rows = SA_MIN(call->call.parts[0].plan->n_blocks, WANTED_TASKS);
    } else if (bias.stride[3] != 0) {
        c.keys = SA_MAX(1, SA_MIN(p->n_k / LEAST_RUN_KEYS, MOST_RUNS));
    }
    return c;
}

static sa_status
bias_head(sa_ctx *ctx, const sa_grad_call *call, bias_cut cut, int64_t b, int64_t head,
          const int64_t run[2], int worker)
{
    const sa_problem *const p = call->call.p;
    sa_grad_group gg;
    const sa_part *part;
    const sa_status status = group_begin(ctx, call, b, head, worker, &gg, &part);
    if (status != SA_OK) {
        return status;
    }
    gg.ds_scale = 1;
    gg.raw = true;
    gg.bias_sums = bias_sums;
    gg.g.map = sa_plan_map(gg.g.plan, b, head);
    gg.g.key_lo = (int32_t)(run[1] * p->n_k / cut.keys);
    gg.g.key_hi = (int32_t)((run[1] + 1) * p->n_k / cut.keys);
    const int64_t n_blocks = gg.g.plan->n_blocks, end = (run[0] + 1) * n_blocks / cut.rows;
    for (int64_t block = run[0] * n_blocks / cut.rows; block < end && !sa_stopped(ctx); block++) {
        sa_group_block(&gg.g, block, true, head, 1);
    }
    return SA_OK;
}

static sa_status
bias_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const sa_grad_call *const call = arg;
    const sa_problem *const p = call->call.p;
    const bias_cut cut = cut_bias(call);
    const int64_t run[] = {task % cut.rows, task / cut.rows % cut.keys};
    task /= cut.rows * cut.keys;
    const int64_t head = task % cut.heads, b = task / cut.heads;
    sa_status status = SA_OK;
    for (int64_t c = b; c < (cut.batches > 1 ? b + 1 : p->batch); c++) {
        for (int64_t h = head; h < (cut.heads > 1 ? head + 1 : p->heads); h++) {
            if (status == SA_OK) {
                status = bias_head(ctx, call, cut, c, h, run, worker);
            }
        }
    }
    return status;
}

static sa_status
bias_pass(sa_ctx *ctx, const sa_grad_call *given)
{
    sa_attend_grads grads = *given->grads;
    sa_grad_call call = *given;
    grads.dq.data = grads.dk.data = grads.dv.data = NULL;
    call.grads = &grads;
    call.round = 0;
    const bias_cut cut = cut_bias(&call);
    return sa_parallel(ctx, cut.batches * cut.heads * cut.rows * cut.keys, bias_task, &call);
}

/* ---- the call ----------------------------------------------------------------------------------
 */

static sa_status
check_view(sa_ctx *ctx, const char *name, sa_view v, sa_dtype dtype, const int64_t size[4])
{
    for (int a = 0; a < 4 && v.data != NULL; a++) {
        if (v.size[a] != size[a]) {
            return sa_fail(ctx, SA_EINVAL, "%s has %lld entries on axis %d, not %lld", name,
                           (long long)v.size[a], a, (long long)size[a]);
        }
    }
    if (v.data != NULL && v.dtype != dtype) {
        return sa_fail(ctx, SA_ETYPE, "%s must be %s as the gradients are computed in", name,
                       dtype == SA_F64 ? "float64" : "float32");
    }
    return SA_OK;
}

static sa_status
check_grads(sa_ctx *ctx, const sa_attend_grads *g, const sa_problem *p)
{
    const sa_dtype real = sa_real_is_f64(p->q.dtype) ? SA_F64 : SA_F32;
    const int64_t row[] = {p->batch, p->heads, p->n_q, 1};
    const int64_t out[] = {p->batch, p->heads, p->n_q, p->dim_v};
    const int64_t pairs[] = {p->batch, p->heads, p->n_q, p->n_k};
    const int64_t q[] = {p->batch, p->heads, p->n_q, p->dim};
    const int64_t k[] = {p->batch, p->kv_heads, p->n_k, p->dim};
    const int64_t v[] = {p->batch, p->kv_heads, p->n_k, p->dim_v};
    sa_status s = check_view(ctx, "dout", g->dout, g->dout.dtype, out);
    s = s ? s : check_view(ctx, "lse", g->lse, real, row);
    s = s ? s : check_view(ctx, "delta", g->delta, real, row);
    s = s ? s : check_view(ctx, "dq", g->dq, real, q);
    s = s ? s : check_view(ctx, "dk", g->dk, real, k);
    s = s ? s : check_view(ctx, "dv", g->dv, real, v);
    return s ? s : check_view(ctx, "dbias", g->dbias, g->dbias.dtype, pairs);
}

static void
cut_runs(sa_grad_call *call)
{
    const sa_problem *const p = call->call.p;
    int64_t blocks = p->n_q;
    for (int i = 0; i < call->call.n_parts; i++) {
        blocks = SA_MIN(blocks, call->call.parts[i].plan->n_blocks);
    }
    call->kv_tasks = p->batch * p->kv_heads;
    const int64_t many = SA_MIN(WANTED_TASKS / call->kv_tasks, p->n_k / RUN_KEYS);
    const int64_t few = SA_MIN(LEAST_TASKS / call->kv_tasks, p->n_k / LEAST_RUN_KEYS);
    int64_t runs = SA_MAX(many, few);
    runs = SA_MAX(1, SA_MIN(SA_MIN(runs, blocks), MOST_RUNS));
    call->run_keys = ((p->n_k + runs - 1) / runs + SA_TILE_KEYS - 1) / SA_TILE_KEYS * SA_TILE_KEYS;
    call->runs = runs;
}

sa_status
sa_attend_grad(sa_ctx *ctx, const sa_attend_grads *grads, const sa_problem *p, const sa_part *parts,
               int n_parts)
{
    sa_grad_call call = {.grads = grads};
    sa_attend_scratch none;
    sa_grad_scratch nothing;
    call.call = (sa_attend_call){.p = p, .parts = parts, .n_parts = n_parts, .pieces = 1};
    sa_status status = sa_parts_check(ctx, p, parts, n_parts);
    status = status ? status : check_grads(ctx, grads, p);
    if (status != SA_OK || p->batch == 0) {
        return status;
    }
    call.call.tile = sa_tile_for(sa_real_is_f64(p->q.dtype));
    call.call.real_bytes = (size_t)call.call.tile->real_bytes;
    cut_runs(&call);
    status = sa_scratch_reserve(ctx, carve(&call.call, NULL, &none, &nothing) + 64 * SA_ALIGN);
    if (grads->dq.data != NULL || grads->dk.data != NULL || grads->dv.data != NULL) {
        for (; call.round < call.runs && status == SA_OK; call.round++) {
            status = sa_parallel(ctx, call.kv_tasks * call.runs, grad_task, &call);
        }
    }
    return status == SA_OK && grads->dbias.data != NULL ? bias_pass(ctx, &call) : status;
}
