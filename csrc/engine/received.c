/* received.c - the mass that each key received.
 *
 * A task sums a run of keys over a piece of the rows of one head, in an order that depends on
 * shapes alone; pieces are added in order at the end.
 */
#include "engine/received.h"

#include <math.h>

#include "base/threads.h"
#include "engine/strips.h"

enum {
    MANY_TASKS = 32,
    RUN_KEYS = 1024,   /* a run of fewer loads rows of q more often ...  */
    LEAST_KEYS = 128,  /* ... but where there are few heads              */
    LONG_RUN = 4096,   /* of rows alone                                  */
    PIECE_ROWS = 4096, /* of a piece where there are few keys            */
    FEW_PIECES = 16,   /* of plans whose blocks have few rows            */
    LEAST_ROWS = 64
};

typedef struct {
    sa_attend_call call;
    sa_view mass, lse;
    const sa_part *part;
    bool few; /* blocks have so few rows that each row goes alone */
    int64_t runs, run_keys, pieces;
    double *partial; /* [pieces][batch * heads of the part][n_k]; NULL: there is one piece */
} mass_call;

/* A group whose sums stand at acc[(j - key_lo) * step + ..], one a lane where step is `lanes`. */
typedef struct {
    sa_group g;
    const mass_call *call;
    sa_span_bits bits;
    char *acc;
    int64_t step;
} mass_group;

static int64_t
part_heads(const sa_part *part)
{
    return part->head_end - part->head_begin;
}

/* All the scratch of a task; with arena NULL it only counts. */
static size_t
carve(const mass_call *call, sa_arena *arena, mass_group *mg)
{
    const sa_tile *const t = call->call.tile;
    const size_t lanes = call->few ? 1 : (size_t)t->lanes;
    mg->step = (int64_t)lanes;
    return sa_attend_carve(&call->call, arena, &mg->g.s) +
           sa_span_bits_carve(arena, call->call.p->n_k, &mg->bits) +
           sa_take(arena, &mg->acc, (size_t)call->run_keys * lanes * call->call.real_bytes);
}

static char *
sums_of(const mass_group *mg, int64_t key)
{
    return mg->acc + (size_t)((key - mg->g.key_lo) * mg->step) * mg->g.call->real_bytes;
}

static double
get(const void *p, int64_t at, bool f64)
{
    return f64 ? ((const double *)p)[at] : (double)((const float *)p)[at];
}

/* A tile of keys into the sums of its run. */
static void
strip_mass(const mass_group *mg, int w, sa_strip st, const sa_key_tile *tile,
           const sa_strip_sight *see)
{
    const sa_group *const g = &mg->g;
    const sa_problem *const p = g->call->p;
    const sa_tile *const t = g->call->tile;
    const int n = see->b - see->a;
    char *const to = sums_of(mg, tile->keys[see->a]);
    if (g->terms || p->softcap > 0 || !see->runs) {
        sa_strip_scores(g, w, st, tile, see, g->s.s);
        t->received(to, g->s.s, w, st.wide, n, st.lse);
        return;
    }
    const sa_clip clip = {see->a, see->lo, see->hi};
    t->strip_weights(g->s.s, st.qt, w, st.wide, tile->k_row + see->a, n, (int)p->dim, st.lse,
                     see->whole ? NULL : &clip);
    t->received(to, g->s.s, w, st.wide, n, NULL);
}

static void
mass_strips(mass_group *mg)
{
    const sa_group *const g = &mg->g;
    const int w = sa_strips_begin(g, mg->call->lse);
    for (int64_t word = mg->bits.first; word < mg->bits.end && !sa_stop_asked(g->ctx, g->worker);
         word++) {
        sa_key_tile tile;
        sa_word_tile(g, word, &tile);
        for (int x = 0; x * w < g->n_rows; x++) {
            const sa_strip st = sa_strip_at(g, w, x);
            sa_strip_sight see;
            if (sa_strip_look(g, &mg->bits, st, word, 1, &see)) {
                strip_mass(mg, w, st, &tile, &see);
            }
        }
    }
}

static void
add_row(const mass_group *mg, const sa_key_tile *tile, const void *weight)
{
    for (int x = 0; x < tile->n; x++) {
        char *const to = sums_of(mg, tile->keys[x]);
        if (mg->g.call->real_bytes == 8) {
            *(double *)(void *)to += ((const double *)weight)[x];
        } else {
            *(float *)(void *)to += ((const float *)weight)[x];
        }
    }
}

static void
mass_rows(mass_group *mg)
{
    const sa_group *const g = &mg->g;
    const sa_tile *const t = g->call->tile;
    for (int r = 0; r < g->n_rows; r++) {
        const sa_query *const q = &g->s.query[r];
        const double lse = sa_row_lse(g, mg->call->lse, q);
        sa_row_keys keys = sa_row_keys_start(g, q, g->key_lo, g->key_hi);
        sa_key_tile tile;
        sa_row_begin(g, q);
        while (lse != INFINITY && !sa_stop_asked(g->ctx, g->worker) &&
               (tile.n = sa_row_keys_next(&keys, tile.keys, SA_TILE_KEYS)) > 0) {
            sa_row_scores(g, q, &tile, g->s.s);
            /* With lse for the maximum the fold of a row leaves its weights. */
            t->fill(g->s.m, 1, lse);
            t->fill(g->s.l, 1, 0.0);
            t->fold_row(g->s.s, tile.n, g->s.m, g->s.l, g->s.o, 0);
            add_row(mg, &tile, g->s.s);
        }
    }
}

static void
run_group(sa_group *g, int64_t rows)
{
    mass_group *const mg = (mass_group *)(void *)g;
    (mg->call->few || rows <= g->call->tile->lanes / 4 ? mass_rows : mass_strips)(mg);
}

/* The mass of a key, `row` being a head of the part in some batch entry. */
static void
put_mass(const mass_call *call, int64_t row, int64_t key, double sum)
{
    const int64_t heads = part_heads(call->part), head = call->part->head_begin + row % heads;
    void *const to = sa_view_row(call->mass, row / heads, head, key);
    if (call->call.real_bytes == 8) {
        *(double *)to = sum;
    } else {
        *(float *)to = (float)sum;
    }
}

/* Sums over the lanes, to where the task's piece belongs. */
static void
store(const mass_group *mg, int64_t piece, int64_t row)
{
    const mass_call *const call = mg->call;
    const int64_t rows = call->call.p->batch * part_heads(call->part), n_k = call->call.p->n_k;
    for (int64_t key = mg->g.key_lo; key < mg->g.key_hi; key++) {
        const char *const from = sums_of(mg, key);
        double sum = 0;
        for (int64_t i = 0; i < mg->step; i++) {
            sum += get(from, i, call->call.real_bytes == 8);
        }
        if (call->partial == NULL) {
            put_mass(call, row, key, sum);
        } else {
            call->partial[(piece * rows + row) * n_k + key] = sum;
        }
    }
}

/* Earlier keys are seen by more rows under causality: the first tasks are the longest. */
static sa_status
mass_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const mass_call *const call = arg;
    const sa_problem *const p = call->call.p;
    const sa_plan *const plan = call->part->plan;
    const int64_t heads = part_heads(call->part), rows = p->batch * heads;
    const int64_t row = task % rows, run = task / rows / call->pieces,
                  piece = task / rows % call->pieces;
    mass_group mg = {.call = call};
    mg.g = sa_strips_group(ctx, &call->call, plan, row / heads,
                           call->part->head_begin + row % heads, worker);
    mg.g.run = run_group;
    mg.g.key_lo = (int32_t)(run * call->run_keys);
    mg.g.key_hi = (int32_t)SA_MIN(mg.g.key_lo + call->run_keys, p->n_k);
    sa_arena_reset(sa_scratch(ctx, worker));
    carve(call, sa_scratch(ctx, worker), &mg);
    if (mg.acc == NULL) {
        return sa_fail(ctx, SA_EINTERNAL, "mass: the scratch reserved is too small");
    }
    call->call.tile->fill(mg.acc, call->run_keys * mg.step, 0.0);
    const int64_t end = (piece + 1) * plan->n_blocks / call->pieces;
    for (int64_t block = piece * plan->n_blocks / call->pieces; block < end; block++) {
        if (sa_stopped(ctx)) {
            return SA_OK;
        }
        if (!call->few) {
            const int64_t slot = mg.g.map * plan->n_blocks + block;
            sa_span_bits_fill(&mg.bits, plan, slot, mg.g.key_lo, mg.g.key_hi);
        }
        if (call->few || mg.bits.first < mg.bits.end) {
            const int64_t head = call->part->head_begin + row % heads;
            sa_group_block(&mg.g, block, true, head, 1);
        }
    }
    store(&mg, piece, row);
    return SA_OK;
}

/* The pieces of some keys of one head, in order. */
static sa_status
join_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const mass_call *const call = arg;
    const int64_t rows = call->call.p->batch * part_heads(call->part), n_k = call->call.p->n_k;
    const int64_t row = task % rows, begin = task / rows * LONG_RUN;
    (void)ctx, (void)worker;
    for (int64_t key = begin; key < SA_MIN(begin + LONG_RUN, n_k); key++) {
        double sum = 0;
        for (int64_t piece = 0; piece < call->pieces; piece++) {
            sum += call->partial[(piece * rows + row) * n_k + key];
        }
        put_mass(call, row, key, sum);
    }
    return SA_OK;
}

static int64_t
pieces_of(int64_t n, int64_t size)
{
    return (n + size - 1) / size;
}

/* Runs of keys and pieces of rows, by shape. */
static void
cut(mass_call *call)
{
    const sa_problem *const p = call->call.p;
    const sa_plan *const plan = call->part->plan;
    const int64_t heads = p->batch * part_heads(call->part);
    call->few = SA_MIN(plan->rows_per_block, p->n_q) <= SA_MAX(1, call->call.tile->lanes / 4);
    call->pieces = 1;
    if (call->few) { /* a plan of tokens says row by row what is seen: all keys of a row together */
        const int64_t most = pieces_of(p->n_q, LEAST_ROWS);
        call->pieces = SA_MAX(1, SA_MIN(most, FEW_PIECES / heads));
        call->run_keys = heads * call->pieces < SA_FEW_TASKS ? LONG_RUN : p->n_k;
    } else {
        const int64_t fair = p->n_k * heads / MANY_TASKS / LEAST_KEYS * LEAST_KEYS;
        call->run_keys = SA_MAX(LEAST_KEYS, SA_MIN(RUN_KEYS, fair));
        if (heads * pieces_of(p->n_k, call->run_keys) < SA_FEW_TASKS) {
            call->pieces = pieces_of(p->n_q, PIECE_ROWS);
        }
    }
    call->run_keys = SA_MAX(1, SA_MIN(call->run_keys, p->n_k));
    call->runs = pieces_of(p->n_k, call->run_keys);
}

static sa_status
reserve_pieces(sa_ctx *ctx, mass_call *call)
{
    const size_t heads = (size_t)(call->call.p->batch * part_heads(call->part));
    size_t n = 0;
    if (call->pieces > 1 &&
        (!sa_mul((size_t)call->pieces, heads, &n) || !sa_mul(n, (size_t)call->call.p->n_k, &n) ||
         (call->partial = sa_malloc_array(n, sizeof(double))) == NULL)) {
        return sa_fail(ctx, SA_ENOMEM, "mass: no memory for %lld sums of %lld keys",
                       (long long)call->pieces, (long long)call->call.p->n_k);
    }
    return SA_OK;
}

static sa_status
part_mass(sa_ctx *ctx, mass_call *call)
{
    const sa_problem *const p = call->call.p;
    const int64_t heads = p->batch * part_heads(call->part);
    mass_group none;
    cut(call);
    sa_status status = sa_scratch_reserve(ctx, carve(call, NULL, &none) + 32 * SA_ALIGN);
    status = status ? status : reserve_pieces(ctx, call);
    if (status == SA_OK) {
        status = sa_parallel(ctx, heads * call->runs * call->pieces, mass_task, call);
    }
    if (status == SA_OK && call->pieces > 1) {
        status = sa_parallel(ctx, heads * pieces_of(p->n_k, LONG_RUN), join_task, call);
    }
    sa_free(call->partial);
    return status;
}

sa_status
sa_received(sa_ctx *ctx, sa_view mass, sa_view lse, const sa_problem *p, const sa_part *parts,
            int n_parts)
{
    sa_status status = sa_parts_check(ctx, p, parts, n_parts);
    if (status != SA_OK || p->batch == 0 || p->n_k == 0) {
        return status;
    }
    for (int i = 0; i < n_parts && status == SA_OK; i++) {
        mass_call call = {.mass = mass, .lse = lse, .part = &parts[i]};
        call.call = (sa_attend_call){.p = p, .parts = parts, .n_parts = n_parts, .pieces = 1};
        call.call.tile = sa_tile_for(sa_real_is_f64(p->q.dtype));
        call.call.real_bytes = (size_t)call.call.tile->real_bytes;
        status = part_mass(ctx, &call);
    }
    return status;
}
