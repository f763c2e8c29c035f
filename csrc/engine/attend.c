/* attend.c - cuts a call into tasks by shape and runs the rows pass over each. */
#include "engine/attend.h"

#include <math.h>
#include <string.h>

#include "base/threads.h"
#include "engine/attend_call.h"
#include "engine/dropout.h"
#include "engine/score.h"

sa_cursor
sa_cursor_start(const sa_group *g)
{
    const sa_plan *const plan = g->plan;
    sa_cursor c = {
        .plan = plan,
        .span = plan->row_ptr[g->slot],
        .see = plan->see_ptr[g->slot],
        .band = plan->band_ptr[g->slot],
        .end = plan->row_ptr[g->slot + 1],
        .at = -1,
        .piece_lo = g->key_lo,
        .piece_hi = g->key_hi,
    };
    return c;
}

bool
sa_cursor_next(sa_cursor *c, sa_key_tile *tile)
{
    tile->n = 0;
    tile->v_finite = -1;
    while (c->span < c->end) {
        const sa_tile_kind kind = c->span < c->see    ? SA_TILE_FULL
                                  : c->span < c->band ? SA_TILE_SEE
                                                      : SA_TILE_BAND;
        const int32_t start = c->plan->start[c->span];
        const int32_t stop = SA_MIN(start + sa_plan_span_len(c->plan, c->span), c->piece_hi);
        int32_t at = SA_MAX(c->at, SA_MAX(start, c->piece_lo));
        if (tile->n > 0 && (kind != SA_TILE_FULL || tile->kind != SA_TILE_FULL)) {
            return true;
        }
        tile->kind = kind;
        while (at < stop && tile->n < SA_TILE_KEYS) {
            tile->keys[tile->n++] = at++;
        }
        c->at = at;
        if (at < stop) {
            return true;
        }
        c->span++;
        c->at = -1;
    }
    return tile->n > 0;
}

/* Addresses of the tile's rows of k or v; rows that are not read in place are copied to `copy`. */
static void
row_addresses(const sa_group *g, const sa_key_tile *tile, const sa_view *v, int64_t dim,
              bool in_place, char *copy, const void **row)
{
    const char *const base = sa_view_row(*v, g->b, g->g, 0);
    const int64_t step = v->stride[2] * (int64_t)sa_dtype_size(v->dtype);
    const size_t bytes = g->call->real_bytes * (size_t)dim;
    for (int x = 0; x < tile->n; x++) {
        row[x] = base + tile->keys[x] * step;
    }
    for (int x = 0, n = 0; x < tile->n && !in_place; x += n) {
        char *const to = copy + (size_t)x * bytes;
        for (n = 1; x + n < tile->n && tile->keys[x + n] == tile->keys[x] + n;) {
            n++; /* a run of keys */
        }
        g->call->tile->load_rows(to, dim, row[x], v->dtype, v->stride[2], n, (int)dim, 1.0);
        for (int i = 0; i < n; i++) {
            row[x + i] = to + (size_t)i * bytes;
        }
    }
}

void
sa_tile_rows(const sa_group *g, sa_key_tile *tile, bool k_in_place, bool v_in_place)
{
    const sa_problem *const p = g->call->p;
    row_addresses(g, tile, &p->k, p->dim, k_in_place, g->s.k, tile->k_row);
    row_addresses(g, tile, &p->v, p->dim_v, v_in_place, g->s.v, tile->v_row);
}

void
sa_group_terms(const sa_group *g, int r, const sa_key_tile *tile, int x0, int n, void *t)
{
    const sa_query *const q = &g->s.query[r];
    sa_score_terms(g->call->p, g->masked && tile->kind != SA_TILE_FULL, g->b, q->head, q->i,
                   tile->keys + x0, n, t);
}

void
sa_group_keep(const sa_group *g, int r, const sa_key_tile *tile, int x0, int n, void *keep)
{
    const sa_query *const q = &g->s.query[r];
    sa_dropout_row(g->call->p, g->b, q->head, q->i, tile->keys + x0, n, keep);
}

void
sa_group_columns(const sa_group *g, int first, int rows, int w, const sa_key_tile *tile, int x0,
                 int n, void *to, sa_row_fill *fill)
{
    const size_t bytes = g->call->real_bytes;
    const void *row[SA_STRIP_MAX];
    for (int r = 0; r < rows; r++) {
        char *const at = g->s.t_rows + (size_t)(r * SA_TILE_KEYS) * bytes;
        fill(g, first + r, tile, x0, n, at);
        row[r] = at;
    }
    g->call->tile->load_cols(to, w, row, bytes == 8 ? SA_F64 : SA_F32, rows, n, 1.0);
}

/* A key that all rows see, with value 0: its weight stands in l. The first piece has it. */
void
sa_group_sink(const sa_group *g, int r, void *m, void *l)
{
    const sa_tile *const t = g->call->tile;
    const sa_view sink = g->call->p->sink;
    double score = -INFINITY;
    if (sink.data != NULL && g->piece == 0) {
        const void *const at = sa_view_row(sink, 0, g->s.query[r].head, 0);
        score = sink.dtype == SA_F64 ? *(const double *)at : (double)*(const float *)at;
    }
    t->fill(m, 1, score);
    t->fill(l, 1, score == -INFINITY ? 0.0 : 1.0);
}

char *
sa_partial_row(const sa_attend_call *call, int64_t piece, int64_t b, const sa_query *q)
{
    const sa_problem *const p = call->p;
    const int64_t row = ((piece * p->batch + b) * p->heads + q->head) * p->n_q + q->i;
    return call->partial + (size_t)(row * (p->dim_v + 2)) * call->real_bytes;
}

void
sa_lse_write(const sa_attend_call *call, int64_t b, const sa_query *q, const void *lse)
{
    if (call->lse.data != NULL) {
        memcpy(sa_view_row(call->lse, b, q->head, q->i), lse, call->real_bytes);
    }
}

enum {
    MANY_TASKS = 192, /* enough for any number of threads to end together */
    MOST_BLOCKS = 8,
};

int64_t
sa_part_heads(const sa_problem *p, const sa_part *part)
{
    const int64_t heads = sa_common_divisor(p->heads / p->kv_heads, part->plan->heads_per_map);
    return sa_common_divisor(heads, sa_common_divisor(part->head_begin, part->head_end));
}

/* Heads of a task share keys and map; token plans (one row a block) take 64 blocks a task. Of many
 * blocks some neighbours go to one task, because they share keys. */
static sa_cut
cut_part(const sa_problem *p, const sa_part *part)
{
    sa_cut c;
    c.heads = sa_part_heads(p, part);
    c.head_runs = (part->head_end - part->head_begin) / c.heads;
    c.blocks = SA_MAX(1, 64 / part->plan->rows_per_block);
    const int64_t all = p->batch * c.head_runs * part->plan->n_blocks;
    c.blocks *= SA_MAX(1, SA_MIN(MOST_BLOCKS, all / c.blocks / MANY_TASKS));
    c.block_runs = (part->plan->n_blocks + c.blocks - 1) / c.blocks;
    c.tasks = p->batch * c.head_runs * c.block_runs;
    return c;
}

size_t
sa_take(sa_arena *arena, void *pointer, size_t bytes)
{
    const size_t rounded = (bytes + SA_ALIGN - 1) / SA_ALIGN * SA_ALIGN + 2 * SA_ALIGN;
    if (arena != NULL) {
        void *const memory = sa_arena_take(arena, bytes);
        memcpy(pointer, &memory, sizeof memory);
    }
    return rounded;
}

size_t
sa_attend_carve(const sa_attend_call *call, sa_arena *arena, sa_attend_scratch *s)
{
    const size_t w = (size_t)call->tile->strip_max, rows = w * SA_GROUP_STRIPS,
                 real = call->real_bytes;
    const size_t dim = (size_t)call->p->dim, dim_v = (size_t)call->p->dim_v;
    return sa_take(arena, &s->query, rows * sizeof(sa_query)) + sa_take(arena, &s->warm, rows) +
           sa_take(arena, &s->qt, rows * dim * real) + sa_take(arena, &s->o, rows * dim_v * real) +
           sa_take(arena, &s->m, rows * real) + sa_take(arena, &s->l, rows * real) +
           sa_take(arena, &s->s, (SA_TILE_KEYS + SA_TILE_STEP) * w * real) +
           sa_take(arena, &s->t, SA_TILE_KEYS * w * real) +
           sa_take(arena, &s->t_rows, SA_TILE_KEYS * w * real) +
           sa_take(arena, &s->keep, (SA_TILE_KEYS + SA_TILE_STEP) * w * real) +
           sa_take(arena, &s->k, SA_TILE_KEYS * dim * real) +
           sa_take(arena, &s->v, SA_TILE_KEYS * dim_v * real) +
           sa_take(arena, &s->factor, w * real) + sa_take(arena, &s->lse, w * real);
}

/* In place, and each field once: a copy would wait for the stores of its parts. */
static void
set_query(const sa_group *g, int64_t head, int64_t i, sa_query *q)
{
    const sa_plan *const plan = g->plan;
    const int64_t see = (plan->see_maps > 1 ? g->b : 0) * plan->n_q + i;
    const int32_t see_lo = plan->see_lo[see], see_hi = plan->see_hi[see];
    int32_t band_lo = see_lo, band_hi = see_hi;
    if (plan->band_lo != NULL) {
        const int64_t band = (plan->band_maps > 1 ? g->map : 0) * plan->n_q + i;
        band_lo = SA_MAX(see_lo, plan->band_lo[band]);
        band_hi = SA_MIN(see_hi, plan->band_hi[band]);
    }
    q->head = head;
    q->i = i;
    q->see_lo = see_lo;
    q->see_hi = see_hi;
    q->band_lo = band_lo;
    q->band_hi = band_hi;
}

int32_t
sa_group_sees_to(const sa_group *g, int64_t i)
{
    const sa_plan *const plan = g->plan;
    const int32_t see = plan->see_hi[(plan->see_maps > 1 ? g->b : 0) * plan->n_q + i];
    return plan->band_hi == NULL
               ? see
               : SA_MIN(see, plan->band_hi[(plan->band_maps > 1 ? g->map : 0) * plan->n_q + i]);
}

void
sa_group_block(sa_group *g, int64_t block, bool last, int64_t head, int64_t n_heads)
{
    const sa_plan *const plan = g->plan;
    const sa_tile *const t = g->call->tile;
    const int64_t begin = plan->row_start[block], end = sa_plan_block_end(plan, block);
    const int64_t rows = n_heads * (end - begin), most = (int64_t)t->strip_max * SA_GROUP_STRIPS;
    g->slot = g->map * plan->n_blocks + block;
    g->head = head;
    g->n_heads = n_heads;
    g->next_begin = end;
    g->next_end = last ? end : sa_plan_block_end(plan, block + 1);
    for (int64_t first = 0; first < rows; first += most) {
        g->n_rows = (int)SA_MIN(most, rows - first);
        int64_t h = head + first / (end - begin), i = begin + first % (end - begin);
        for (int r = 0; r < g->n_rows; r++) {
            set_query(g, h, i, &g->s.query[r]);
            if (++i == end) {
                i = begin;
                h++;
            }
        }
        g->run(g, rows);
    }
}

/* Up to a vector of queries take the row path: it lets memory run ahead, and computes for no more
 * queries than there are. What is left over of a larger block stays with the strips. */
static void
run_group(sa_group *g, int64_t rows)
{
    (rows <= g->call->tile->lanes ? sa_attend_rows : sa_attend_strips)(g);
}

static sa_status
run_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const sa_attend_call *const call = arg;
    sa_group g = {
        .ctx = ctx, .call = call, .piece = task % call->pieces, .worker = worker, .run = run_group};
    const int64_t keys = call->pieces > 1 ? SA_PIECE_KEYS : call->p->n_k;
    g.key_lo = (int32_t)(g.piece * keys);
    g.key_hi = (int32_t)SA_MIN(call->p->n_k, g.key_lo + keys);
    int part = 0;
    task /= call->pieces;
    while (task >= call->cuts[part].tasks) {
        task -= call->cuts[part++].tasks;
    }
    const sa_cut *const cut = &call->cuts[part];
    /* Later blocks of a causal plan are the longer ones: they go first. */
    const int64_t run = cut->block_runs - 1 - task % cut->block_runs;
    task /= cut->block_runs;
    const int64_t head = call->parts[part].head_begin + task % cut->head_runs * cut->heads;
    g.b = task / cut->head_runs;
    g.g = head * call->p->kv_heads / call->p->heads;
    g.plan = call->parts[part].plan;
    g.masked = g.plan->term_mask && (call->p->mask.data != NULL || call->p->key_mask.data != NULL);
    g.terms = call->p->bias.data != NULL;
    sa_arena_reset(sa_scratch(ctx, worker));
    sa_attend_carve(call, sa_scratch(ctx, worker), &g.s);
    if (g.s.lse == NULL) {
        return sa_fail(ctx, SA_EINTERNAL, "attend: the scratch reserved is too small");
    }
    g.map = sa_plan_map(g.plan, g.b, head);
    const int64_t end = SA_MIN((run + 1) * cut->blocks, g.plan->n_blocks);
    for (int64_t block = run * cut->blocks; block < end; block++) {
        if (sa_stopped(ctx)) {
            break;
        }
        sa_group_block(&g, block, block + 1 == end, head, cut->heads);
    }
    return SA_OK;
}

/* Joins the pieces of 64 rows in order and writes them. */
static sa_status
join_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const sa_attend_call *const call = arg;
    const sa_problem *const p = call->p;
    const size_t real = call->real_bytes;
    double factor, lse;
    (void)ctx;
    (void)worker;
    for (int64_t row = task * 64; row < SA_MIN((task + 1) * 64, p->batch * p->heads * p->n_q);
         row++) {
        const sa_query q = {.head = row / p->n_q % p->heads, .i = row % p->n_q};
        const int64_t b = row / (p->n_q * p->heads);
        char *const first = sa_partial_row(call, 0, b, &q);
        for (int64_t piece = 1; piece < call->pieces; piece++) {
            const char *const next = sa_partial_row(call, piece, b, &q);
            call->tile->join_row(first, first + real, first + 2 * real, next, next + real,
                                 next + 2 * real, (int)p->dim_v);
        }
        call->tile->finish(&factor, &lse, first, first + real, 1);
        sa_lse_write(call, b, &q, &lse);
        call->tile->store_row(sa_view_row(call->out, b, q.head, q.i), call->out.dtype,
                              first + 2 * real, (int)p->dim_v, &factor);
    }
    return SA_OK;
}

sa_status
sa_parts_check(sa_ctx *ctx, const sa_problem *p, const sa_part *parts, int n_parts)
{
    int64_t covered = 0;
    for (int i = 0; i < n_parts; i++) {
        const sa_plan *const plan = parts[i].plan;
        if (plan->n_q != p->n_q || plan->n_k != p->n_k || plan->heads != p->heads ||
            ((plan->per_batch || plan->see_maps > 1) && plan->batch != p->batch)) {
            return sa_fail(ctx, SA_EINVAL,
                           "plan is for batch %lld, %lld heads, %lld queries, %lld keys, but q and "
                           "k have %lld, %lld, %lld, %lld; "
                           "make the plan from these arrays",
                           (long long)plan->batch, (long long)plan->heads, (long long)plan->n_q,
                           (long long)plan->n_k, (long long)p->batch, (long long)p->heads,
                           (long long)p->n_q, (long long)p->n_k);
        }
        if (parts[i].head_begin != covered || parts[i].head_end <= covered ||
            parts[i].head_end > p->heads) {
            return sa_fail(ctx, SA_EINVAL,
                           "part %d covers heads %lld to %lld, but %lld is next; give every head "
                           "once, in order",
                           i, (long long)parts[i].head_begin, (long long)parts[i].head_end,
                           (long long)covered);
        }
        covered = parts[i].head_end;
    }
    if (covered != p->heads) {
        return sa_fail(ctx, SA_EINVAL, "the parts cover %lld of %lld heads; give every head once",
                       (long long)covered, (long long)p->heads);
    }
    return SA_OK;
}

/* Partial results, when so few tasks would leave threads idle over a long row of keys. */
static sa_status
reserve_pieces(sa_ctx *ctx, sa_attend_call *call, int64_t tasks)
{
    const sa_problem *const p = call->p;
    size_t bytes = 0;
    call->pieces = 1;
    if (tasks >= SA_FEW_TASKS || p->n_k <= SA_PIECE_KEYS) {
        return SA_OK;
    }
    call->pieces = (p->n_k + SA_PIECE_KEYS - 1) / SA_PIECE_KEYS;
    if (!sa_mul((size_t)(p->batch * p->heads), (size_t)p->n_q, &bytes) ||
        !sa_mul(bytes, (size_t)call->pieces, &bytes) ||
        !sa_mul(bytes, (size_t)(p->dim_v + 2) * call->real_bytes, &bytes) ||
        (call->partial = sa_malloc(bytes)) == NULL) {
        return sa_fail(ctx, SA_ENOMEM, "attend: no memory for the partial results of %lld pieces",
                       (long long)call->pieces);
    }
    return SA_OK;
}

sa_status
sa_attend(sa_ctx *ctx, sa_view out, sa_view lse, const sa_problem *p, const sa_part *parts,
          int n_parts)
{
    sa_attend_call call = {.p = p, .out = out, .lse = lse, .parts = parts, .n_parts = n_parts};
    sa_attend_scratch none;
    int64_t tasks = 0;
    sa_status status = sa_parts_check(ctx, p, parts, n_parts);
    if (status != SA_OK || p->batch == 0 || p->n_q == 0) {
        return status;
    }
    call.tile = sa_tile_for(sa_real_is_f64(p->q.dtype));
    call.real_bytes = (size_t)call.tile->real_bytes;
    call.cuts = sa_malloc_array((size_t)n_parts, sizeof(sa_cut));
    if (call.cuts == NULL) {
        return sa_fail(ctx, SA_ENOMEM, "attend: no memory for %d parts", n_parts);
    }
    for (int i = 0; i < n_parts; i++) {
        call.cuts[i] = cut_part(p, &parts[i]);
        tasks += call.cuts[i].tasks;
    }
    status = reserve_pieces(ctx, &call, tasks);
    if (status == SA_OK) {
        status = sa_scratch_reserve(ctx, sa_attend_carve(&call, NULL, &none) + 16 * SA_ALIGN);
    }
    if (status == SA_OK) {
        status = sa_parallel(ctx, tasks * call.pieces, run_task, &call);
    }
    if (status == SA_OK && call.pieces > 1) {
        status = sa_parallel(ctx, (p->batch * p->heads * p->n_q + 63) / 64, join_task, &call);
    }
    sa_free(call.partial);
    sa_free(call.cuts);
    return status;
}
