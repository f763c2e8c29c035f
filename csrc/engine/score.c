/* score.c - score terms, and scores of whole rows for selectors. */
#include "engine/score.h"

#include <math.h>

#include "tile/tile.h"

#define TERM_REAL float
#define TERM_NAME terms_f32
#include "engine/score_terms.h"
#undef TERM_REAL
#undef TERM_NAME
#define TERM_REAL double
#define TERM_NAME terms_f64
#include "engine/score_terms.h"

void
sa_score_terms(const sa_problem *p, bool masked, int64_t b, int64_t h, int64_t i,
               const int32_t *keys, int n, void *t)
{
    if (sa_real_is_f64(p->q.dtype)) {
        terms_f64(p, masked, b, h, i, keys, n, t);
    } else {
        terms_f32(p, masked, b, h, i, keys, n, t);
    }
}

enum { TERM_KEYS = 64 };

size_t
sa_score_rows_scratch(const sa_problem *p, int64_t rows)
{
    const size_t reals = (size_t)(rows * p->dim + p->dim * SA_STRIP_MAX + TERM_KEYS);
    return reals * (sa_real_is_f64(p->q.dtype) ? 8 : 4) + TERM_KEYS * sizeof(int32_t) +
           8 * SA_ALIGN;
}

/* Soft-cap, then terms, on one row of scores of keys j0 .. j1 - 1. */
static void
finish_row(const sa_tile *tile, const sa_problem *p, int64_t b, int64_t h, int64_t i, int64_t j0,
           int64_t j1, char *s, void *terms, int32_t *keys)
{
    if (p->softcap > 0) {
        tile->softcap(s, j1 - j0, p->softcap);
    }
    if (p->bias.data == NULL && p->mask.data == NULL && p->key_mask.data == NULL) {
        return;
    }
    for (int64_t j = j0; j < j1; j += TERM_KEYS) {
        const int n = (int)SA_MIN(TERM_KEYS, j1 - j);
        for (int x = 0; x < n; x++) {
            keys[x] = (int32_t)(j + x);
        }
        sa_score_terms(p, true, b, h, i, keys, n, terms);
        tile->add_term(s + (j - j0) * tile->real_bytes, terms, n);
    }
}

sa_status
sa_score_rows(sa_ctx *ctx, int worker, const sa_problem *p, int64_t b, int64_t h, int64_t i0,
              int64_t i1, int64_t j0, int64_t j1, void *out, int64_t ld)
{
    const sa_tile *const tile = sa_tile_for(sa_real_is_f64(p->q.dtype));
    const int64_t g = h * p->kv_heads / p->heads;
    const int n = (int)(i1 - i0), dim = (int)p->dim, w = tile->strip_max;
    sa_arena *const arena = sa_scratch(ctx, worker);
    const size_t mark = arena->used;
    const size_t bytes = (size_t)tile->real_bytes;
    void *const q = sa_arena_take(arena, (size_t)(n * p->dim) * bytes);
    void *const keys_t = sa_arena_take(arena, (size_t)(dim * w) * bytes);
    void *const terms = sa_arena_take(arena, TERM_KEYS * bytes);
    int32_t *const keys = sa_arena_take(arena, TERM_KEYS * sizeof(int32_t));
    if (q == NULL || keys_t == NULL || terms == NULL || keys == NULL) {
        arena->used = mark;
        return sa_fail(ctx, SA_EINTERNAL, "score_rows: the scratch reserved is too small");
    }
    tile->load_rows(q, dim, sa_view_row(p->q, b, h, i0), p->q.dtype, p->q.stride[2], n, dim,
                    p->scale);
    for (int64_t j = j0; j < j1; j += w) {
        const void *row[SA_STRIP_MAX];
        const int wide = (int)SA_MIN(w, j1 - j);
        for (int x = 0; x < wide; x++) {
            row[x] = sa_view_row(p->k, b, g, j + x);
        }
        tile->load_cols(keys_t, w, row, p->k.dtype, wide, dim, 1.0);
        tile->product((char *)out + (size_t)(j - j0) * bytes, ld, q, dim, keys_t, w, n, wide, dim,
                      false);
    }
    for (int64_t i = i0; i < i1; i++) {
        finish_row(tile, p, b, h, i, j0, j1, (char *)out + (size_t)((i - i0) * ld) * bytes, terms,
                   keys);
    }
    arena->used = mark;
    return SA_OK;
}
