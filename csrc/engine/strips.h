/* strips.h - scores of query rows without softmax: strips of a group against 64 neighbouring keys,
 * or one row against any keys. What mass and the largest weights of rows share.
 */
#ifndef SA_STRIPS_H
#define SA_STRIPS_H

#include "engine/plan_parts.h"
#include "engine/span_bits.h"

/* Some rows of a group, transposed. */
typedef struct {
    int first, rows, wide; /* rows of the group; columns that hold them     */
    char *qt, *lse;        /* [dim][w]; [w], +inf where no weight is above 0 */
} sa_strip;

/* What a strip sees of a word: nothing outside of keys [a, b). */
typedef struct {
    int a, b;
    bool whole; /* every column is a row that sees all of [a, b)      */
    bool runs;  /* every row sees one run of keys: lo, hi say which  */
    int32_t lo[SA_STRIP_MAX], hi[SA_STRIP_MAX];
    uint64_t seen[SA_STRIP_MAX];
} sa_strip_sight;

/* The group of a task: one query head, every key. Room for its scratch must be carved. */
sa_group sa_strips_group(sa_ctx *ctx, const sa_attend_call *call, const sa_plan *plan, int64_t b,
                         int64_t head, int worker);
/* Loads all strips of the group; their width. lse (batch, heads, n_q, 1) or data NULL. */
int sa_strips_begin(const sa_group *g, sa_view lse);
sa_strip sa_strip_at(const sa_group *g, int w, int x);
/* lse of one row as a double; +inf where the row's weights are 0. */
double sa_row_lse(const sa_group *g, sa_view lse, const sa_query *q);

/* The keys of a word, with k_row. */
void sa_word_tile(const sa_group *g, int64_t word, sa_key_tile *tile);
/* False when no row sees a key; a and b are multiples of `step`, or b is the last key's end. */
bool sa_strip_look(const sa_group *g, const sa_span_bits *bits, sa_strip st, int64_t word, int step,
                   sa_strip_sight *see);
/* s[x * w + r]: scores of keys a + x, -inf where row r does not see the key. */
void sa_strip_scores(const sa_group *g, int w, sa_strip st, const sa_key_tile *tile,
                     const sa_strip_sight *see, char *s);

/* The keys that one row sees in [lo, hi), ascending. */
typedef struct {
    sa_row_runs runs;
    int64_t at, stop, lo, hi;
} sa_row_keys;
sa_row_keys sa_row_keys_start(const sa_group *g, const sa_query *q, int64_t lo, int64_t hi);
int sa_row_keys_next(sa_row_keys *keys, int32_t *key, int most); /* 0: no more */

/* One row: loads it, then scores the tile's keys, which it sees. */
void sa_row_begin(const sa_group *g, const sa_query *q);
void sa_row_scores(const sa_group *g, const sa_query *q, sa_key_tile *tile, char *s);

#endif
