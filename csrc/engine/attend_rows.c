/* attend_rows.c - the row path: few query rows (token selections, decode), one at a time, straight
 * from K and V. */
#include <math.h>
#include <string.h>

#include "engine/attend_call.h"

/* Keys [a, b) of the tile against row r: dot, terms, fold, axpy. */
static void
row_keys(const sa_group *g, int r, const sa_key_tile *tile, int a, int b)
{
    const sa_problem *const p = g->call->p;
    const sa_tile *const t = g->call->tile;
    t->dots(g->s.s, g->s.qt, tile->k_row + a, b - a, (int)p->dim);
    if (p->softcap > 0) {
        t->softcap(g->s.s, b - a, p->softcap);
    }
    const bool terms = g->terms || (g->masked && tile->kind != SA_TILE_FULL);
    if (terms) {
        sa_group_terms(g, r, tile, a, b - a, g->s.t);
        t->add_term(g->s.s, g->s.t, b - a);
        memcpy(g->s.t, g->s.s, (size_t)(b - a) * g->call->real_bytes);
    }
    t->fold_row(g->s.s, b - a, g->s.m, g->s.l, g->s.o, (int)p->dim_v);
    if (p->dropout_p > 0) {
        sa_group_keep(g, r, tile, a, b - a, g->s.keep);
        t->weigh(g->s.s, g->s.keep, b - a);
    }
    t->axpys(g->s.o, g->s.s, terms ? g->s.t : NULL, tile->v_row + a, b - a, (int)p->dim_v);
}

static void
row_end(const sa_group *g, int r)
{
    const sa_attend_call *const call = g->call;
    const sa_query *const q = &g->s.query[r];
    const size_t bytes = call->real_bytes;
    if (call->pieces > 1) {
        char *const part = sa_partial_row(call, g->piece, g->b, q);
        memcpy(part, g->s.m, bytes);
        memcpy(part + bytes, g->s.l, bytes);
        memcpy(part + 2 * bytes, g->s.o, (size_t)call->p->dim_v * bytes);
        return;
    }
    call->tile->finish(g->s.factor, g->s.lse, g->s.m, g->s.l, 1);
    sa_lse_write(call, g->b, q, g->s.lse);
    call->tile->store_row(sa_view_row(call->out, g->b, q->head, q->i), call->out.dtype, g->s.o,
                          (int)call->p->dim_v, g->s.factor);
}

void
sa_attend_rows(sa_group *g)
{
    const sa_problem *const p = g->call->p;
    const sa_tile *const t = g->call->tile;
    const bool k_here = sa_dtype_size(p->k.dtype) == g->call->real_bytes;
    const bool v_here = sa_dtype_size(p->v.dtype) == g->call->real_bytes;
    for (int r = 0; r < g->n_rows; r++) {
        const sa_query *const q = &g->s.query[r];
        sa_cursor cursor = sa_cursor_start(g);
        sa_key_tile tile;
        t->load_rows(g->s.qt, p->dim, sa_view_row(p->q, g->b, q->head, q->i), p->q.dtype, 0, 1,
                     (int)p->dim, p->scale);
        t->fill(g->s.o, p->dim_v, 0.0);
        sa_group_sink(g, r, g->s.m, g->s.l);
        while (!sa_stop_asked(g->ctx, g->worker) && sa_cursor_next(&cursor, &tile)) {
            int32_t a = 0, b = tile.n;
            if (tile.kind != SA_TILE_FULL) {
                sa_query_range(q, &tile, &a, &b);
            }
            if (a < b) {
                sa_tile_rows(g, &tile, k_here, v_here);
                row_keys(g, r, &tile, a, b);
            }
        }
        row_end(g, r);
    }
}
