/* attend_grad_rows.c - the row path of the backward: few query rows, one at a time, straight from K
 * and V. Keys stand where the strips have queries.
 */
#include <math.h>
#include <string.h>

#include "engine/attend_grad_call.h"

/* Scores, dout.v and what they make of it for keys [a, a + n) of the tile; `seen` gets the scores
 * where terms may hide keys. */
static void
row_weights(const sa_grad_group *gg, int r, const sa_key_tile *tile, int a, int n, bool terms)
{
    const sa_problem *const p = gg->g.call->p;
    const sa_tile *const t = gg->g.call->tile;
    const size_t size = (size_t)n * gg->g.call->real_bytes;
    const int lanes = t->lanes, wide = (n + lanes - 1) / lanes * lanes;
    const bool drops = p->dropout_p > 0, caps = p->softcap > 0;
    t->dots(gg->s.p, gg->g.s.qt, tile->k_row + a, n, (int)p->dim);
    if (caps) {
        t->softcap(gg->s.p, n, p->softcap);
        memcpy(gg->s.capped, gg->s.p, size);
    }
    if (terms) {
        sa_group_terms(&gg->g, r, tile, a, n, gg->g.s.t);
        t->add_term(gg->s.p, gg->g.s.t, n);
        memcpy(gg->s.seen, gg->s.p, size);
    }
    if (gg->call->grads->dout.data != NULL) {
        t->dots(gg->s.ds, gg->s.dot, tile->v_row + a, n, (int)p->dim_v);
    } else {
        t->fill(gg->s.ds, n, 0.0);
    }
    if (drops) {
        sa_group_keep(&gg->g, r, tile, a, n, gg->g.s.keep);
    }
    t->weights_grad(gg->s.p, gg->s.ds, caps && !gg->raw ? gg->s.capped : NULL,
                    drops ? gg->g.s.keep : NULL, wide, wide, 1, gg->s.lse, gg->s.delta, p->softcap);
}

static void
row_sums(const sa_grad_group *gg, int a, int n, bool terms)
{
    const sa_attend_grads *const grads = gg->call->grads;
    const sa_problem *const p = gg->g.call->p;
    sa_strip_sums sums = {.w = 1, .n_rows = 1, .n_keys = n};
    sums.seen = terms && !gg->rows_finite ? gg->s.seen : NULL;
    if (grads->dv.data != NULL && grads->dout.data != NULL) {
        sums.p = gg->s.p;
        sums.b = gg->s.dout;
        sums.ldb = p->dim_v;
        sums.dim = (int)p->dim_v;
        gg->g.call->tile->sums(gg->s.dv_row + a, &sums);
    }
    if (grads->dk.data != NULL) {
        sums.p = gg->s.ds;
        sums.b = gg->s.q;
        sums.ldb = p->dim;
        sums.dim = (int)p->dim;
        gg->g.call->tile->sums(gg->s.dk_row + a, &sums);
    }
}

/* Keys [a, a + n) of the tile against row r. */
static void
row_keys(sa_grad_group *gg, int r, const sa_key_tile *tile, int a, int n)
{
    const sa_problem *const p = gg->g.call->p;
    const bool terms = gg->g.terms || (gg->g.masked && tile->kind != SA_TILE_FULL);
    row_weights(gg, r, tile, a, n, terms);
    if (gg->bias_sums != NULL) {
        gg->bias_sums(gg, r, tile, a, n);
    }
    if (gg->call->grads->dq.data != NULL) {
        gg->g.call->tile->axpys(gg->s.dq, gg->s.ds, terms ? gg->s.seen : NULL, tile->k_row + a, n,
                                (int)p->dim);
    }
    if (gg->sums) {
        sa_grad_clear(gg, tile->keys[tile->n - 1] + 1);
        sa_grad_key_rows(gg, tile);
        row_sums(gg, a, n, terms);
    }
}

static int64_t
whole(const sa_tile *t, int64_t dim)
{
    return (dim + t->lanes - 1) / t->lanes * t->lanes;
}

/* q, dout and dq of row r, and its lse and delta for every key of a tile. */
static void
row_begin(sa_grad_group *gg, int r)
{
    const sa_group *const g = &gg->g;
    const sa_attend_grads *const grads = gg->call->grads;
    const sa_problem *const p = g->call->p;
    const sa_tile *const t = g->call->tile;
    const sa_query *const q = &g->s.query[r];
    const void *const rows[] = {gg->s.q, gg->s.dout};
    double lse, delta;
    sa_grad_row(gg, sa_view_row(grads->lse, g->b, q->head, q->i),
                sa_view_row(grads->delta, g->b, q->head, q->i), &lse, &delta);
    t->fill(gg->s.lse, SA_TILE_KEYS, lse);
    t->fill(gg->s.delta, SA_TILE_KEYS, delta);
    const void *const from = sa_view_row(p->q, g->b, q->head, q->i);
    t->load_rows(g->s.qt, p->dim, from, p->q.dtype, 0, 1, (int)p->dim, p->scale);
    sa_grad_load(gg, gg->s.q, whole(t, p->dim), p->q, r, (int)p->dim);
    gg->rows_finite = t->finite(rows, 1, (int)p->dim);
    if (grads->dout.data != NULL) {
        const void *const dout = sa_view_row(grads->dout, g->b, q->head, q->i);
        t->load_rows(gg->s.dot, p->dim_v, dout, grads->dout.dtype, 0, 1, (int)p->dim_v,
                     gg->ds_scale);
        sa_grad_load(gg, gg->s.dout, whole(t, p->dim_v), grads->dout, r, (int)p->dim_v);
        gg->rows_finite = gg->rows_finite && t->finite(rows + 1, 1, (int)p->dim_v);
    }
    t->fill(gg->s.dq, p->dim, 0.0);
    if (gg->call->round > 0 && grads->dq.data != NULL) {
        t->load_rows(gg->s.dq, p->dim, sa_view_row(grads->dq, g->b, q->head, q->i), grads->dq.dtype,
                     0, 1, (int)p->dim, 1.0);
    }
}

void
sa_grad_rows(sa_grad_group *gg)
{
    const sa_group *const g = &gg->g;
    const sa_problem *const p = g->call->p;
    const sa_view dq = gg->call->grads->dq;
    const sa_tile *const t = g->call->tile;
    const bool k_here = sa_dtype_size(p->k.dtype) == g->call->real_bytes;
    const bool v_here = sa_dtype_size(p->v.dtype) == g->call->real_bytes;
    for (int r = 0; r < g->n_rows; r++) {
        const sa_query *const q = &g->s.query[r];
        sa_cursor cursor = sa_cursor_start(g);
        sa_key_tile tile;
        bool more = sa_cursor_next(&cursor, &tile);
        if (!more && gg->call->round > 0) {
            return;
        }
        row_begin(gg, r);
        for (; more && !sa_stop_asked(g->ctx, g->worker); more = sa_cursor_next(&cursor, &tile)) {
            int32_t a = 0, b = tile.n;
            if (tile.kind != SA_TILE_FULL) {
                sa_query_range(q, &tile, &a, &b);
            }
            if (a < b) {
                sa_tile_rows(g, &tile, k_here, v_here);
                row_keys(gg, r, &tile, a, b - a);
            }
        }
        if (dq.data != NULL) {
            t->fill(g->s.factor, 1, 1.0);
            t->store_row(sa_view_row(dq, g->b, q->head, q->i), dq.dtype, gg->s.dq, (int)p->dim,
                         g->s.factor);
        }
    }
}
