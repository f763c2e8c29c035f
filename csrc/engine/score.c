/* score.c - score terms, and scores of whole rows for selectors. */
#include "engine/score.h"

#include <math.h>
#include <string.h>

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

enum {
    TERM_KEYS = SA_TILE_KEYS,
    BREATH = 4096,   /* keys of one call for a single row         */
    ASK_BYTES = 4096 /* of keys that memory is asked for in time  */
};

size_t
sa_score_rows_scratch(const sa_problem *p, int64_t rows)
{
    const int64_t tile = SA_MAX(p->dim * SA_STRIP_MAX, rows * SA_TILE_KEYS);
    const size_t reals = (size_t)(rows * p->dim + tile + TERM_KEYS);
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

/* What is scored: n rows q[dim] against keys [j0, j1) of k, into out[row * ld + key - j0]. */
typedef struct {
    const sa_tile *tile;
    sa_run k; /* from key j0 on */
    const void *q;
    char *out;
    int64_t n_keys, ld;
    int n, dim;
} scoring;

static sa_run
keys_from(const scoring *w, int64_t j)
{
    return (sa_run){(const char *)w->k.row + j * w->k.step, w->k.step, w->k.dtype};
}

/* Keys as they lie: a few rows cannot pay for turning them. A single row takes many tiles in a
 * breath. */
static void
score_few(const scoring *w, char *s)
{
    const size_t bytes = (size_t)w->tile->real_bytes;
    const int64_t breath = w->n == 1 ? BREATH : SA_TILE_KEYS;
    const int64_t ask = SA_MAX(1, SA_MIN(ASK_BYTES / SA_MAX(w->k.step, 1), SA_TILE_KEYS));
    const int64_t last = w->n_keys - ask; /* from here on there are no keys to ask for */
    int64_t end;
    for (int64_t j = 0; j < w->n_keys; j = end) {
        end = SA_MIN(j < last ? last : w->n_keys, j + breath);
        const sa_run k = keys_from(w, j), next = keys_from(w, j + ask);
        char *const to = w->out + (size_t)j * bytes;
        w->tile->run_dots(w->n == 1 ? to : s, w->q, w->n, &k, (int)(end - j), w->dim,
                          j < last ? &next : NULL);
        for (int r = 0; r < w->n && w->n > 1; r++) {
            memcpy(to + (size_t)(r * w->ld) * bytes, s + (size_t)(r * SA_TILE_KEYS) * bytes,
                   (size_t)(end - j) * bytes);
        }
    }
}

/* Keys turned a strip at a time, so that they sit in the lanes. */
static void
score_many(const scoring *w, char *keys_t)
{
    const size_t bytes = (size_t)w->tile->real_bytes;
    const int wide = w->tile->strip_max;
    for (int64_t j = 0; j < w->n_keys; j += wide) {
        const void *row[SA_STRIP_MAX];
        const int n = (int)SA_MIN(wide, w->n_keys - j);
        for (int x = 0; x < n; x++) {
            row[x] = (const char *)w->k.row + (j + x) * w->k.step;
        }
        w->tile->load_cols(keys_t, wide, row, w->k.dtype, n, w->dim, 1.0);
        w->tile->product(w->out + (size_t)j * bytes, w->ld, w->q, w->dim, keys_t, wide, w->n, n,
                         w->dim, false);
    }
}

sa_status
sa_score_rows(sa_ctx *ctx, int worker, const sa_problem *p, int64_t b, int64_t h, int64_t i0,
              int64_t i1, int64_t j0, int64_t j1, void *out, int64_t ld)
{
    const sa_tile *const tile = sa_tile_for(sa_real_is_f64(p->q.dtype));
    const int n = (int)(i1 - i0), dim = (int)p->dim;
    sa_arena *const arena = sa_scratch(ctx, worker);
    const size_t mark = arena->used, bytes = (size_t)tile->real_bytes;
    const int64_t room = SA_MAX(p->dim * tile->strip_max, n * (int64_t)SA_TILE_KEYS);
    const int64_t query = n * p->dim; /* a tile of rows, at most 4096 wide */
    void *const q = sa_arena_take_array(arena, (size_t)query, bytes);
    void *const turned = sa_arena_take_array(arena, (size_t)room, bytes);
    void *const terms = sa_arena_take_array(arena, TERM_KEYS, bytes);
    int32_t *const keys = sa_arena_take(arena, TERM_KEYS * sizeof(int32_t));
    if (q == NULL || turned == NULL || terms == NULL || keys == NULL) {
        arena->used = mark;
        return sa_fail(ctx, SA_EINTERNAL, "score_rows: the scratch reserved is too small");
    }
    tile->load_rows(q, dim, sa_view_row(p->q, b, h, i0), p->q.dtype, p->q.stride[2], n, dim,
                    p->scale);
    const scoring work = {
        .tile = tile,
        .k = {sa_view_row(p->k, b, h * p->kv_heads / p->heads, j0),
              p->k.stride[2] * (int64_t)sa_dtype_size(p->k.dtype), p->k.dtype},
        .q = q,
        .out = out,
        .n_keys = j1 - j0,
        .ld = ld,
        .n = n,
        .dim = dim,
    };
    (n <= tile->lanes ? score_few : score_many)(&work, turned);
    for (int64_t i = i0; i < i1; i++) {
        finish_row(tile, p, b, h, i, j0, j1, (char *)out + (size_t)((i - i0) * ld) * bytes, terms,
                   keys);
    }
    arena->used = mark;
    return SA_OK;
}
