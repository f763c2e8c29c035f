/* span_bits.c - spans to bits, and bits to what one row sees. */
#include "engine/span_bits.h"

#include "engine/planner.h"

size_t
sa_span_bits_carve(sa_arena *arena, int64_t n_k, sa_span_bits *bits)
{
    const size_t bytes = (size_t)(n_k / SA_WORD_KEYS + 1) * sizeof(uint64_t);
    size_t total = 0;
    for (int kind = 0; kind < 3; kind++) {
        total += sa_take(arena, &bits->kind[kind], bytes);
    }
    return total;
}

static int64_t
span_stop(const sa_plan *plan, int64_t s)
{
    return (int64_t)plan->start[s] + sa_plan_span_len(plan, s);
}

/* First of the spans [from, to), which are sorted, that goes past `key`. */
static int64_t
span_past(const sa_plan *plan, int64_t from, int64_t to, int64_t key)
{
    while (from < to) {
        const int64_t middle = from + (to - from) / 2;
        if (span_stop(plan, middle) <= key) {
            from = middle + 1;
        } else {
            to = middle;
        }
    }
    return from;
}

static void
set_bits(uint64_t *word, int64_t start, int64_t stop)
{
    for (int64_t x = start / SA_WORD_KEYS; x * SA_WORD_KEYS < stop; x++) {
        word[x] |= sa_ones(start - x * SA_WORD_KEYS, stop - x * SA_WORD_KEYS);
    }
}

void
sa_span_bits_fill(sa_span_bits *bits, const sa_plan *plan, int64_t slot, int64_t lo, int64_t hi)
{
    const int64_t ptr[] = {plan->row_ptr[slot], plan->see_ptr[slot], plan->band_ptr[slot],
                           plan->row_ptr[slot + 1]};
    int64_t from[3], to[3], low = hi, high = lo;
    for (int kind = 0; kind < 3; kind++) {
        int64_t s = from[kind] = span_past(plan, ptr[kind], ptr[kind + 1], lo);
        to[kind] = s = span_past(plan, s, ptr[kind + 1], hi);
        to[kind] += s < ptr[kind + 1] && plan->start[s] < hi;
        if (from[kind] < to[kind]) {
            low = SA_MIN(low, SA_MAX(lo, plan->start[from[kind]]));
            high = SA_MAX(high, SA_MIN(hi, span_stop(plan, to[kind] - 1)));
        }
    }
    bits->first = low / SA_WORD_KEYS;
    bits->end = low < high ? (high + SA_WORD_KEYS - 1) / SA_WORD_KEYS : bits->first;
    for (int kind = 0; kind < 3; kind++) {
        for (int64_t x = bits->first; x < bits->end; x++) {
            bits->kind[kind][x] = 0;
        }
        for (int64_t s = from[kind]; s < to[kind]; s++) {
            set_bits(bits->kind[kind], SA_MAX(lo, plan->start[s]), SA_MIN(hi, span_stop(plan, s)));
        }
    }
}

/* Those of the word's bits that the boolean masks show to the row. */
static uint64_t
under_masks(const sa_group *g, const sa_query *q, int64_t word, uint64_t bits)
{
    const sa_row_bits row = sa_row_bits_of(g->call->p, true, true, g->b, q->head, q->i);
    uint64_t seen = 0;
    for (uint64_t left = bits; left != 0; left &= left - 1) {
        const int x = __builtin_ctzll(left);
        const int64_t key = word * SA_WORD_KEYS + x;
        const bool shown = (row.mask.at == NULL || row.mask.at[key * row.mask.step] != 0) &&
                           (row.keys.at == NULL || row.keys.at[key * row.keys.step] != 0);
        seen |= (uint64_t)shown << x;
    }
    return seen;
}

uint64_t
sa_span_bits_row(const sa_span_bits *bits, const sa_group *g, const sa_query *q, int64_t word)
{
    const int64_t key = word * SA_WORD_KEYS;
    uint64_t clipped =
        (bits->kind[SA_SPAN_SEE][word] & sa_ones(q->see_lo - key, q->see_hi - key)) |
        (bits->kind[SA_SPAN_BAND][word] & sa_ones(q->band_lo - key, q->band_hi - key));
    if (g->masked && clipped != 0) {
        clipped = under_masks(g, q, word, clipped);
    }
    return bits->kind[SA_SPAN_FULL][word] | clipped;
}
