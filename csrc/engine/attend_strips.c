/* attend_strips.c - the tile path: queries in the SIMD lanes, keys and values read where they lie.
 */
#include <math.h>
#include <string.h>

#include "engine/pieces.h"

typedef struct {
    int first, rows, wide; /* query rows of the strip; columns that hold them */
    char *qt, *o, *m, *l;
} strip;

static strip
strip_at(const sa_group *g, int w, int index)
{
    const size_t bytes = g->call->real_bytes;
    const size_t row = (size_t)w * bytes, at = (size_t)index * row;
    const int rows = SA_MIN(w, g->n_rows - index * w), lanes = g->call->tile->lanes;
    return (strip){
        .first = index * w,
        .rows = rows,
        .wide = (rows + lanes - 1) / lanes * lanes,
        .qt = g->s.qt + at * (size_t)g->call->p->dim,
        .o = g->s.o + at * (size_t)g->call->p->dim_v,
        .m = g->s.m + at,
        .l = g->s.l + at,
    };
}

static void
strip_begin(const sa_group *g, int w, strip st)
{
    const sa_problem *const p = g->call->p;
    const sa_tile *const t = g->call->tile;
    const void *row[SA_STRIP_MAX];
    for (int r = 0; r < st.rows; r++) {
        const sa_query *const q = &g->s.query[st.first + r];
        row[r] = sa_view_row(p->q, g->b, q->head, q->i);
    }
    t->load_cols(st.qt, w, row, p->q.dtype, st.rows, (int)p->dim, p->scale);
    t->fill(st.o, p->dim_v * w, 0.0);
    t->fill(st.l, w, 0.0);
    t->fill(st.m, w, -INFINITY);
    for (int r = 0; r < st.rows && p->sink.data != NULL; r++) {
        const size_t at = (size_t)r * g->call->real_bytes;
        sa_group_sink(g, st.first + r, st.m + at, st.l + at);
    }
}

/* Soft-cap and terms of columns [r0, r0 + wide) of a strip, keys x0 .. x0 + n of the tile. */
static void
strip_terms(const sa_group *g, int w, strip st, int r0, int wide, const sa_key_tile *tile, int x0,
            int n, char *s)
{
    const sa_tile *const t = g->call->tile;
    const size_t bytes = g->call->real_bytes;
    const int rows = SA_MAX(0, SA_MIN(wide, st.rows - r0));
    if (g->call->p->softcap > 0) {
        for (int x = 0; x < n; x++) {
            t->softcap(s + (size_t)(x * w) * bytes, wide, g->call->p->softcap);
        }
    }
    if (!g->terms && !g->masked) {
        return;
    }
    sa_group_columns(g, st.first + r0, rows, wide, tile, x0, n, g->s.t, sa_group_terms);
    for (int x = 0; x < n; x++) {
        t->add_term(s + (size_t)(x * w) * bytes, g->s.t + (size_t)(x * wide) * bytes, wide);
    }
}

/* Weights of columns [r0, r0 + wide), keys x0 .. x0 + n of the tile, as far as dropout keeps them.
 */
static void
strip_drop(const sa_group *g, int w, strip st, int r0, int wide, const sa_key_tile *tile, int x0,
           int n)
{
    const sa_tile *const t = g->call->tile;
    const size_t bytes = g->call->real_bytes;
    const int rows = SA_MAX(0, SA_MIN(wide, st.rows - r0));
    sa_group_columns(g, st.first + r0, rows, wide, tile, x0, n, g->s.keep, sa_group_keep);
    for (int x = 0; x < n; x++) {
        t->weigh(g->s.s + (size_t)(x * w) * bytes, g->s.keep + (size_t)(x * wide) * bytes, wide);
    }
}

/* One piece of the tile; clip, when given, hides what rows do not see. */
static void
strip_columns(const sa_group *g, int w, strip st, sa_key_tile *tile, sa_piece at,
              const sa_clip *clip)
{
    const sa_problem *const p = g->call->p;
    const sa_tile *const t = g->call->tile;
    const int x0 = at.a, n = at.b - at.a, r0 = at.r0, wide = at.wide;
    const size_t off = (size_t)r0 * g->call->real_bytes;
    const int dim = (int)p->dim, dim_v = (int)p->dim_v;
    const bool terms = g->terms || (g->masked && tile->kind != SA_TILE_FULL);
    const bool plain = !terms && p->softcap == 0;
    bool whole = !terms && clip == NULL;
    if (!whole && tile->v_finite < 0) {
        tile->v_finite = t->finite(tile->v_row, tile->n, dim_v);
    }
    whole = whole || tile->v_finite == 1;
    if (!plain || !t->scores_exp(g->s.s, st.qt + off, w, wide, tile->k_row + x0, n, dim, st.m + off,
                                 st.l + off, clip)) {
        t->scores(g->s.s, st.qt + off, w, wide, tile->k_row + x0, n, dim);
        if (terms || p->softcap > 0) {
            strip_terms(g, w, st, r0, wide, tile, x0, n, g->s.s);
        }
        if (clip != NULL) {
            t->clip(g->s.s, w, wide, n, clip);
        }
        if (!whole && terms) {
            memcpy(g->s.t, g->s.s, (size_t)(n * w) * g->call->real_bytes);
        }
        t->fold(g->s.s, w, wide, n, st.m + off, st.l + off, st.o + off, dim_v);
    }
    if (!whole && !terms) { /* then a clip alone says what is seen, whatever the scores */
        t->fill(g->s.t, (int64_t)n * w, 0.0);
        t->clip(g->s.t, w, wide, n, clip);
    }
    const void *const *const v_row = tile->v_row + x0;
    if (p->dropout_p > 0) {
        strip_drop(g, w, st, r0, wide, tile, x0, n);
    }
    if (whole) {
        t->values(st.o + off, g->s.s, w, wide, v_row, n, dim_v);
    } else {
        t->values_select(st.o + off, g->s.s, g->s.t, w, wide, v_row, n, dim_v);
    }
}

static void
strip_tile(const sa_group *g, int w, strip st, sa_key_tile *tile, const sa_reaches *reaches)
{
    const int lanes = g->call->tile->lanes;
    int32_t lo[SA_STRIP_MAX], hi[SA_STRIP_MAX];
    sa_piece pieces[SA_MOST_PIECES];
    const sa_tile_sight s = sa_tile_look(reaches, tile, st.first, st.wide, lo, hi);
    const int n = sa_pieces_cut(&s, lanes, st.wide, pieces);
    for (int x = pieces[0].a < pieces[0].b ? 0 : 1; x < n; x++) {
        sa_clip see;
        strip_columns(g, w, st, tile, pieces[x], sa_piece_clip(&s, pieces[x], &see));
    }
}

static void
strip_end(const sa_group *g, int w, strip st)
{
    const sa_attend_call *const call = g->call;
    const sa_tile *const t = call->tile;
    const size_t bytes = call->real_bytes;
    const int dim_v = (int)call->p->dim_v;
    void *row[SA_STRIP_MAX];
    const bool split = call->pieces > 1;
    if (split) {
        t->fill(g->s.factor, w, 1.0);
    } else {
        t->finish(g->s.factor, call->lse.data != NULL ? g->s.lse : NULL, st.m, st.l, st.rows);
    }
    for (int r = 0; r < st.rows; r++) {
        const sa_query *const q = &g->s.query[st.first + r];
        if (split) {
            char *const part = sa_partial_row(call, g->piece, g->b, q);
            memcpy(part, st.m + (size_t)r * bytes, bytes);
            memcpy(part + bytes, st.l + (size_t)r * bytes, bytes);
            row[r] = part + 2 * bytes;
        } else {
            sa_lse_write(call, g->b, q, g->s.lse + (size_t)r * bytes);
            row[r] = sa_view_row(call->out, g->b, q->head, q->i);
        }
    }
    t->store_cols(row, split ? (bytes == 8 ? SA_F64 : SA_F32) : call->out.dtype, st.o, w, st.rows,
                  dim_v, g->s.factor);
}

void
sa_attend_strips(sa_group *g)
{
    const sa_problem *const p = g->call->p;
    const int w = sa_strip_width(g->call->tile, g->n_rows), n = (g->n_rows + w - 1) / w;
    const bool k_here = sa_rows_in_place(&p->k, p->dim, g->call->real_bytes);
    const bool v_here = sa_rows_in_place(&p->v, p->dim_v, g->call->real_bytes);
    sa_cursor cursor = sa_cursor_start(g);
    sa_key_tile tile;
    sa_reaches reaches;
    sa_reaches_start(&reaches, g, n * w);
    for (int x = 0; x < n; x++) {
        strip_begin(g, w, strip_at(g, w, x));
    }
    while (!sa_stop_asked(g->ctx, g->worker) && sa_cursor_next(&cursor, &tile)) {
        sa_tile_rows(g, &tile, k_here, v_here);
        for (int x = 0; x < n; x++) {
            strip_tile(g, w, strip_at(g, w, x), &tile, &reaches);
        }
    }
    for (int x = 0; x < n; x++) {
        strip_end(g, w, strip_at(g, w, x));
    }
}
