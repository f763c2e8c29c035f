/* span_bits.h - the spans of a row block as bits, a word for 64 neighbouring keys.
 *
 * attend walks spans as they come; here keys keep their order, whatever kinds of spans they stand
 * in, and any word can be asked for again.
 */
#ifndef SA_SPAN_BITS_H
#define SA_SPAN_BITS_H

#include "engine/attend_call.h"

enum { SA_WORD_KEYS = 64 };

typedef struct {
    int64_t first, end; /* words that hold the keys of the block                         */
    uint64_t *kind[3];  /* [words of n_k] keys in full, see and band spans; set from first to end */
} sa_span_bits;

/* Words for n_k keys from an arena; returns what that costs. With arena NULL it only counts. */
size_t sa_span_bits_carve(sa_arena *arena, int64_t n_k, sa_span_bits *bits);
/* The spans of block `slot` of the plan, of keys [lo, hi) alone; both are multiples of 64, or hi is
 * n_k. */
void sa_span_bits_fill(sa_span_bits *bits, const sa_plan *plan, int64_t slot, int64_t lo,
                       int64_t hi);
/* Bit x is set where the row sees key 64 word + x. */
uint64_t sa_span_bits_row(const sa_span_bits *bits, const sa_group *g, const sa_query *q,
                          int64_t word);

/* Bits [from, to) of a word, cut at its ends. */
static inline uint64_t
sa_ones(int64_t from, int64_t to)
{
    from = SA_MAX(from, 0);
    to = SA_MIN(to, 64);
    return from < to ? ~UINT64_C(0) >> (64 - (to - from)) << from : 0;
}

#endif
