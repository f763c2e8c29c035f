/* strips.c - scores of strips and rows over the keys that a plan shows. */
#include "engine/strips.h"

#include <math.h>

#include "engine/score.h"

sa_group
sa_strips_group(sa_ctx *ctx, const sa_attend_call *call, const sa_plan *plan, int64_t b,
                int64_t head, int worker)
{
    const sa_problem *const p = call->p;
    return (sa_group){
        .ctx = ctx,
        .call = call,
        .plan = plan,
        .b = b,
        .g = head * p->kv_heads / p->heads,
        .map = sa_plan_map(plan, b, head),
        .key_lo = 0,
        .key_hi = (int32_t)p->n_k,
        .worker = worker,
        .masked = plan->term_mask && (p->mask.data != NULL || p->key_mask.data != NULL),
        .terms = p->bias.data != NULL,
    };
}

sa_strip
sa_strip_at(const sa_group *g, int w, int x)
{
    const size_t at = (size_t)(x * w) * g->call->real_bytes;
    const int rows = SA_MIN(w, g->n_rows - x * w), lanes = g->call->tile->lanes;
    return (sa_strip){
        .first = x * w,
        .rows = rows,
        .wide = (rows + lanes - 1) / lanes * lanes,
        .qt = g->s.qt + at * (size_t)g->call->p->dim,
        .lse = g->s.m + at,
    };
}

double
sa_row_lse(const sa_group *g, sa_view lse, const sa_query *q)
{
    const void *const at = sa_view_row(lse, g->b, q->head, q->i);
    const double x = lse.dtype == SA_F64 ? *(const double *)at : (double)*(const float *)at;
    return x == -INFINITY ? INFINITY : x;
}

int
sa_strips_begin(const sa_group *g, sa_view lse)
{
    const sa_problem *const p = g->call->p;
    const sa_tile *const t = g->call->tile;
    const int w = sa_strip_width(t, g->n_rows);
    for (int first = 0; first < g->n_rows; first += w) {
        const sa_strip st = sa_strip_at(g, w, first / w);
        const void *row[SA_STRIP_MAX];
        t->fill(st.lse, w, INFINITY);
        for (int r = 0; r < st.rows; r++) {
            const sa_query *const q = &g->s.query[first + r];
            row[r] = sa_view_row(p->q, g->b, q->head, q->i);
            if (lse.data != NULL) {
                t->fill(st.lse + (size_t)r * g->call->real_bytes, 1, sa_row_lse(g, lse, q));
            }
        }
        t->load_cols(st.qt, w, row, p->q.dtype, st.rows, (int)p->dim, p->scale);
    }
    return w;
}

void
sa_word_tile(const sa_group *g, int64_t word, sa_key_tile *tile)
{
    const sa_problem *const p = g->call->p;
    const int64_t key = word * SA_WORD_KEYS;
    tile->n = (int)SA_MIN(SA_WORD_KEYS, p->n_k - key);
    for (int x = 0; x < tile->n; x++) {
        tile->keys[x] = (int32_t)(key + x);
    }
    sa_tile_rows(g, tile, sa_rows_in_place(&p->k, p->dim, g->call->real_bytes), true);
}

/* One run of ones, or no bit at all. */
static bool
is_run(uint64_t bits)
{
    const uint64_t low = bits == 0 ? 0 : bits >> __builtin_ctzll(bits);
    return (low & (low + 1)) == 0;
}

bool
sa_strip_look(const sa_group *g, const sa_span_bits *bits, sa_strip st, int64_t word, int step,
              sa_strip_sight *see)
{
    const int keys = (int)SA_MIN(SA_WORD_KEYS, g->call->p->n_k - word * SA_WORD_KEYS);
    const uint64_t full = bits->kind[SA_SPAN_FULL][word];
    const bool alike = (bits->kind[SA_SPAN_SEE][word] | bits->kind[SA_SPAN_BAND][word]) == 0;
    uint64_t any = full, all = ~UINT64_C(0);
    for (int r = 0; r < st.rows && !alike; r++) {
        see->seen[r] = sa_span_bits_row(bits, g, &g->s.query[st.first + r], word);
        any |= see->seen[r];
        all &= see->seen[r];
    }
    if (any == 0) {
        return false;
    }
    all = alike ? full : all;
    see->a = __builtin_ctzll(any) / step * step;
    see->b = SA_MIN(keys, (64 - __builtin_clzll(any) + step - 1) / step * step);
    see->whole = st.rows == st.wide && all == sa_ones(see->a, see->b);
    see->runs = true;
    for (int r = 0; r < st.wide && !see->whole; r++) {
        const uint64_t seen = r >= st.rows ? 0 : alike ? full : see->seen[r];
        see->seen[r] = seen;
        see->runs = see->runs && is_run(seen);
        see->lo[r] = seen == 0 ? 0 : __builtin_ctzll(seen);
        see->hi[r] = seen == 0 ? 0 : 64 - __builtin_clzll(seen);
    }
    return true;
}

/* Adds bias, and -inf to what rows do not see, where that is no run of keys. */
static void
add_terms(const sa_group *g, int w, sa_strip st, const sa_key_tile *tile, const sa_strip_sight *see,
          char *s)
{
    const sa_tile *const t = g->call->tile;
    const size_t bytes = g->call->real_bytes;
    const int n = see->b - see->a;
    const void *row[SA_STRIP_MAX];
    for (int r = 0; r < st.wide; r++) {
        char *const at = g->s.t_rows + (size_t)(r * SA_TILE_KEYS) * bytes;
        const uint64_t seen = see->whole ? ~UINT64_C(0) : see->seen[r] >> see->a;
        const sa_query *const q = &g->s.query[st.first + SA_MIN(r, st.rows - 1)];
        sa_score_terms(g->call->p, false, g->b, q->head, q->i, tile->keys + see->a, n, at);
        for (int x = 0; x < n; x++) {
            if (!(seen >> x & 1)) {
                t->fill(at + (size_t)x * bytes, 1, -INFINITY);
            }
        }
        row[r] = at;
    }
    t->load_cols(g->s.t, st.wide, row, bytes == 8 ? SA_F64 : SA_F32, st.wide, n, 1.0);
    for (int x = 0; x < n; x++) {
        t->add_term(s + (size_t)(x * w) * bytes, g->s.t + (size_t)(x * st.wide) * bytes, st.wide);
    }
}

void
sa_strip_scores(const sa_group *g, int w, sa_strip st, const sa_key_tile *tile,
                const sa_strip_sight *see, char *s)
{
    const sa_problem *const p = g->call->p;
    const sa_tile *const t = g->call->tile;
    const int n = see->b - see->a;
    t->scores(s, st.qt, w, st.wide, tile->k_row + see->a, n, (int)p->dim);
    for (int x = 0; x < n && p->softcap > 0; x++) {
        t->softcap(s + (size_t)(x * w) * g->call->real_bytes, st.wide, p->softcap);
    }
    if (g->terms || !see->runs) {
        add_terms(g, w, st, tile, see, s);
    } else if (!see->whole) {
        const sa_clip clip = {see->a, see->lo, see->hi};
        t->clip(s, w, st.wide, n, &clip);
    }
}

sa_row_keys
sa_row_keys_start(const sa_group *g, const sa_query *q, int64_t lo, int64_t hi)
{
    sa_row_keys keys = {.lo = lo, .hi = hi};
    sa_row_runs_start(&keys.runs, g->plan, g->call->p, g->b, q->head, q->i);
    return keys;
}

int
sa_row_keys_next(sa_row_keys *keys, int32_t *key, int most)
{
    int n = 0;
    while (n < most) {
        if (keys->at >= keys->stop) {
            if (!sa_row_runs_next(&keys->runs, &keys->at, &keys->stop) || keys->at >= keys->hi) {
                keys->at = keys->stop = keys->hi; /* the next call ends here too */
                break;
            }
            keys->at = SA_MAX(keys->at, keys->lo);
            keys->stop = SA_MIN(keys->stop, keys->hi);
        }
        while (keys->at < keys->stop && n < most) {
            key[n++] = (int32_t)keys->at++;
        }
    }
    return n;
}

void
sa_row_begin(const sa_group *g, const sa_query *q)
{
    const sa_problem *const p = g->call->p;
    g->call->tile->load_rows(g->s.qt, p->dim, sa_view_row(p->q, g->b, q->head, q->i), p->q.dtype, 0,
                             1, (int)p->dim, p->scale);
}

void
sa_row_scores(const sa_group *g, const sa_query *q, sa_key_tile *tile, char *s)
{
    const sa_problem *const p = g->call->p;
    const sa_tile *const t = g->call->tile;
    sa_tile_rows(g, tile, sa_dtype_size(p->k.dtype) == g->call->real_bytes, true);
    t->dots(s, g->s.qt, tile->k_row, tile->n, (int)p->dim);
    if (p->softcap > 0) {
        t->softcap(s, tile->n, p->softcap);
    }
    if (g->terms) {
        sa_score_terms(p, false, g->b, q->head, q->i, tile->keys, tile->n, g->s.t);
        t->add_term(s, g->s.t, tile->n);
    }
}
