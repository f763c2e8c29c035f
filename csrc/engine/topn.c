/* topn.c - the largest weights of each row.
 *
 * Weights grow with scores, so scores are ranked. Strips first take the largest score of every
 * group of 8 neighbouring keys. The n largest scores of a row stand in the n groups whose peaks are
 * largest, equal peaks counted by key: only those are scored again, key by key, and ranked. What
 * this costs does not depend on the values.
 */
#include "engine/received.h"

#include <math.h>
#include <string.h>

#include "base/threads.h"
#include "engine/select.h"
#include "engine/strips.h"

enum {
    WORD_GROUPS = SA_WORD_KEYS / SA_PEAK_KEYS,
    TASK_ROWS = 64,
    PEAK_STRIPS = 2, /* whose peaks are kept at a time */
    SURPLUS = 4      /* keys above the level of the peaks that are sorted as they are, in n */
};

typedef struct {
    sa_attend_call call;
    sa_view value, index, lse;
    const sa_part *part;
    int64_t n;      /* wanted, at most n_k       */
    int64_t groups; /* of n_k keys; 0: every key of a row is ranked */
    int64_t listed; /* keys of a row that are ranked, at most */
    int64_t blocks, block_runs;
} top_call;

typedef struct {
    double value;
    int32_t key;
} entry;

typedef struct {
    sa_group g;
    const top_call *call;
    sa_span_bits bits;
    char *peaks, *row_peaks; /* [PEAK_STRIPS][groups][w]; [lanes][groups] */
    char *ones;              /* [w]                                    */
    int32_t *best, *keys;    /* [listed]                               */
    char *scores;            /* [listed + a tile]                      */
    void *select;
    entry *entries; /* [SURPLUS n] */
} top_group;

static size_t
carve(const top_call *call, sa_arena *arena, top_group *tg)
{
    const size_t real = call->call.real_bytes, n = (size_t)call->n;
    const size_t listed = (size_t)call->listed, groups = (size_t)call->groups;
    const size_t lanes = (size_t)call->call.tile->lanes, w = (size_t)call->call.tile->strip_max;
    const size_t select = sa_select_scratch(SA_MAX(call->listed, call->groups), call->n);
    return sa_attend_carve(&call->call, arena, &tg->g.s) +
           sa_span_bits_carve(arena, call->groups > 0 ? call->call.p->n_k : 0, &tg->bits) +
           sa_take(arena, &tg->peaks, PEAK_STRIPS * w * groups * real) +
           sa_take(arena, &tg->row_peaks, lanes * groups * real) +
           sa_take(arena, &tg->ones, SA_STRIP_MAX * real) +
           sa_take(arena, &tg->best, listed * sizeof(int32_t)) +
           sa_take(arena, &tg->keys, listed * sizeof(int32_t)) +
           sa_take(arena, &tg->scores, (listed + SA_TILE_KEYS) * real) +
           sa_take(arena, &tg->select, select) +
           sa_take(arena, &tg->entries, SURPLUS * n * sizeof(entry));
}

static int64_t
largest(const top_group *tg, const void *s, int64_t n)
{
    return tg->g.call->real_bytes == 8
               ? sa_select_largest_f64(s, n, tg->call->n, tg->best, tg->select)
               : sa_select_largest_f32(s, n, tg->call->n, tg->best, tg->select);
}

/* Whether a stands before b: larger, or equal with a lower key. */
static bool
before(entry a, entry b)
{
    return a.value > b.value || (a.value == b.value && a.key < b.key);
}

/* Shell's sort: few entries, nearly in order once gaps are small. */
static void
sort(entry *e, int64_t n)
{
    for (int64_t gap = n / 2; gap > 0; gap = gap == 2 ? 1 : gap * 5 / 11) {
        for (int64_t i = gap; i < n; i++) {
            const entry x = e[i];
            int64_t at = i;
            for (; at >= gap && before(x, e[at - gap]); at -= gap) {
                e[at] = e[at - gap];
            }
            e[at] = x;
        }
    }
}

/* The row's entries, then nothing. */
static void
write_row(const top_group *tg, const sa_query *q, int64_t found)
{
    const top_call *const call = tg->call;
    void *const value = sa_view_row(call->value, tg->g.b, q->head, q->i);
    int64_t *const index = sa_view_row(call->index, tg->g.b, q->head, q->i);
    for (int64_t x = 0; x < call->value.size[3]; x++) {
        const entry e = x < found ? tg->entries[x] : (entry){0, -1};
        index[x] = e.key;
        if (call->value.dtype == SA_F64) {
            ((double *)value)[x] = e.value;
        } else {
            ((float *)value)[x] = (float)e.value;
        }
    }
}

static double
get(const top_group *tg, const void *s, int64_t at)
{
    return tg->g.call->real_bytes == 8 ? ((const double *)s)[at] : (double)((const float *)s)[at];
}

/* Places of the n best of `count` scores, ascending, or of a few more. At least n reach the level,
 * but for the rounding of sums in another order. */
static int64_t
best_places(const top_group *tg, int64_t count, double level)
{
    const int64_t n = tg->call->n;
    if (level > -INFINITY) {
        const int64_t found = tg->g.call->tile->compress_ge(tg->scores, count, level, tg->best);
        if (found >= n && found <= SURPLUS * n) {
            return found;
        }
    }
    return largest(tg, tg->scores, count);
}

/* Ranks `count` keys of one row, ascending in tg->keys, and writes the best. */
static void
rank_row(const top_group *tg, const sa_query *q, double lse, int64_t count, double level)
{
    const sa_group *const g = &tg->g;
    sa_key_tile tile;
    sa_row_begin(g, q);
    for (int64_t x = 0; x < count; x += tile.n) {
        tile.n = (int)SA_MIN(SA_TILE_KEYS, count - x);
        memcpy(tile.keys, tg->keys + x, (size_t)tile.n * sizeof(int32_t));
        sa_row_scores(g, q, &tile, tg->scores + (size_t)x * g->call->real_bytes);
    }
    int64_t found = best_places(tg, count, level);
    for (int64_t x = 0; x < found; x++) {
        const int32_t at = tg->best[x];
        tg->entries[x] = (entry){get(tg, tg->scores, at), tg->keys[at]};
    }
    sort(tg->entries, found);
    found = SA_MIN(found, tg->call->n);
    bool ordered = true;
    for (int64_t x = 0; x < found; x++) {
        const double p = exp(tg->entries[x].value - lse);
        tg->entries[x].value = g->call->real_bytes == 8 ? p : (double)(float)p;
        ordered = ordered && (x == 0 || before(tg->entries[x - 1], tg->entries[x]));
    }
    if (!ordered) { /* weights that rounding made equal stand by key */
        sort(tg->entries, found);
    }
    write_row(tg, q, found);
}

/* A row without weights, or whose weights are NaN: all alike, so its first keys. True: done. */
static bool
odd_row(const top_group *tg, const sa_query *q, double lse)
{
    int64_t found = 0;
    if (lse != INFINITY && !isnan(lse)) {
        return false;
    }
    sa_row_keys keys = sa_row_keys_start(&tg->g, q, 0, tg->g.call->p->n_k);
    int32_t key;
    while (isnan(lse) && found < tg->call->n && sa_row_keys_next(&keys, &key, 1) > 0) {
        tg->entries[found++] = (entry){NAN, key};
    }
    write_row(tg, q, found);
    return true;
}

/* Few rows, or few keys: all that the row sees. */
static void
rank_rows(top_group *tg)
{
    const sa_group *const g = &tg->g;
    for (int r = 0; r < g->n_rows && !sa_stop_asked(g->ctx, g->worker); r++) {
        const sa_query *const q = &g->s.query[r];
        const double lse = sa_row_lse(g, tg->call->lse, q);
        if (!odd_row(tg, q, lse)) {
            sa_row_keys keys = sa_row_keys_start(g, q, 0, g->call->p->n_k);
            const int count = sa_row_keys_next(&keys, tg->keys, (int)tg->call->listed);
            rank_row(tg, q, lse, count, -INFINITY);
        }
    }
}

static char *
peaks_at(const top_group *tg, int w, int x, int64_t group)
{
    const int64_t at = ((int64_t)(x % PEAK_STRIPS) * tg->call->groups + group) * w;
    return tg->peaks + (size_t)at * tg->g.call->real_bytes;
}

/* Peaks of the groups of one word, group 0 of the strip being that of bits.first. */
static void
word_peaks(const top_group *tg, int w, int x, const sa_key_tile *tile, int64_t word)
{
    const sa_group *const g = &tg->g;
    const sa_strip st = sa_strip_at(g, w, x);
    const size_t row = (size_t)w * g->call->real_bytes;
    char *const to = peaks_at(tg, w, x, (word - tg->bits.first) * WORD_GROUPS);
    sa_strip_sight see;
    if (!sa_strip_look(g, &tg->bits, st, word, SA_PEAK_KEYS, &see)) {
        see.a = see.b = 0;
    } else {
        sa_strip_scores(g, w, st, tile, &see, g->s.s);
        g->call->tile->peaks(to + (size_t)(see.a / SA_PEAK_KEYS) * row, g->s.s, w, st.wide,
                             see.b - see.a);
    }
    for (int i = 0; i < WORD_GROUPS; i++) {
        if (i * SA_PEAK_KEYS < see.a || i * SA_PEAK_KEYS >= see.b) {
            g->call->tile->fill(to + (size_t)i * row, w, -INFINITY);
        }
    }
}

/* The keys that a row sees of its best groups, then ranked. */
static void
rank_groups(const top_group *tg, const sa_query *q, const void *row_peaks, int64_t groups)
{
    const double lse = sa_row_lse(&tg->g, tg->call->lse, q);
    if (odd_row(tg, q, lse)) {
        return;
    }
    const int64_t found = largest(tg, row_peaks, groups);
    int64_t count = 0;
    double level = INFINITY;
    for (int64_t x = 0; x < found; x++) {
        const int64_t word = tg->bits.first + tg->best[x] / WORD_GROUPS;
        const int first = tg->best[x] % WORD_GROUPS * SA_PEAK_KEYS;
        uint64_t seen =
            sa_span_bits_row(&tg->bits, &tg->g, q, word) & sa_ones(first, first + SA_PEAK_KEYS);
        level = fmin(level, get(tg, row_peaks, tg->best[x]));
        for (; seen != 0; seen &= seen - 1) {
            tg->keys[count++] = (int32_t)(word * SA_WORD_KEYS + __builtin_ctzll(seen));
        }
    }
    rank_row(tg, q, lse, count, level);
}

static void
rank_strip(const top_group *tg, int w, int x)
{
    const sa_group *const g = &tg->g;
    const sa_tile *const t = g->call->tile;
    const sa_strip st = sa_strip_at(g, w, x);
    const size_t real = g->call->real_bytes;
    const int64_t groups = (tg->bits.end - tg->bits.first) * WORD_GROUPS;
    const sa_dtype dtype = real == 8 ? SA_F64 : SA_F32;
    for (int r0 = 0; r0 < st.rows; r0 += t->lanes) {
        const int rows = SA_MIN(t->lanes, st.rows - r0);
        void *row[SA_STRIP_MAX];
        for (int r = 0; r < rows; r++) {
            row[r] = tg->row_peaks + (size_t)(r * groups) * real;
        }
        t->store_cols(row, dtype, peaks_at(tg, w, x, 0) + (size_t)r0 * real, w, rows, (int)groups,
                      tg->ones);
        /* sa_row_begin and the ranking write over the first columns of qt, which strips are done
         * with. */
        for (int r = 0; r < rows; r++) {
            rank_groups(tg, &g->s.query[st.first + r0 + r], row[r], groups);
        }
    }
}

/* A few strips at a time: their peaks are what takes memory. */
static void
rank_strips(top_group *tg)
{
    const sa_group *const g = &tg->g;
    sa_span_bits_fill(&tg->bits, g->plan, g->slot, 0, g->call->p->n_k);
    g->call->tile->fill(tg->ones, SA_STRIP_MAX, 1.0);
    const int w = sa_strip_width(g->call->tile, g->n_rows), n = (g->n_rows + w - 1) / w;
    for (int first = 0; first < n; first += PEAK_STRIPS) {
        const int end = SA_MIN(first + PEAK_STRIPS, n);
        (void)sa_strips_begin(g, (sa_view){0}); /* ranking wrote over them */
        for (int64_t word = tg->bits.first; word < tg->bits.end; word++) {
            sa_key_tile tile;
            if (sa_stop_asked(g->ctx, g->worker)) {
                return;
            }
            sa_word_tile(g, word, &tile);
            for (int x = first; x < end; x++) {
                word_peaks(tg, w, x, &tile, word);
            }
        }
        for (int x = first; x < end; x++) {
            rank_strip(tg, w, x);
        }
    }
}

static void
run_group(sa_group *g, int64_t rows)
{
    top_group *const tg = (top_group *)(void *)g;
    (void)rows; /* peaks of all groups need a strip, however few its rows */
    (tg->call->groups == 0 ? rank_rows : rank_strips)(tg);
}

static sa_status
top_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const top_call *const call = arg;
    const sa_plan *const plan = call->part->plan;
    const int64_t heads = call->part->head_end - call->part->head_begin;
    /* Later blocks of a causal plan are the longer ones: they go first. */
    const int64_t run = call->block_runs - 1 - task % call->block_runs;
    const int64_t row = task / call->block_runs, head = call->part->head_begin + row % heads;
    top_group tg = {.call = call};
    tg.g = sa_strips_group(ctx, &call->call, plan, row / heads, head, worker);
    tg.g.run = run_group;
    sa_arena_reset(sa_scratch(ctx, worker));
    carve(call, sa_scratch(ctx, worker), &tg);
    if (tg.entries == NULL) {
        return sa_fail(ctx, SA_EINTERNAL, "topn: the scratch reserved is too small");
    }
    const int64_t end = SA_MIN((run + 1) * call->blocks, plan->n_blocks);
    for (int64_t block = run * call->blocks; block < end && !sa_stopped(ctx); block++) {
        sa_group_block(&tg.g, block, true, head, 1);
    }
    return SA_OK;
}

static void
size_up(top_call *call)
{
    const sa_problem *const p = call->call.p;
    const sa_plan *const plan = call->part->plan;
    const sa_tile *const t = call->call.tile;
    const int64_t rows = SA_MIN(plan->rows_per_block, p->n_q);
    const int64_t groups = (p->n_k + SA_WORD_KEYS - 1) / SA_WORD_KEYS * WORD_GROUPS;
    call->n = SA_MIN(call->value.size[3], p->n_k);
    /* Ranking every key costs less where most groups would be scored again. */
    call->groups = groups > 2 * call->n && rows > SA_MAX(1, t->lanes / 4) ? groups : 0;
    call->listed = call->groups > 0 ? call->n * SA_PEAK_KEYS : p->n_k;
    call->blocks = SA_MAX(1, TASK_ROWS / plan->rows_per_block);
    call->block_runs = (plan->n_blocks + call->blocks - 1) / call->blocks;
}

sa_status
sa_topn(sa_ctx *ctx, sa_view value, sa_view index, sa_view lse, const sa_problem *p,
        const sa_part *parts, int n_parts)
{
    sa_status status = sa_parts_check(ctx, p, parts, n_parts);
    if (status != SA_OK || p->batch == 0 || p->n_q == 0) {
        return status;
    }
    for (int i = 0; i < n_parts && status == SA_OK; i++) {
        top_call call = {.value = value, .index = index, .lse = lse, .part = &parts[i]};
        top_group none;
        call.call = (sa_attend_call){.p = p, .parts = parts, .n_parts = n_parts, .pieces = 1};
        call.call.tile = sa_tile_for(sa_real_is_f64(p->q.dtype));
        call.call.real_bytes = (size_t)call.call.tile->real_bytes;
        size_up(&call);
        status = sa_scratch_reserve(ctx, carve(&call, NULL, &none) + 32 * SA_ALIGN);
        if (status == SA_OK) {
            const int64_t heads = p->batch * (parts[i].head_end - parts[i].head_begin);
            status = sa_parallel(ctx, heads * call.block_runs, top_task, &call);
        }
    }
    return status;
}
