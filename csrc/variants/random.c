/* random.c - k visible keys of each row, drawn without replacement: the floor under all selectors.
 *
 * Draw d of a row is a function of (seed; d, row, head, batch), so threads and chunks change
 * nothing. With bottom-right causality the row counts from the first key, so that decoding draws
 * what a prefill drew.
 */
#include "variants/variant.h"

#include <string.h>

#include "base/philox.h"
#include "base/threads.h"

typedef struct {
    int64_t k, seed;
} sa_random_opts;

#define MAX_SEED 9007199254740992.0 /* 2^53: a double holds all integers up to it */
#define TAG 1                       /* second word of the key: the variant          */

static const sa_field fields[] = {
    SA_FIELD(sa_random_opts, k, SA_FIELD_I64, 1, SA_MAX_KEYS),
    SA_FIELD(sa_random_opts, seed, SA_FIELD_I64, 0, MAX_SEED),
    SA_FIELD_END,
};

/* A set of numbers below n that gives them back in order: bits, and a bit for each word of bits
 * that is not zero. */
typedef struct {
    uint64_t *bits, *words;
    int64_t n_words;
} key_set;

static size_t
set_words(int64_t n)
{
    return (size_t)(n / 64 + 1 + n / 4096 + 1);
}

/* false when key was there already */
static bool
set_add(key_set *set, int64_t key)
{
    const uint64_t bit = UINT64_C(1) << key % 64;
    if (set->bits[key / 64] & bit) {
        return false;
    }
    set->bits[key / 64] |= bit;
    set->words[key / 4096] |= UINT64_C(1) << key / 64 % 64;
    return true;
}

/* Writes all members, ascending, and leaves the set empty. */
static int64_t
set_drain(key_set *set, int32_t *keys)
{
    int64_t count = 0;
    for (int64_t w = 0; w < set->n_words; w++) {
        for (; set->words[w] != 0; set->words[w] &= set->words[w] - 1) {
            const int64_t at = 64 * w + __builtin_ctzll(set->words[w]);
            for (; set->bits[at] != 0; set->bits[at] &= set->bits[at] - 1) {
                keys[count++] = (int32_t)(64 * at + __builtin_ctzll(set->bits[at]));
            }
        }
    }
    return count;
}

static sa_status
scratch(sa_ctx *ctx, const sa_problem *p, const void *opts, size_t *bytes)
{
    (void)ctx, (void)opts;
    *bytes =
        set_words(p->n_k) * sizeof(uint64_t) + 2 * (size_t)p->n_k * sizeof(int32_t) + 3 * SA_ALIGN;
    return SA_OK;
}

/* Floyd's algorithm: k members of [0, n), every subset alike, one draw a member. */
static void
draw(const sa_plan_task *t, int64_t i, int64_t n, key_set *set)
{
    const sa_random_opts *const o = t->opts;
    const sa_problem *const p = t->problem;
    const uint64_t row = (uint64_t)(p->causal == SA_CAUSAL_BOTTOM_RIGHT ? i + p->n_k - p->n_q : i);
    for (int64_t top = n - o->k; top < n; top++) {
        const uint64_t key =
            sa_philox_below((uint64_t)top + 1, (uint64_t)o->seed, TAG, (uint64_t)(top - (n - o->k)),
                            row, (uint64_t)t->head, (uint64_t)t->batch);
        if (!set_add(set, (int64_t)key)) {
            set_add(set, top);
        }
    }
}

/* The keys of row i that the masks leave visible. */
static int64_t
list_visible(const sa_plan_task *t, int64_t i, int32_t *keys)
{
    const sa_row_bits bits =
        sa_row_bits_of(t->problem, t->sight->mask, t->sight->key_mask, t->batch, t->head, i);
    const int64_t hi = t->see_hi[i];
    int64_t n = 0;
    for (int64_t j = t->see_lo[i]; j < hi;) {
        const int64_t first = sa_row_bits_next(bits, true, j, hi);
        j = sa_row_bits_next(bits, false, first, hi);
        for (int64_t key = first; key < j; key++) {
            keys[n++] = (int32_t)key;
        }
    }
    return n;
}

static sa_status
emit(const sa_plan_task *t, sa_spans *spans)
{
    const sa_random_opts *const o = t->opts;
    const int64_t n_k = t->problem->n_k;
    const bool masked = t->sight->mask || t->sight->key_mask;
    sa_arena *const arena = sa_scratch(t->ctx, t->worker);
    int32_t *const visible = sa_arena_take_array(arena, (size_t)n_k, sizeof *visible);
    int32_t *const drawn = sa_arena_take_array(arena, (size_t)n_k, sizeof *drawn);
    key_set set = {.bits = sa_arena_take_array(arena, set_words(n_k), sizeof *set.bits),
                   .n_words = n_k / 4096 + 1};
    sa_status status = SA_OK;
    if (visible == NULL || drawn == NULL || set.bits == NULL) {
        return sa_fail(t->ctx, SA_EINTERNAL, "random: the scratch reserved is too small");
    }
    set.words = set.bits + n_k / 64 + 1;
    memset(set.bits, 0, set_words(n_k) * sizeof *set.bits);
    for (int64_t i = t->begin; i < t->end && status == SA_OK; i++) {
        if (sa_stop_asked(t->ctx, t->worker)) {
            return SA_ESTOP;
        }
        const int64_t base = masked ? 0 : t->see_lo[i];
        const int64_t n = masked ? list_visible(t, i, visible) : t->see_hi[i] - base;
        int64_t count = SA_MIN(o->k, n);
        if (count < n) {
            draw(t, i, n, &set);
            count = set_drain(&set, drawn);
        }
        for (int64_t x = 0; x < count;
             x++) { /* ranks among the visible keys, all of them where k reaches n */
            const int32_t rank = count < n ? drawn[x] : (int32_t)x;
            drawn[x] = masked ? visible[rank] : rank;
        }
        status = sa_spans_row(spans, base, drawn, count);
    }
    return status;
}

const sa_planner sa_planner_random = {
    .name = "random",
    .fields = fields,
    .opts_size = sizeof(sa_random_opts),
    .rows_per_block = 1,
    .span_len = 1,
    .per_head = true,
    .applies_mask = true,
    .scratch = scratch,
    .emit = emit,
};
