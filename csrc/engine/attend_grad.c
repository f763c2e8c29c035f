/* attend_grad.c - cuts a backward into rounds of tasks by shape; one pass gives dq, dk and dv. */
#include "engine/attend_grad.h"

#include <math.h>
#include <string.h>

#include "base/threads.h"
#include "engine/attend_grad_call.h"

enum {
    WANTED_TASKS = 64, /* keep any number of threads busy                                  */
    VISIT_KEYS = 1024, /* ... with so many keys a visit: a block loads its rows each time;   */
    LEAST_TASKS = 8,   /* where there are few heads, less will do                           */
    MIDDLE_VISIT = 512,
    FEW_TASKS = 4,
    SHORT_VISIT = 128,
    ROW_VISIT = 16, /* the same of one row alone                                        */
    MOST_RUNS = 16,
    BLOCKS_ASKED = 1024 /* of a plan, about how they lie */
};

void
sa_grad_row(const sa_grad_group *gg, const void *lse_at, const void *delta_at, double *lse,
            double *delta)
{
    const bool f64 = gg->g.call->real_bytes == 8;
    *lse = sa_real_at(lse_at, f64);
    *delta = gg->ds_scale * sa_real_at(delta_at, f64);
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
    const sa_view views[] = {gg->call->grads->dk, gg->call->grads->dv};
    void **const rows[] = {gg->s.dk_row, gg->s.dv_row};
    for (int v = 0; v < 2; v++) {
        if (views[v].data == NULL) {
            continue;
        }
        char *const base = sa_view_row(views[v], gg->g.b, gg->g.g, 0);
        const int64_t step = views[v].stride[2] * (int64_t)gg->g.call->real_bytes;
        for (int x = 0; x < tile->n; x++) {
            rows[v][x] = base + tile->keys[x] * step;
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
run_group(sa_group *g, int64_t rows)
{
    sa_grad_group *const gg = (sa_grad_group *)(void *)g;
    (rows <= g->call->tile->lanes / 4 ? sa_grad_rows : sa_grad_strips)(gg);
}

sa_status
sa_grad_group_begin(sa_ctx *ctx, const sa_grad_call *call, int64_t b, int64_t head, int worker,
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

void
sa_grad_clear(sa_grad_group *gg, int64_t end)
{
    const sa_view views[] = {gg->call->grads->dk, gg->call->grads->dv};
    for (int v = 0; v < 2; v++) {
        for (int64_t j = gg->cleared; j < end && views[v].data != NULL; j++) {
            memset(sa_view_row(views[v], gg->g.b, gg->g.g, j), 0,
                   (size_t)views[v].size[3] * gg->g.call->real_bytes);
        }
    }
    gg->cleared = SA_MAX(gg->cleared, end);
}

/* Whether the rows of a block have anything to do in this round: they see keys of it, or it is the
 * first, in which dq is set. */
static bool
has_work(const sa_grad_group *gg, int64_t block)
{
    const sa_plan *const plan = gg->g.plan;
    const int64_t slot = gg->g.map * plan->n_blocks + block;
    bool found = gg->call->round == 0;
    for (int64_t s = plan->row_ptr[slot]; s < plan->row_ptr[slot + 1] && !found; s++) {
        found = plan->start[s] < gg->g.key_hi &&
                plan->start[s] + sa_plan_span_len(plan, s) > gg->g.key_lo;
    }
    return found;
}

/* Block run x of heads [head, head + n) of one map, against the keys of the group. */
static void
run_blocks(sa_grad_group *gg, int64_t x, int64_t head, int64_t n)
{
    const int64_t n_blocks = gg->g.plan->n_blocks, runs = gg->call->runs;
    const int64_t end = (x + 1) * n_blocks / runs;
    int64_t block = x * n_blocks / runs;
    gg->g.map = sa_plan_map(gg->g.plan, gg->g.b, head);
    bool now = block < end && has_work(gg, block);
    for (; block < end && !sa_stopped(gg->g.ctx); block++) {
        const bool next = block + 1 < end && has_work(gg, block + 1);
        if (now) {
            sa_group_block(&gg->g, block, !next, head, n);
        }
        now = next;
    }
}

/* Rows of run x and keys of run (x + round) % runs of one kv head, whose query heads may belong to
 * several parts. */
static sa_status
grad_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const sa_grad_call *const call = arg;
    const sa_problem *const p = call->call.p;
    const int64_t x = call->runs - 1 - task / call->kv_tasks; /* later rows see more: first */
    const int64_t g = task % call->kv_tasks % p->kv_heads, b = task % call->kv_tasks / p->kv_heads;
    const int64_t group = p->heads / p->kv_heads, y = (x + call->round) % call->runs;
    const int64_t lo = y * call->run_keys, hi = SA_MIN(lo + call->run_keys, p->n_k);
    int64_t cleared = call->round == 0 ? lo : hi;
    sa_status status = SA_OK;
    if (lo >= hi && call->round > 0) {
        return SA_OK;
    }
    for (int64_t head = g * group, n; head < (g + 1) * group && status == SA_OK; head += n) {
        sa_grad_group gg;
        const sa_part *part;
        status = sa_grad_group_begin(ctx, call, b, head, worker, &gg, &part);
        n = sa_part_heads(p, part);
        if (status == SA_OK) {
            gg.sums = call->grads->dk.data != NULL || call->grads->dv.data != NULL;
            gg.g.key_lo = (int32_t)SA_MIN(lo, p->n_k);
            gg.g.key_hi = (int32_t)SA_MAX(hi, gg.g.key_lo);
            gg.cleared = cleared;
            run_blocks(&gg, x, head, n);
            if (head + n >= (g + 1) * group) {
                sa_grad_clear(&gg, hi); /* keys that no row sees */
            }
            cleared = gg.cleared;
        }
    }
    return status;
}

/* An array of this dtype, shaped as `like` is; or none. */
static sa_status
check_view(sa_ctx *ctx, const char *name, sa_view v, sa_dtype dtype, const char *like,
           const int64_t size[4])
{
    for (int a = 0; a < 4 && v.data != NULL; a++) {
        if (v.size[a] != size[a]) {
            return sa_fail(ctx, SA_EINVAL,
                           "%s has %lld entries on axis %d and must have %lld; shape it as %s",
                           name, (long long)v.size[a], a, (long long)size[a], like);
        }
    }
    if (v.data != NULL && v.dtype != dtype) {
        return sa_fail(ctx, SA_ETYPE,
                       "%s must be %s, in which gradients of this q are computed; "
                       "convert it first",
                       name, dtype == SA_F64 ? "float64" : "float32");
    }
    return SA_OK;
}

static sa_status
check_grads(sa_ctx *ctx, const sa_attend_grads *g, const sa_problem *p)
{
    const sa_dtype real = sa_real_of(p->q.dtype);
    const sa_dtype sums = g->dbias.dtype == SA_F64 ? SA_F64 : SA_F32;
    const int64_t row[] = {p->batch, p->heads, p->n_q, 1};
    const int64_t out[] = {p->batch, p->heads, p->n_q, p->dim_v};
    const int64_t pairs[] = {p->batch, p->heads, p->n_q, p->n_k};
    sa_status s = check_view(ctx, "dout", g->dout, g->dout.dtype, "out", out);
    s = s ? s : check_view(ctx, "lse", g->lse, real, "the rows of q", row);
    s = s ? s : check_view(ctx, "delta", g->delta, real, "the rows of q", row);
    s = s ? s : check_view(ctx, "dq", g->dq, real, "q", p->q.size);
    s = s ? s : check_view(ctx, "dk", g->dk, real, "k", p->k.size);
    s = s ? s : check_view(ctx, "dv", g->dv, real, "v", p->v.size);
    return s ? s : check_view(ctx, "dbias", g->dbias, sums, "the scores", pairs);
}

/* How the spans of some blocks lie: blocks, pairs of a block and a run of keys in which it has
 * spans, keys of the spans, those of the block that has most. */
typedef struct {
    int64_t blocks, visits, keys, most;
} lie;

static void
add_block(const sa_plan *plan, int64_t slot, int64_t run_keys, lie *sum)
{
    uint32_t met = 0;
    int64_t keys = 0;
    for (int64_t s = plan->row_ptr[slot]; s < plan->row_ptr[slot + 1]; s++) {
        const int64_t len = sa_plan_span_len(plan, s), start = plan->start[s];
        for (int64_t run = start / run_keys; run <= (start + len - 1) / run_keys; run++) {
            met |= 1u << run;
        }
        keys += len;
    }
    sum->blocks += 1;
    sum->visits += __builtin_popcount(met);
    sum->keys += keys;
    sum->most = SA_MAX(sum->most, keys);
}

/* Tokens are selected by contents, and keys that a row does not see may change no bit of it: of
 * such plans only the longest row counts, as if its keys lay anywhere. */
static lie
look_at(const sa_plan *plan, int64_t run_keys, int64_t runs)
{
    const int64_t slots = plan->n_maps * plan->n_blocks;
    lie sum = {0};
    for (int64_t slot = 0; slot < slots; slot += SA_MAX(1, slots / BLOCKS_ASKED)) {
        add_block(plan, slot, run_keys, &sum);
    }
    if (plan->rows_per_block == 1) {
        sum.visits = sum.blocks * SA_MIN(runs, sum.most);
        sum.keys = sum.blocks * sum.most;
    }
    return sum;
}

static int64_t
run_length(int64_t n_k, int64_t runs)
{
    return SA_MAX(1, ((n_k + runs - 1) / runs + SA_TILE_KEYS - 1) / SA_TILE_KEYS) * SA_TILE_KEYS;
}

/* Whether so many runs are worth it: a visit brings enough keys, or hardly any block has a second
 * one. */
static bool
worth(const sa_grad_call *call, int64_t runs)
{
    const int64_t tasks = call->kv_tasks * runs;
    int64_t visits = 0, keys = 0, blocks = 0, rows = 1;
    for (int i = 0; i < call->call.n_parts; i++) {
        const sa_plan *const plan = call->call.parts[i].plan;
        const lie part = look_at(plan, run_length(call->call.p->n_k, runs), runs);
        visits += part.visits;
        keys += part.keys;
        blocks += part.blocks;
        rows = SA_MAX(rows, plan->rows_per_block);
    }
    const int64_t least = rows == 1              ? ROW_VISIT
                          : tasks <= FEW_TASKS   ? SHORT_VISIT
                          : tasks <= LEAST_TASKS ? MIDDLE_VISIT
                                                 : VISIT_KEYS;
    return keys >= least * visits || visits <= blocks + blocks / (tasks <= LEAST_TASKS ? 4 : 8);
}

static void
cut_runs(sa_grad_call *call)
{
    const sa_problem *const p = call->call.p;
    int64_t runs = MOST_RUNS;
    call->kv_tasks = p->batch * p->kv_heads;
    for (int i = 0; i < call->call.n_parts; i++) {
        runs = SA_MIN(runs, call->call.parts[i].plan->n_blocks);
    }
    runs = SA_MIN(SA_MIN(runs, p->n_k / SHORT_VISIT), WANTED_TASKS / call->kv_tasks);
    while (runs > 1 && !worth(call, runs)) {
        runs /= 2;
    }
    call->runs = SA_MAX(runs, 1);
    call->run_keys = run_length(p->n_k, call->runs);
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
    return status == SA_OK && grads->dbias.data != NULL ? sa_grad_bias(ctx, &call) : status;
}
