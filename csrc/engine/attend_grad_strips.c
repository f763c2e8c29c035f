/* attend_grad_strips.c - the tile path of the backward: queries in the SIMD lanes, five products a
 * tile. The weights come again from the scores and the log-sum-exp; dq stays in the strip, dk and
 * dv are summed over all strips of the group before they meet memory.
 */
#include <math.h>
#include <string.h>

#include "engine/attend_grad_call.h"

typedef struct {
    int first, rows, wide; /* query rows of the strip; columns that hold them */
    char *qt, *dot, *dq, *lse, *delta, *p, *ds, *seen;
} strip;

/* Keys [a, b) of a tile that rows of a strip see, and what each row sees of the tile. */
typedef struct {
    int a, b;
    bool clipped;
    const int32_t *lo, *hi;
} sight;

/* Rows of the group that may see a key of the tile. */
typedef struct {
    int32_t begin[SA_TILE_KEYS], end[SA_TILE_KEYS];
} key_rows;

static strip
strip_at(const sa_grad_group *gg, int x)
{
    const sa_problem *const p = gg->g.call->p;
    const size_t bytes = gg->g.call->real_bytes, row = (size_t)gg->w * bytes, at = (size_t)x * row;
    const size_t tile = (size_t)x * (size_t)gg->step * bytes;
    const int rows = SA_MIN(gg->w, gg->g.n_rows - x * gg->w), lanes = gg->g.call->tile->lanes;
    return (strip){
        .first = x * gg->w,
        .rows = rows,
        .wide = (rows + lanes - 1) / lanes * lanes,
        .qt = gg->g.s.qt + at * (size_t)p->dim,
        .dot = gg->s.dot + at * (size_t)p->dim_v,
        .dq = gg->s.dq + at * (size_t)p->dim,
        .lse = gg->s.lse + at,
        .delta = gg->s.delta + at,
        .p = gg->s.p + tile,
        .ds = gg->s.ds + tile,
        .seen = gg->s.seen + tile,
    };
}

/* The rows of a group as they lie: in place where they are whole vectors of reals of one head, else
 * copied to `copy`. */
static sa_grad_rows_at
load_group(const sa_grad_group *gg, char *copy, sa_view from, int64_t dim)
{
    const sa_query *const first = gg->g.s.query, *const last = first + gg->g.n_rows - 1;
    const int lanes = gg->g.call->tile->lanes;
    const size_t bytes = gg->g.call->real_bytes;
    if (first->head == last->head && dim % lanes == 0 && sa_dtype_size(from.dtype) == bytes) {
        return (sa_grad_rows_at){sa_view_row(from, gg->g.b, first->head, first->i), from.stride[2]};
    }
    const int64_t ld = (dim + lanes - 1) / lanes * lanes;
    for (int r = 0; r < gg->g.n_rows; r++) {
        sa_grad_load(gg, copy + (size_t)(r * ld) * bytes, ld, from, r, (int)dim);
    }
    return (sa_grad_rows_at){copy, ld};
}

static bool
group_finite(const sa_grad_group *gg, sa_grad_rows_at rows, int64_t dim)
{
    const int n = rows.at != NULL ? gg->g.n_rows : 0;
    bool finite = true;
    for (int first = 0; first < n && finite; first += SA_STRIP_MAX) {
        const int some = SA_MIN(SA_STRIP_MAX, n - first);
        const void *row[SA_STRIP_MAX];
        for (int r = 0; r < some; r++) {
            row[r] = rows.at + (first + r) * rows.ld * (int64_t)gg->g.call->real_bytes;
        }
        finite = gg->g.call->tile->finite(row, some, (int)dim);
    }
    return finite;
}

/* Looked at when a tile first hides keys from rows, unless lse and delta have told. */
static bool
rows_finite(sa_grad_group *gg)
{
    const sa_problem *const p = gg->g.call->p;
    if (gg->rows_finite < 0) {
        gg->rows_finite = group_finite(gg, gg->q, p->dim) && group_finite(gg, gg->dout, p->dim_v);
    }
    return gg->rows_finite != 0;
}

/* Addresses of the strip's rows of an array. */
static void
find_addresses(const sa_grad_group *gg, strip st, sa_view v, void **row)
{
    const int64_t step = v.stride[2] * (int64_t)sa_dtype_size(v.dtype);
    for (int r = 0; r < st.rows; r++) {
        const sa_query *const q = &gg->g.s.query[st.first + r];
        row[r] = r > 0 && q->head == q[-1].head ? (char *)row[r - 1] + step
                                                : sa_view_row(v, gg->g.b, q->head, q->i);
    }
}

static void
load_strip(const sa_grad_group *gg, strip st, sa_view from, int64_t dim, double scale, char *to)
{
    void *row[SA_STRIP_MAX];
    find_addresses(gg, st, from, row);
    gg->g.call->tile->load_cols(to, gg->w, (const void *const *)row, from.dtype, st.rows, (int)dim,
                                scale);
}

/* Where scores are scale q.k alone, finite lse and delta say that q and dout are: one infinity or
 * NaN in a row of either makes every product with it infinite or NaN. Returns whether they say so.
 */
static bool
strip_begin(const sa_grad_group *gg, strip st)
{
    const sa_attend_grads *const grads = gg->call->grads;
    const sa_problem *const p = gg->g.call->p;
    const sa_tile *const t = gg->g.call->tile;
    const size_t bytes = gg->g.call->real_bytes;
    void *lse_at[SA_STRIP_MAX], *delta_at[SA_STRIP_MAX];
    find_addresses(gg, st, grads->lse, lse_at);
    find_addresses(gg, st, grads->delta, delta_at);
    bool finite = true;
    for (int r = 0; r < st.rows; r++) {
        double lse, delta;
        sa_grad_row(gg, lse_at[r], delta_at[r], &lse, &delta);
        finite = finite && isfinite(lse) && isfinite(delta);
        sa_real_put(st.lse + (size_t)r * bytes, bytes == 8, lse);
        sa_real_put(st.delta + (size_t)r * bytes, bytes == 8, delta);
    }
    t->fill(st.lse + (size_t)st.rows * bytes, gg->w - st.rows, INFINITY); /* lanes without a row */
    t->fill(st.delta + (size_t)st.rows * bytes, gg->w - st.rows, 0.0);
    load_strip(gg, st, p->q, p->dim, p->scale, st.qt);
    if (grads->dout.data != NULL) {
        load_strip(gg, st, grads->dout, p->dim_v, gg->ds_scale, st.dot);
    }
    if (gg->call->round == 0 || grads->dq.data == NULL) {
        t->fill(st.dq, p->dim * gg->w, 0.0);
    } else {
        load_strip(gg, st, grads->dq, p->dim, 1.0, st.dq);
    }
    return finite;
}

static void
strip_end(const sa_grad_group *gg, strip st)
{
    const sa_view dq = gg->call->grads->dq;
    const sa_tile *const t = gg->g.call->tile;
    void *row[SA_STRIP_MAX];
    find_addresses(gg, st, dq, row);
    t->fill(gg->g.s.factor, gg->w, 1.0);
    t->store_cols(row, dq.dtype, st.dq, gg->w, st.rows, (int)gg->g.call->p->dim, gg->g.s.factor);
}

static sight
look(const sa_grad_group *gg, strip st, const sa_key_tile *tile, int32_t *lo, int32_t *hi)
{
    const sa_grad_sight *const all = tile->kind == SA_TILE_BAND ? &gg->band : &gg->see;
    const int32_t *const row_lo = all->lo + st.first, *const row_hi = all->hi + st.first;
    const int32_t n = tile->n, first = tile->keys[0];
    int32_t a = n, b = 0, most_lo = 0, least_hi = n;
    if (tile->kind == SA_TILE_FULL) {
        return (sight){.a = 0, .b = n, .lo = lo, .hi = hi};
    }
    for (int r = 0; r < st.wide; r++) {
        const int32_t from = SA_MAX(row_lo[r] - first, 0), to = SA_MIN(row_hi[r] - first, n);
        lo[r] = from < to ? from : n;
        hi[r] = from < to ? to : 0;
        a = SA_MIN(a, lo[r]);
        b = SA_MAX(b, hi[r]);
        most_lo = SA_MAX(most_lo, lo[r]);
        least_hi = SA_MIN(least_hi, hi[r]);
    }
    return (sight){a, b, most_lo > a || least_hi < b, lo, hi};
}

/* p and ds of keys [a, b), whatever happens to scores; seen where wanted. */
static void
weights_any(sa_grad_group *gg, strip st, const sa_key_tile *tile, const sight *s,
            const sa_clip *clip, bool seen)
{
    const sa_problem *const pr = gg->g.call->p;
    const sa_tile *const t = gg->g.call->tile;
    const int n = s->b - s->a, w = gg->w;
    const size_t at = (size_t)(s->a * w) * gg->g.call->real_bytes;
    const size_t size = (size_t)(n * w) * gg->g.call->real_bytes;
    const bool drops = pr->dropout_p > 0, caps = pr->softcap > 0;
    t->scores(st.p + at, st.qt, w, st.wide, tile->k_row + s->a, n, (int)pr->dim);
    if (caps) {
        t->softcap(st.p + at, (int64_t)n * w, pr->softcap);
        memcpy(gg->s.capped, st.p + at, size);
    }
    if (gg->g.terms || (gg->g.masked && tile->kind != SA_TILE_FULL)) {
        sa_group_columns(&gg->g, st.first, st.rows, w, tile, s->a, n, gg->g.s.t, sa_group_terms);
        t->add_term(st.p + at, gg->g.s.t, (int64_t)n * w);
    }
    if (clip != NULL) {
        t->clip(st.p + at, w, st.wide, n, clip);
    }
    if (seen) {
        memcpy(st.seen + at, st.p + at, size);
    }
    if (gg->call->grads->dout.data != NULL) {
        t->scores(st.ds + at, st.dot, w, st.wide, tile->v_row + s->a, n, (int)pr->dim_v);
    } else {
        t->fill(st.ds + at, (int64_t)n * w, 0.0);
    }
    if (drops) {
        sa_group_columns(&gg->g, st.first, st.rows, w, tile, s->a, n, gg->g.s.keep, sa_group_keep);
    }
    t->weights_grad(st.p + at, st.ds + at, caps && !gg->raw ? gg->s.capped : NULL,
                    drops ? gg->g.s.keep : NULL, w, st.wide, n, st.lse, st.delta, pr->softcap);
}

/* Rows of p, ds and seen that the strip does not see count as nothing. */
static void
clear_rows(const sa_grad_group *gg, strip st, int from, int to, bool seen)
{
    const sa_tile *const t = gg->g.call->tile;
    const size_t at = (size_t)(from * gg->w) * gg->g.call->real_bytes;
    if (from < to) {
        const int64_t count = (int64_t)(to - from) * gg->w;
        t->fill(st.p + at, count, 0.0);
        t->fill(st.ds + at, count, 0.0);
        if (seen) {
            t->fill(st.seen + at, count, -INFINITY);
        }
    }
}

/* Keys [a, b) of a tile against columns [r0, r0 + wide) of a strip. */
typedef struct {
    int r0, wide, a, b;
} piece;

enum { MOST_PIECES = 1 + SA_STRIP_MAX }; /* two for each vector, of two reals at least */

/* As in the forward: all columns over the keys that every vector of rows reaches, then each vector
 * over what only it reaches, so that little is computed to be thrown away. The first may be empty.
 * Returns how many. */
static int
cut(int lanes, strip st, const sight *s, piece *to)
{
    int n = 1, a = s->a, b = s->b, first[SA_STRIP_MAX], end[SA_STRIP_MAX];
    for (int r0 = 0; r0 < st.wide && s->clipped; r0 += lanes) {
        first[r0] = s->b;
        end[r0] = s->a;
        for (int r = r0; r < r0 + lanes; r++) {
            first[r0] = SA_MIN(first[r0], s->lo[r]);
            end[r0] = SA_MAX(end[r0], s->hi[r]);
        }
        a = SA_MAX(a, first[r0]);
        b = SA_MIN(b, end[r0]);
    }
    to[0] = (piece){0, st.wide, a, SA_MAX(a, b)};
    b = to[0].b;
    for (int r0 = 0; r0 < st.wide && s->clipped; r0 += lanes) {
        to[n] = (piece){r0, lanes, first[r0], SA_MIN(a, end[r0])};
        n += to[n].a < to[n].b;
        to[n] = (piece){r0, lanes, SA_MAX(b, first[r0]), end[r0]};
        n += to[n].a < to[n].b;
    }
    return n;
}

/* p and ds of a piece where a score is scale q.k and no more. */
static void
weights_plain(sa_grad_group *gg, strip st, const sa_key_tile *tile, const sight *s, piece at,
              bool seen)
{
    const sa_problem *const pr = gg->g.call->p;
    const sa_tile *const t = gg->g.call->tile;
    const size_t bytes = gg->g.call->real_bytes, row = (size_t)gg->w * bytes;
    const size_t off = (size_t)at.r0 * bytes, to = (size_t)at.a * row + off;
    const int n = at.b - at.a;
    bool clipped = false;
    for (int r = at.r0; r < at.r0 + at.wide && s->clipped; r++) {
        clipped = clipped || s->lo[r] > at.a || s->hi[r] < at.b;
    }
    const sa_clip see = {at.a, s->lo + at.r0, s->hi + at.r0}, *const clip = clipped ? &see : NULL;
    t->strip_weights(st.p + to, st.qt + off, gg->w, at.wide, tile->k_row + at.a, n, (int)pr->dim,
                     st.lse + off, clip);
    sa_ahead_step(&gg->ahead, &gg->g);
    t->strip_grads(st.ds + to, st.p + to, st.dot + off, gg->w, at.wide, tile->v_row + at.a, n,
                   (int)pr->dim_v, st.delta + off, clip);
    sa_ahead_step(&gg->ahead, &gg->g);
    for (int x = 0; x < n && seen; x++) {
        t->fill(st.seen + to + (size_t)x * row, at.wide, 0.0);
    }
    if (seen && clip != NULL) {
        t->clip(st.seen + to, gg->w, at.wide, n, clip);
    }
}

/* dq += ds k. */
static void
add_dq(sa_grad_group *gg, strip st, const sa_key_tile *tile, piece at, bool k_finite)
{
    const sa_tile *const t = gg->g.call->tile;
    const size_t bytes = gg->g.call->real_bytes, off = (size_t)at.r0 * bytes;
    const size_t from = (size_t)(at.a * gg->w) * bytes + off;
    const void *const *const k_row = tile->k_row + at.a;
    const int n = at.b - at.a, dim = (int)gg->g.call->p->dim;
    if (k_finite) {
        t->values(st.dq + off, st.ds + from, gg->w, at.wide, k_row, n, dim);
    } else {
        t->values_select(st.dq + off, st.ds + from, st.seen + from, gg->w, at.wide, k_row, n, dim);
    }
    sa_ahead_step(&gg->ahead, &gg->g);
}

/* p, ds of one strip and tile, and dq += ds k. */
static void
strip_tile(sa_grad_group *gg, strip st, const sa_key_tile *tile, const sight *s, bool seen,
           bool k_finite)
{
    const sa_clip clip = {s->a, s->lo, s->hi};
    piece pieces[MOST_PIECES];
    const int n = cut(gg->g.call->tile->lanes, st, s, pieces);
    if (gg->plain) {
        clear_rows(gg, st, 0, pieces[0].a, seen);
        clear_rows(gg, st, pieces[0].b, tile->n, seen);
    } else {
        if (s->a < s->b) {
            weights_any(gg, st, tile, s, s->clipped ? &clip : NULL, seen);
        }
        clear_rows(gg, st, 0, s->a, seen);
        clear_rows(gg, st, SA_MAX(s->a, s->b), tile->n, seen);
    }
    for (int x = pieces[0].a < pieces[0].b ? 0 : 1; x < n; x++) {
        if (gg->plain) {
            weights_plain(gg, st, tile, s, pieces[x], seen);
        }
        if (gg->call->grads->dq.data != NULL) {
            add_dq(gg, st, tile, pieces[x], k_finite);
        }
    }
}

/* dv += p^T dout and dk += ds^T q over the keys of the tile and all rows of the group. */
static void
tile_sums(sa_grad_group *gg, int n_keys, const key_rows *rows, bool seen, bool fresh)
{
    const sa_attend_grads *const grads = gg->call->grads;
    const sa_problem *const pr = gg->g.call->p;
    sa_strip_sums sums = {
        .seen = seen ? gg->s.seen : NULL,
        .begin = rows != NULL ? rows->begin : NULL,
        .end = rows != NULL ? rows->end : NULL,
        .step = gg->step,
        .w = gg->w,
        .n_rows = gg->g.n_rows,
        .n_keys = n_keys,
        .fresh = fresh,
    };
    if (grads->dv.data != NULL && grads->dout.data != NULL) {
        sums.p = gg->s.p;
        sums.b = gg->dout.at;
        sums.ldb = gg->dout.ld;
        sums.dim = (int)pr->dim_v;
        gg->g.call->tile->sums(gg->s.dv_row, &sums);
        sa_ahead_step(&gg->ahead, &gg->g);
    }
    if (grads->dk.data != NULL) {
        sums.p = gg->s.ds;
        sums.b = gg->q.at;
        sums.ldb = gg->q.ld;
        sums.dim = (int)pr->dim;
        gg->g.call->tile->sums(gg->s.dk_row, &sums);
        sa_ahead_step(&gg->ahead, &gg->g);
    }
}

/* From the first row that ends behind a key to the last one that begins at it or before. */
static void
find_rows(const sa_grad_group *gg, const int32_t *lo, const int32_t *hi, int n_keys, key_rows *rows)
{
    const int n = gg->g.n_rows;
    for (int j = 0, r = 0; j < n_keys; j++) {
        while (r < n && hi[r] <= j) {
            r++;
        }
        rows->begin[j] = r;
    }
    for (int j = n_keys - 1, r = n; j >= 0; j--) {
        while (r > 0 && lo[r - 1] > j) {
            r--;
        }
        rows->end[j] = r;
    }
}

/* A window meets the keys at its tail again that were at its head some blocks before. */
static bool
keys_finite(sa_grad_group *gg, const sa_key_tile *tile)
{
    const int64_t lo = tile->keys[0], hi = tile->keys[tile->n - 1] + 1;
    const bool one_run = hi - lo == tile->n, joins = lo <= gg->finite_hi && hi >= gg->finite_lo;
    if (one_run && lo >= gg->finite_lo && hi <= gg->finite_hi) {
        return true;
    }
    if (!gg->g.call->tile->finite(tile->k_row, tile->n, (int)gg->g.call->p->dim)) {
        return false;
    }
    if (one_run) {
        gg->finite_lo = joins ? SA_MIN(lo, gg->finite_lo) : lo;
        gg->finite_hi = joins ? SA_MAX(hi, gg->finite_hi) : hi;
    }
    return true;
}

/* Whether nobody has added to dk and dv of the tile's keys, nor set them to 0: then they are set,
 * and need not be read. */
static bool
is_fresh(sa_grad_group *gg, const sa_key_tile *tile)
{
    const sa_attend_grads *const grads = gg->call->grads;
    const int64_t lo = tile->keys[0], hi = tile->keys[tile->n - 1] + 1;
    if (lo < gg->cleared || hi - lo != tile->n ||
        (grads->dv.data != NULL && grads->dout.data == NULL)) {
        return false;
    }
    sa_grad_clear(gg, lo);
    gg->cleared = hi;
    return true;
}

/* One tile of keys against all strips. */
static void
tile_grads(sa_grad_group *gg, const sa_key_tile *tile)
{
    const bool hides = tile->kind != SA_TILE_FULL || gg->g.terms;
    const bool k_finite = !hides || keys_finite(gg, tile);
    const bool seen = hides && (!rows_finite(gg) || !k_finite);
    key_rows rows;
    int32_t lo[SA_STRIP_MAX * SA_GROUP_STRIPS], hi[SA_STRIP_MAX * SA_GROUP_STRIPS];
    for (int x = 0; x < gg->n_strips; x++) {
        const strip st = strip_at(gg, x);
        const sight s = look(gg, st, tile, lo + st.first, hi + st.first);
        strip_tile(gg, st, tile, &s, seen, k_finite);
        if (gg->bias_sums != NULL && s.a < s.b) {
            gg->strip = x;
            gg->bias_sums(gg, -1, tile, s.a, s.b - s.a);
        }
    }
    if (gg->sums) {
        const bool fresh = is_fresh(gg, tile);
        if (!fresh) {
            sa_grad_clear(gg, tile->keys[tile->n - 1] + 1);
        }
        sa_grad_key_rows(gg, tile);
        if (tile->kind != SA_TILE_FULL) {
            find_rows(gg, lo, hi, tile->n, &rows);
        }
        tile_sums(gg, tile->n, tile->kind != SA_TILE_FULL ? &rows : NULL, seen && !rows_finite(gg),
                  fresh);
    }
}

static void
begin(sa_grad_group *gg)
{
    const sa_attend_grads *const grads = gg->call->grads;
    const sa_problem *const p = gg->g.call->p;
    gg->w = sa_strip_width(gg->g.call->tile, gg->g.n_rows);
    gg->n_strips = (gg->g.n_rows + gg->w - 1) / gg->w;
    gg->step = (int64_t)(SA_TILE_KEYS + SA_TILE_STEP) * gg->w;
    gg->plain = !gg->g.terms && !gg->g.masked && p->softcap == 0 && p->dropout_p == 0 &&
                grads->dout.data != NULL;
    gg->q = gg->dout = (sa_grad_rows_at){NULL, 0};
    if (grads->dk.data != NULL) {
        gg->q = load_group(gg, gg->s.q, p->q, p->dim);
    }
    if (grads->dv.data != NULL && grads->dout.data != NULL) {
        gg->dout = load_group(gg, gg->s.dout, grads->dout, p->dim_v);
    }
    for (int r = 0; r < gg->n_strips * gg->w; r++) {
        const sa_query none = {0}, *const q = r < gg->g.n_rows ? &gg->g.s.query[r] : &none;
        gg->see.lo[r] = q->see_lo;
        gg->see.hi[r] = q->see_hi;
        gg->band.lo[r] = q->band_lo;
        gg->band.hi[r] = q->band_hi;
    }
    bool finite = gg->plain && p->sink.data == NULL;
    for (int x = 0; x < gg->n_strips; x++) {
        finite = strip_begin(gg, strip_at(gg, x)) && finite;
    }
    gg->rows_finite = finite ? 1 : -1;
    const sa_view *const of_query[SA_AHEAD_VIEWS] = {&p->q, &grads->dout, &grads->dq};
    const sa_view *const of_key[SA_AHEAD_VIEWS] = {&p->k, &p->v};
    sa_ahead_start(&gg->ahead, &gg->g, of_query, of_key);
}

void
sa_grad_strips(sa_grad_group *gg)
{
    const sa_group *const g = &gg->g;
    const bool k_here = sa_rows_in_place(&g->call->p->k, g->call->p->dim, g->call->real_bytes);
    const bool v_here = sa_rows_in_place(&g->call->p->v, g->call->p->dim_v, g->call->real_bytes);
    sa_cursor cursor = sa_cursor_start(g);
    sa_key_tile tile;
    bool more = sa_cursor_next(&cursor, &tile);
    if (!more && (gg->call->round > 0 || gg->call->grads->dq.data == NULL)) {
        return;
    }
    begin(gg);
    for (; more && !sa_stop_asked(g->ctx, g->worker); more = sa_cursor_next(&cursor, &tile)) {
        sa_tile_rows(g, &tile, k_here, v_here);
        tile_grads(gg, &tile);
    }
    for (int x = 0; x < gg->n_strips && gg->call->grads->dq.data != NULL; x++) {
        strip_end(gg, strip_at(gg, x));
    }
}
