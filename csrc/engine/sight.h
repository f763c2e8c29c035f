/* sight.h - what causality, padding and the boolean mask let each row see, before any plan chooses.
 *
 * Intervals say it all where each row's keys are one run: causality, padding on either side, a mask
 * that is a band or a set of packed documents. What intervals cannot say stays in the masks, read
 * element by element.
 */
#ifndef SA_SIGHT_H
#define SA_SIGHT_H

#include "engine/problem.h"

typedef struct {
    int64_t maps;     /* 1, or batch                                                          */
    int32_t *lo, *hi; /* [maps, n_q]: row i may see lo <= j < hi; 0, 0 when it sees nothing   */
    bool mask;        /* problem->mask hides more than the intervals say                      */
    bool key_mask;    /* so does key_mask: the padding of some batch entry has holes          */
} sa_sight;

/* The sizes of p must be set; nothing but causal, mask and key_mask is read. SA_ENOMEM. */
sa_status sa_sight_make(sa_ctx *ctx, const sa_problem *p, sa_sight *sight);
void sa_sight_free(sa_sight *sight);

/* One row of a boolean array: key j stands at at[j * step] and is true when it is not zero. at
 * NULL: all true. */
typedef struct {
    const unsigned char *at;
    int64_t step;
} sa_bits;

/* First key in [from, to) that is `value`; to when there is none. */
int64_t sa_bits_next(sa_bits bits, bool value, int64_t from, int64_t to);

/* What hides keys of one row: the mask, and the padding. */
typedef struct {
    sa_bits mask, keys;
} sa_row_bits;

/* Those of (batch b, head h, row i); the parts that are not asked for are all true. */
sa_row_bits sa_row_bits_of(const sa_problem *p, bool mask, bool key_mask, int64_t b, int64_t h,
                           int64_t i);

/* First key in [from, to) that both show (value true) or that one of them hides (false). */
int64_t sa_row_bits_next(sa_row_bits bits, bool value, int64_t from, int64_t to);

/* How many keys of [from, to) both show. */
int64_t sa_row_bits_count(sa_row_bits bits, int64_t from, int64_t to);

static inline bool
sa_row_bits_any(sa_row_bits bits)
{
    return bits.mask.at != NULL || bits.keys.at != NULL;
}

#endif
