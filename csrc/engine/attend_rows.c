/* attend_rows.c - the row path: few query rows (decode, token selections) share one walk over the
 * keys, so that memory hands out each key and value once. */
#include <math.h>
#include <string.h>

#include "engine/attend_call.h"

enum {
    NEAR_BYTES = 16384, /* of K or V at once: with as much of the other, in the first cache */
    FEWEST = 16,        /* keys at once at least                                            */
    NONE = -1           /* no key */
};

/* A walk over the keys. Keys that follow one another are read as runs, `step` of them at once;
 * others are gathered into tiles. */
typedef struct {
    sa_group *g;
    sa_run k, v; /* from key 0 on */
    int step;
    bool plain;       /* a score is scale q.k and no more, a weight its exponential */
    sa_key_tile tile; /* of a run its kind and, where terms ask, the keys at hand */
} row_walk;

/* Keys [lo, hi) of a span, within the piece; of the span under way, what is left. */
typedef struct {
    sa_tile_kind kind;
    int32_t lo, hi;
} key_span;

static key_span
span_at(const sa_cursor *c, int64_t span)
{
    const int32_t start = c->plan->start[span], at = span == c->span ? c->at : -1;
    return (key_span){
        .kind = span < c->see    ? SA_TILE_FULL
                : span < c->band ? SA_TILE_SEE
                                 : SA_TILE_BAND,
        .lo = SA_MAX(at, SA_MAX(start, c->piece_lo)),
        .hi = SA_MIN(start + sa_plan_span_len(c->plan, span), c->piece_hi),
    };
}

/* What a row sees of it. */
static key_span
span_seen(const sa_query *q, key_span span)
{
    const bool band = span.kind == SA_TILE_BAND;
    span.lo = SA_MAX(span.lo, band ? q->band_lo : q->see_lo);
    span.hi = SA_MIN(span.hi, band ? q->band_hi : q->see_hi);
    return span;
}

/* Whether the walk stands at a span worth a run; short full spans are gathered with others. */
static bool
is_run(key_span span)
{
    return span.kind != SA_TILE_FULL || span.hi - span.lo >= FEWEST;
}

static sa_run
run_of(const sa_group *g, sa_view v)
{
    return (sa_run){sa_view_row(v, g->b, g->g, 0), v.stride[2] * (int64_t)sa_dtype_size(v.dtype),
                    v.dtype};
}

static sa_run
run_from(sa_run run, int32_t key)
{
    run.row = (const char *)run.row + key * run.step;
    return run;
}

/* Keys whose K or V stay in the first cache. Sums are rounded step by step: how the rows lie and
 * what they are stored in may not change a bit. */
static int
keys_at_once(int64_t dim, size_t real_bytes)
{
    const int64_t keys = NEAR_BYTES / (dim * (int64_t)real_bytes) / FEWEST * FEWEST;
    return (int)SA_MAX(FEWEST, SA_MIN(keys, SA_TILE_KEYS));
}

static void
walk_start(row_walk *w, sa_group *g)
{
    const sa_problem *const p = g->call->p;
    w->g = g;
    w->k = run_of(g, p->k);
    w->v = run_of(g, p->v);
    w->step = keys_at_once(SA_MAX(p->dim, p->dim_v), g->call->real_bytes);
    w->plain = !g->terms && !g->masked && p->softcap == 0 && p->dropout_p == 0;
}

/* What scratch holds for row r, `reals` reals a row. */
static void *
of_row(const sa_group *g, char *base, int r, int64_t reals)
{
    return base + (size_t)(r * reals) * g->call->real_bytes;
}

static void
row_begin(const sa_group *g, int r)
{
    const sa_problem *const p = g->call->p;
    const sa_query *const q = &g->s.query[r];
    g->call->tile->load_rows(of_row(g, g->s.qt, r, p->dim), p->dim,
                             sa_view_row(p->q, g->b, q->head, q->i), p->q.dtype, 0, 1, (int)p->dim,
                             p->scale);
    g->call->tile->fill(of_row(g, g->s.o, r, p->dim_v), p->dim_v, 0.0);
    sa_group_sink(g, r, of_row(g, g->s.m, r, 1), of_row(g, g->s.l, r, 1));
}

static void
row_end(const sa_group *g, int r)
{
    const sa_attend_call *const call = g->call;
    const sa_query *const q = &g->s.query[r];
    const size_t bytes = call->real_bytes;
    const void *const m = of_row(g, g->s.m, r, 1), *const l = of_row(g, g->s.l, r, 1);
    const void *const o = of_row(g, g->s.o, r, call->p->dim_v);
    if (call->pieces > 1) {
        char *const part = sa_partial_row(call, g->piece, g->b, q);
        memcpy(part, m, bytes);
        memcpy(part + bytes, l, bytes);
        memcpy(part + 2 * bytes, o, (size_t)call->p->dim_v * bytes);
        return;
    }
    call->tile->finish(g->s.factor, call->lse.data != NULL ? g->s.lse : NULL, m, l, 1);
    sa_lse_write(call, g->b, q, g->s.lse);
    call->tile->store_row(sa_view_row(call->out, g->b, q->head, q->i), call->out.dtype, o,
                          (int)call->p->dim_v, g->s.factor);
}

/* Scores of rows [first, first + n_rows) and n keys of the tile from x on become weights: soft-cap,
 * terms, softmax, dropout. Where terms may hide keys, the scores that tell which; else NULL. */
static const void *
rows_weights(const row_walk *w, int first, int n_rows, int x, int n)
{
    const sa_group *const g = w->g;
    const sa_problem *const p = g->call->p;
    const sa_tile *const t = g->call->tile;
    const bool terms = g->terms || (g->masked && w->tile.kind != SA_TILE_FULL);
    for (int r = first; r < first + n_rows; r++) {
        char *const s = of_row(g, g->s.s, r, SA_TILE_KEYS);
        char *const seen = of_row(g, g->s.t, r, SA_TILE_KEYS);
        if (p->softcap > 0) {
            t->softcap(s, n, p->softcap);
        }
        if (terms) {
            sa_group_terms(g, r, &w->tile, x, n, seen);
            t->add_term(s, seen, n);
            memcpy(seen, s, (size_t)n * g->call->real_bytes);
        }
        t->fold_row(s, n, of_row(g, g->s.m, r, 1), of_row(g, g->s.l, r, 1),
                    of_row(g, g->s.o, r, p->dim_v), (int)p->dim_v);
        if (p->dropout_p > 0) {
            sa_group_keep(g, r, &w->tile, x, n, g->s.keep);
            t->weigh(s, g->s.keep, n);
        }
    }
    return terms ? of_row(g, g->s.t, first, SA_TILE_KEYS) : NULL;
}

/* Keys [lo, lo + n) of a run against rows [first, first + n_rows). While K is read V is asked for,
 * and while V is read the keys from `next` on: each then waits in the first cache. */
static void
rows_step(row_walk *w, int first, int n_rows, int32_t lo, int n, int32_t next)
{
    const sa_group *const g = w->g;
    const sa_tile *const t = g->call->tile;
    const int dim = (int)g->call->p->dim, dim_v = (int)g->call->p->dim_v;
    const sa_run k = run_from(w->k, lo), v = run_from(w->v, lo);
    const sa_run ahead = run_from(w->k, SA_MAX(next, 0));
    void *const s = of_row(g, g->s.s, first, SA_TILE_KEYS);
    if (g->terms || g->masked || g->call->p->dropout_p > 0) {
        for (int x = 0; x < n; x++) {
            w->tile.keys[x] = lo + x;
        }
    }
    t->run_dots(s, of_row(g, g->s.qt, first, dim), n_rows, &k, n, dim, &v);
    const void *const seen = rows_weights(w, first, n_rows, 0, n);
    t->run_axpys(of_row(g, g->s.o, first, dim_v), s, seen, n_rows, &v, n, dim_v,
                 next == NONE ? NULL : &ahead);
}

/* Keys [lo, hi) against rows [first, first + n_rows), which see them all; `next` comes after. */
static void
rows_run(row_walk *w, int first, int n_rows, int32_t lo, int32_t hi, int32_t next)
{
    const sa_group *const g = w->g;
    const int dim = (int)g->call->p->dim, dim_v = (int)g->call->p->dim_v;
    const sa_queries rows = {.q = of_row(g, g->s.qt, first, dim),
                             .s = of_row(g, g->s.s, first, SA_TILE_KEYS),
                             .m = of_row(g, g->s.m, first, 1),
                             .l = of_row(g, g->s.l, first, 1),
                             .o = of_row(g, g->s.o, first, dim_v),
                             .n_rows = n_rows,
                             .dim = dim,
                             .dim_v = dim_v};
    bool whole = w->plain;
    for (int32_t j = lo, end; j < hi && !sa_stop_asked(g->ctx, g->worker); j = end) {
        end = SA_MIN(hi, j + (whole ? SA_PIECE_KEYS : w->step));
        const int32_t after = end < hi ? end : next;
        const sa_run k = run_from(w->k, j), v = run_from(w->v, j);
        const sa_run ahead = run_from(w->k, SA_MAX(after, 0));
        if (!whole) {
            rows_step(w, first, n_rows, j, end - j, after);
        } else if (!g->call->tile->run_attend(&rows, &k, &v, end - j, w->step,
                                              after == NONE ? NULL : &ahead)) {
            whole = false;
            end = j;
        }
    }
}

/* A span against all rows: those that see the same keys of it go together. */
static void
rows_span(row_walk *w, key_span span, int32_t next)
{
    const sa_group *const g = w->g;
    w->tile.kind = span.kind;
    if (span.kind == SA_TILE_FULL) {
        rows_run(w, 0, g->n_rows, span.lo, span.hi, next);
        return;
    }
    for (int r = 0, end; r < g->n_rows; r = end) {
        const key_span seen = span_seen(&g->s.query[r], span);
        for (end = r + 1; end < g->n_rows; end++) {
            const key_span other = span_seen(&g->s.query[end], span);
            if (other.lo != seen.lo || other.hi != seen.hi) {
                break;
            }
        }
        rows_run(w, r, end - r, seen.lo, seen.hi, next);
    }
}

/* Keys gathered from short spans, against each row in turn: all rows see them. */
static void
rows_gathered(row_walk *w)
{
    const sa_group *const g = w->g;
    const sa_problem *const p = g->call->p;
    const sa_tile *const t = g->call->tile;
    const size_t real = g->call->real_bytes;
    const int n = w->tile.n;
    sa_tile_rows(g, &w->tile, sa_dtype_size(p->k.dtype) == real, sa_dtype_size(p->v.dtype) == real);
    for (int r = 0; r < g->n_rows; r++) {
        void *const s = of_row(g, g->s.s, r, SA_TILE_KEYS);
        t->dots(s, of_row(g, g->s.qt, r, p->dim), w->tile.k_row, n, (int)p->dim);
        const void *const seen = rows_weights(w, r, 1, 0, n);
        t->axpys(of_row(g, g->s.o, r, p->dim_v), s, seen, w->tile.v_row, n, (int)p->dim_v);
    }
}

void
sa_attend_rows(sa_group *g)
{
    sa_cursor cursor = sa_cursor_start(g);
    row_walk walk;
    walk_start(&walk, g);
    for (int r = 0; r < g->n_rows; r++) {
        row_begin(g, r);
    }
    while (cursor.span < cursor.end && !sa_stop_asked(g->ctx, g->worker)) {
        const key_span span = span_at(&cursor, cursor.span);
        if (span.lo >= span.hi || is_run(span)) {
            cursor.span++;
            cursor.at = -1;
            rows_span(&walk, span,
                      cursor.span < cursor.end ? span_at(&cursor, cursor.span).lo : NONE);
        } else if (sa_cursor_next(&cursor, &walk.tile)) {
            rows_gathered(&walk);
        }
    }
    for (int r = 0; r < g->n_rows; r++) {
        row_end(g, r);
    }
}
