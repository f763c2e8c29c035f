/* plan.h - which keys each block of query rows sees, as spans: sparsity is represented here alone.
 *
 * A row block b of a map lists, in this order:
 *   full spans   [row_ptr[b], see_ptr[b])    every row of the block sees every key
 *   see spans    [see_ptr[b], band_ptr[b])   row i sees see_lo[i] <= j < see_hi[i]
 *   band spans   [band_ptr[b], row_ptr[b+1]) and band_lo[i] <= j < band_hi[i] as well
 * Spans are sorted and disjoint within each of the three kinds and disjoint over all three: a key
 * stands in at most one span of a block. Block b has the rows from row_start[b] to the next block's
 * first; they are rows_per_block, or fewer where a sequence of a packed call or the rows end.
 *
 * Boolean masks (term_mask: mask, and padding with holes) may hide more keys of see and band spans,
 * element by element; they never apply to full spans, so a plan made under a mask keeps its mixed
 * blocks out of the full spans.
 */
#ifndef SA_PLAN_H
#define SA_PLAN_H

#include "engine/problem.h"

typedef struct {
    int64_t n_q, n_k, n_blocks;
    int64_t n_maps; /* (per_batch ? batch : 1) * heads / heads_per_map */
    int64_t batch, heads;
    int32_t rows_per_block;   /* at most; 1 for selectors, 64 or 128 for patterns, a layout's own */
    int32_t heads_per_map;    /* heads that share a map: all, one kv group, or one               */
    bool per_batch;           /* each batch entry has its own maps, one entry after another */
    bool term_mask;           /* the call's boolean masks apply to see and band spans    */
    int32_t *row_start;       /* [n_blocks], ascending from 0                            */
    int64_t *row_ptr;         /* [n_maps * n_blocks + 1]                                 */
    int64_t *see_ptr;         /* [n_maps * n_blocks]                                     */
    int64_t *band_ptr;        /* [n_maps * n_blocks]                                     */
    int64_t n_spans;          /* length of start and len                                 */
    int32_t *start, *len;     /* len NULL: every span is span_len keys, cut at n_k       */
    int32_t span_len;         /* 0 where there is len                                    */
    int64_t see_maps;         /* 1, or batch: leading size of see_lo, see_hi             */
    int32_t *see_lo, *see_hi; /* [see_maps, n_q]                                         */
    int64_t band_maps;        /* 1, or n_maps                                            */
    int32_t *band_lo, *band_hi; /* [band_maps, n_q], or NULL                               */
} sa_plan;

void sa_plan_free(sa_plan *plan); /* frees the arrays and the plan; NULL does nothing */
int64_t sa_plan_bytes(const sa_plan *plan);

/* Refuses spans out of range, unsorted or overlapping, pointers that decrease, intervals out of
 * range, a full span past the smallest see_hi (or before the largest see_lo) of its block: no valid
 * plan leaks the future or counts a key twice. */
sa_status sa_plan_validate(sa_ctx *ctx, const sa_plan *plan);

/* Map index of (batch b, head h); see_lo/see_hi row of batch b. */
static inline int64_t
sa_plan_map(const sa_plan *plan, int64_t b, int64_t h)
{
    const int64_t per = plan->heads / plan->heads_per_map;
    return (plan->per_batch ? b * per : 0) + h / plan->heads_per_map;
}

/* First row past block b. */
static inline int64_t
sa_plan_block_end(const sa_plan *plan, int64_t b)
{
    return b + 1 < plan->n_blocks ? plan->row_start[b + 1] : plan->n_q;
}

/* The block of row i: number i / rows_per_block where all blocks before it are full, else a later
 * one. */
static inline int64_t
sa_plan_block_of(const sa_plan *plan, int64_t i)
{
    int64_t low = i / plan->rows_per_block, high = plan->n_blocks;
    if (i < sa_plan_block_end(plan, low)) {
        return low;
    }
    while (high - low > 1) { /* row_start[low] <= i, and row_start[high] > i */
        const int64_t middle = low + (high - low) / 2;
        if (plan->row_start[middle] <= i) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Keys of span s (start given by plan->start[s]). */
static inline int32_t
sa_plan_span_len(const sa_plan *plan, int64_t s)
{
    const int64_t left = plan->n_k - plan->start[s];
    return plan->len ? plan->len[s] : (int32_t)SA_MIN((int64_t)plan->span_len, left);
}

/* out[n_q, n_k] bytes: 1 where row i of (b, h) sees key j, under p's masks when plan->term_mask. */
sa_status sa_plan_to_mask(sa_ctx *ctx, const sa_plan *plan, const sa_problem *p, int64_t b,
                          int64_t h, unsigned char *out);

/* Counted without N x N memory, over all batches and heads: kept = (row, key) pairs the plan shows;
 * visible = pairs that see_lo, see_hi and p's masks alone would show; union_rows = for each (batch,
 * kv head, row) the distinct keys that its group of query heads sees together, summed: the K or V
 * rows an ideal reader must read. */
typedef struct {
    int64_t kept, visible, union_rows;
} sa_plan_counts;
sa_status sa_plan_count(sa_ctx *ctx, const sa_plan *plan, const sa_problem *p,
                        sa_plan_counts *counts);

/* a or b, a and b, row by row (rows_per_block = 1). */
typedef enum { SA_PLAN_UNION = 0, SA_PLAN_INTERSECTION } sa_plan_op;
sa_status sa_plan_combine(sa_ctx *ctx, const sa_plan *a, const sa_plan *b, const sa_problem *p,
                          sa_plan_op op, sa_plan **result);

/* One sequence after the other: the rows of plans[s] follow those of plans[s - 1], so do its keys,
 * and rows see keys of their own sequence alone, as its plan says. One plan may stand for many
 * sequences; lengths may be 0. The masks of the result span the whole call. SA_EINVAL: batch or
 * heads differ, or too long together. */
sa_status sa_plan_pack(sa_ctx *ctx, const sa_plan *const *plans, int64_t count, sa_plan **result);

#endif
