/* attend_strips.c - the tile path: queries in the SIMD lanes, keys and values read where they lie.
 */
#include <math.h>
#include <string.h>

#include "engine/attend_call.h"

enum { FIRST_KEYS = 12 }; /* from which a strip has its first maximum */

typedef struct {
    int first, rows, wide; /* query rows of the strip; columns that hold them */
    char *qt, *o, *m, *l;
    unsigned char *warm;
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
        .warm = g->s.warm + index * w,
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
    memset(st.warm, 0, (size_t)w);
    for (int r = 0; r < st.rows && p->sink.data != NULL; r++) {
        const size_t at = (size_t)r * g->call->real_bytes;
        sa_group_sink(g, st.first + r, st.m + at, st.l + at);
    }
}

/* Whether every vector of the columns has met keys before. Without a maximum to be stale the
 * exponentials would have to be done twice. */
static bool
is_warm(const sa_group *g, strip st, int r0, int wide)
{
    bool warm = true;
    for (int r = r0; r < r0 + wide; r += g->call->tile->lanes) {
        warm = warm && st.warm[r];
    }
    return warm;
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

/* Keys [x0, x1) of the tile against columns [r0, r0 + wide); lo and hi, when given, say what the
 * rows see of the tile. */
static void
strip_columns(const sa_group *g, int w, strip st, int r0, int wide, sa_key_tile *tile, int x0,
              int x1, const int32_t *lo, const int32_t *hi)
{
    const sa_problem *const p = g->call->p;
    const sa_tile *const t = g->call->tile;
    const size_t off = (size_t)r0 * g->call->real_bytes;
    const int dim = (int)p->dim, dim_v = (int)p->dim_v;
    const bool terms = g->terms || (g->masked && tile->kind != SA_TILE_FULL);
    const bool plain = !terms && p->softcap == 0;
    if (plain && x1 - x0 > FIRST_KEYS && !is_warm(g, st, r0, wide)) {
        /* A few keys give a maximum, and the others go the short way. */
        strip_columns(g, w, st, r0, wide, tile, x0, x0 + FIRST_KEYS, lo, hi);
        x0 += FIRST_KEYS;
    }
    const int n = x1 - x0;
    const bool cold = !is_warm(g, st, r0, wide);
    const sa_clip see = {x0, lo != NULL ? lo + r0 : NULL, hi != NULL ? hi + r0 : NULL};
    const sa_clip *const clip = lo != NULL ? &see : NULL;
    bool whole = !terms && clip == NULL;
    if (!whole && tile->v_finite < 0) {
        tile->v_finite = t->finite(tile->v_row, tile->n, dim_v);
    }
    whole = whole || tile->v_finite == 1;
    for (int r = r0; r < r0 + wide; r += t->lanes) {
        st.warm[r] = 1;
    }
    if (cold || !plain || !whole ||
        !t->scores_exp(g->s.s, st.qt + off, w, wide, tile->k_row + x0, n, dim, st.m + off,
                       st.l + off, clip)) {
        t->scores(g->s.s, st.qt + off, w, wide, tile->k_row + x0, n, dim);
        if (terms || p->softcap > 0) {
            strip_terms(g, w, st, r0, wide, tile, x0, n, g->s.s);
        }
        if (clip != NULL) {
            t->clip(g->s.s, w, wide, n, clip);
        }
        if (!whole) {
            memcpy(g->s.t, g->s.s, (size_t)(n * w) * g->call->real_bytes);
        }
        t->fold(g->s.s, w, wide, n, st.m + off, st.l + off, st.o + off, dim_v);
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

/* Columns [r0, r0 + wide) against keys [x0, x1), clipped only where some row sees less. */
static void
strip_part(const sa_group *g, int w, strip st, int r0, int wide, sa_key_tile *tile, int x0, int x1,
           const int32_t *lo, const int32_t *hi)
{
    bool clipped = false;
    if (x0 >= x1) {
        return;
    }
    for (int r = r0; r < SA_MIN(r0 + wide, st.rows); r++) {
        clipped = clipped || lo[r] > x0 || hi[r] < x1;
    }
    strip_columns(g, w, st, r0, wide, tile, x0, x1, clipped ? lo : NULL, clipped ? hi : NULL);
}

/* A tile that rows see in part: all columns over the keys that every vector of rows reaches, then
 * each vector over what only it reaches, so that little is computed to be thrown away. */
static void
strip_clipped(const sa_group *g, int w, strip st, sa_key_tile *tile)
{
    const int lanes = g->call->tile->lanes;
    int32_t lo[SA_STRIP_MAX], hi[SA_STRIP_MAX], first[SA_STRIP_MAX], end[SA_STRIP_MAX];
    int32_t a = 0, b = tile->n;
    for (int r0 = 0; r0 < st.wide; r0 += lanes) {
        first[r0] = tile->n;
        end[r0] = 0;
        for (int r = r0; r < r0 + lanes; r++) {
            lo[r] = hi[r] = 0;
            if (r < st.rows) {
                sa_query_range(&g->s.query[st.first + r], tile, &lo[r], &hi[r]);
            }
            if (lo[r] < hi[r]) {
                first[r0] = SA_MIN(first[r0], lo[r]);
                end[r0] = SA_MAX(end[r0], hi[r]);
            }
        }
        a = SA_MAX(a, first[r0]);
        b = SA_MIN(b, end[r0]);
    }
    b = SA_MAX(a, b);
    strip_part(g, w, st, 0, st.wide, tile, a, b, lo, hi);
    for (int r0 = 0; r0 < st.wide; r0 += lanes) {
        strip_part(g, w, st, r0, lanes, tile, first[r0], SA_MIN(a, end[r0]), lo, hi);
        strip_part(g, w, st, r0, lanes, tile, SA_MAX(b, first[r0]), end[r0], lo, hi);
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
    for (int x = 0; x < n; x++) {
        strip_begin(g, w, strip_at(g, w, x));
    }
    while (!sa_stop_asked(g->ctx, g->worker) && sa_cursor_next(&cursor, &tile)) {
        sa_tile_rows(g, &tile, k_here, v_here);
        for (int x = 0; x < n; x++) {
            const strip st = strip_at(g, w, x);
            if (tile.kind == SA_TILE_FULL) {
                strip_columns(g, w, st, 0, st.wide, &tile, 0, tile.n, NULL, NULL);
            } else {
                strip_clipped(g, w, st, &tile);
            }
        }
    }
    for (int x = 0; x < n; x++) {
        strip_end(g, w, strip_at(g, w, x));
    }
}
