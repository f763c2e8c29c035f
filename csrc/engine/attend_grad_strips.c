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
    int32_t lo[SA_STRIP_MAX], hi[SA_STRIP_MAX];
} sight;

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
    bool finite = true;
    for (int r = 0; r < gg->g.n_rows && rows.at != NULL; r++) {
        const void *const row = rows.at + r * rows.ld * (int64_t)gg->g.call->real_bytes;
        finite = finite && gg->g.call->tile->finite(&row, 1, (int)dim);
    }
    return finite;
}

/* Looked at when a tile first hides keys from rows. */
static bool
rows_finite(sa_grad_group *gg)
{
    const sa_problem *const p = gg->g.call->p;
    if (gg->rows_finite < 0) {
        gg->rows_finite = group_finite(gg, gg->q, p->dim) && group_finite(gg, gg->dout, p->dim_v);
    }
    return gg->rows_finite != 0;
}

static void
strip_begin(const sa_grad_group *gg, strip st)
{
    const sa_group *const g = &gg->g;
    const sa_attend_grads *const grads = gg->call->grads;
    const sa_problem *const p = g->call->p;
    const sa_tile *const t = g->call->tile;
    const size_t bytes = g->call->real_bytes;
    const void *row[SA_STRIP_MAX];
    for (int r = 0; r < st.rows; r++) {
        const sa_query *const q = &g->s.query[st.first + r];
        double lse, delta;
        row[r] = sa_view_row(p->q, g->b, q->head, q->i);
        sa_grad_row(gg, st.first + r, &lse, &delta);
        sa_real_put(st.lse + (size_t)r * bytes, bytes == 8, lse);
        sa_real_put(st.delta + (size_t)r * bytes, bytes == 8, delta);
    }
    t->fill(st.lse + (size_t)st.rows * bytes, gg->w - st.rows, INFINITY); /* lanes without a row */
    t->fill(st.delta + (size_t)st.rows * bytes, gg->w - st.rows, 0.0);
    t->load_cols(st.qt, gg->w, row, p->q.dtype, st.rows, (int)p->dim, p->scale);
    if (grads->dout.data != NULL) {
        for (int r = 0; r < st.rows; r++) {
            const sa_query *const q = &g->s.query[st.first + r];
            row[r] = sa_view_row(grads->dout, g->b, q->head, q->i);
        }
        t->load_cols(st.dot, gg->w, row, grads->dout.dtype, st.rows, (int)p->dim_v, gg->ds_scale);
    }
    if (gg->call->round == 0 || grads->dq.data == NULL) {
        t->fill(st.dq, p->dim * gg->w, 0.0);
        return;
    }
    for (int r = 0; r < st.rows; r++) {
        const sa_query *const q = &g->s.query[st.first + r];
        row[r] = sa_view_row(grads->dq, g->b, q->head, q->i);
    }
    t->load_cols(st.dq, gg->w, row, grads->dq.dtype, st.rows, (int)p->dim, 1.0);
}

static void
strip_end(const sa_grad_group *gg, strip st)
{
    const sa_group *const g = &gg->g;
    const sa_view dq = gg->call->grads->dq;
    void *row[SA_STRIP_MAX];
    for (int r = 0; r < st.rows; r++) {
        const sa_query *const q = &g->s.query[st.first + r];
        row[r] = sa_view_row(dq, g->b, q->head, q->i);
    }
    g->call->tile->fill(g->s.factor, gg->w, 1.0);
    g->call->tile->store_cols(row, dq.dtype, st.dq, gg->w, st.rows, (int)g->call->p->dim,
                              g->s.factor);
}

static sight
look(const sa_grad_group *gg, strip st, const sa_key_tile *tile)
{
    sight s = {.a = 0, .b = tile->n};
    if (tile->kind == SA_TILE_FULL) {
        return s;
    }
    s.a = tile->n;
    s.b = 0;
    for (int r = 0; r < st.wide; r++) {
        s.lo[r] = s.hi[r] = 0;
        if (r < st.rows) {
            sa_query_range(&gg->g.s.query[st.first + r], tile, &s.lo[r], &s.hi[r]);
        }
        if (s.lo[r] < s.hi[r]) {
            s.a = SA_MIN(s.a, s.lo[r]);
            s.b = SA_MAX(s.b, s.hi[r]);
        }
    }
    for (int r = 0; r < st.rows; r++) {
        s.clipped = s.clipped || s.lo[r] > s.a || s.hi[r] < s.b;
    }
    return s;
}

/* p and ds of keys [a, b), whatever happens to scores; seen where wanted. */
static void
weights_any(const sa_grad_group *gg, strip st, const sa_key_tile *tile, const sight *s,
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

/* The same where a score is scale q.k and no more. */
static void
weights_plain(const sa_grad_group *gg, strip st, const sa_key_tile *tile, const sight *s,
              const sa_clip *clip, bool seen)
{
    const sa_problem *const pr = gg->g.call->p;
    const sa_tile *const t = gg->g.call->tile;
    const int n = s->b - s->a, w = gg->w;
    const size_t at = (size_t)(s->a * w) * gg->g.call->real_bytes;
    t->strip_weights(st.p + at, st.qt, w, st.wide, tile->k_row + s->a, n, (int)pr->dim, st.lse,
                     clip);
    t->strip_grads(st.ds + at, st.p + at, st.dot, w, st.wide, tile->v_row + s->a, n, (int)pr->dim_v,
                   st.delta, clip);
    if (seen) {
        t->fill(st.seen + at, (int64_t)n * w, 0.0);
        if (clip != NULL) {
            t->clip(st.seen + at, w, st.wide, n, clip);
        }
    }
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

/* p, ds of one strip and tile, and dq += ds k. */
static void
strip_tile(const sa_grad_group *gg, strip st, const sa_key_tile *tile, const sight *s, bool seen,
           bool k_finite)
{
    const sa_problem *const pr = gg->g.call->p;
    const sa_tile *const t = gg->g.call->tile;
    const int n = s->b - s->a;
    const size_t at = (size_t)(s->a * gg->w) * gg->g.call->real_bytes;
    const sa_clip clip = {s->a, s->lo, s->hi};
    if (n > 0) {
        (gg->plain ? weights_plain : weights_any)(gg, st, tile, s, s->clipped ? &clip : NULL, seen);
    }
    if (n > 0 && gg->call->grads->dq.data != NULL) {
        const void *const *const k_row = tile->k_row + s->a;
        if (k_finite) {
            t->values(st.dq, st.ds + at, gg->w, st.wide, k_row, n, (int)pr->dim);
        } else {
            t->values_select(st.dq, st.ds + at, st.seen + at, gg->w, st.wide, k_row, n,
                             (int)pr->dim);
        }
    }
    clear_rows(gg, st, 0, SA_MIN(s->a, tile->n), seen);
    clear_rows(gg, st, SA_MAX(s->b, SA_MIN(s->a, tile->n)), tile->n, seen);
}

/* dv += p^T dout and dk += ds^T q over keys [a, b) of the tile and the rows of strips
 * [first, last). */
static void
add_sums(const sa_grad_group *gg, int a, int b, int first, int last, bool seen)
{
    const sa_attend_grads *const grads = gg->call->grads;
    const sa_problem *const pr = gg->g.call->p;
    const int64_t bytes = (int64_t)gg->g.call->real_bytes, row = (int64_t)first * gg->w;
    const int64_t at = (first * gg->step + (int64_t)a * gg->w) * bytes;
    sa_strip_sums sums = {
        .seen = seen ? gg->s.seen + at : NULL,
        .step = gg->step,
        .w = gg->w,
        .n_rows = SA_MIN(gg->g.n_rows, last * gg->w) - first * gg->w,
        .n_keys = b - a,
    };
    if (grads->dv.data != NULL && grads->dout.data != NULL) {
        sums.p = gg->s.p + at;
        sums.b = gg->dout.at + row * gg->dout.ld * bytes;
        sums.ldb = gg->dout.ld;
        sums.dim = (int)pr->dim_v;
        gg->g.call->tile->sums(gg->s.dv_row + a, &sums);
    }
    if (grads->dk.data != NULL) {
        sums.p = gg->s.ds + at;
        sums.b = gg->q.at + row * gg->q.ld * bytes;
        sums.ldb = gg->q.ld;
        sums.dim = (int)pr->dim;
        gg->g.call->tile->sums(gg->s.dk_row + a, &sums);
    }
}

/* The sums of a tile, cut where a strip begins or ends to see its keys: range[x] is what strip x
 * sees, and only strips that see keys take part in their sums. */
static void
tile_sums(const sa_grad_group *gg, int n_keys, const int (*range)[2], bool seen)
{
    for (int a = 0; a < n_keys;) {
        int b = n_keys, first = gg->n_strips, last = 0;
        for (int x = 0; x < gg->n_strips; x++) {
            b = range[x][0] > a ? SA_MIN(b, range[x][0]) : b;
            b = range[x][1] > a ? SA_MIN(b, range[x][1]) : b;
            if (range[x][0] <= a && a < range[x][1]) {
                first = SA_MIN(first, x);
                last = x + 1;
            }
        }
        if (first < last) {
            add_sums(gg, a, b, first, last, seen);
        }
        a = b;
    }
}

/* One tile of keys against all strips. */
static void
tile_grads(sa_grad_group *gg, const sa_key_tile *tile)
{
    const sa_tile *const t = gg->g.call->tile;
    const bool hides = tile->kind != SA_TILE_FULL || gg->g.terms;
    const bool k_finite = !hides || t->finite(tile->k_row, tile->n, (int)gg->g.call->p->dim);
    const bool seen = hides && (!rows_finite(gg) || !k_finite);
    int range[SA_GROUP_STRIPS][2];
    for (int x = 0; x < gg->n_strips; x++) {
        const strip st = strip_at(gg, x);
        const sight s = look(gg, st, tile);
        strip_tile(gg, st, tile, &s, seen, k_finite);
        if (gg->bias_sums != NULL && s.a < s.b) {
            gg->strip = x;
            gg->bias_sums(gg, -1, tile, s.a, s.b - s.a);
        }
        range[x][0] = s.a;
        range[x][1] = SA_MAX(s.a, s.b);
    }
    if (gg->sums) {
        sa_grad_clear(gg, tile->keys[tile->n - 1] + 1);
        sa_grad_key_rows(gg, tile);
        tile_sums(gg, tile->n, range, seen && !rows_finite(gg));
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
    gg->rows_finite = -1;
    gg->q = gg->dout = (sa_grad_rows_at){NULL, 0};
    if (grads->dk.data != NULL) {
        gg->q = load_group(gg, gg->s.q, p->q, p->dim);
    }
    if (grads->dv.data != NULL && grads->dout.data != NULL) {
        gg->dout = load_group(gg, gg->s.dout, grads->dout, p->dim_v);
    }
    for (int x = 0; x < gg->n_strips; x++) {
        strip_begin(gg, strip_at(gg, x));
    }
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
