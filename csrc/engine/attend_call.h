/* attend_call.h - what the two paths of attend share: the call, one group of rows, the walk over
 * key tiles. */
#ifndef SA_ATTEND_CALL_H
#define SA_ATTEND_CALL_H

#include "base/threads.h"
#include "engine/attend.h"
#include "tile/tile.h"

enum {
    SA_PIECE_KEYS = 4096, /* keys of one piece when a call has few tasks         */
    SA_FEW_TASKS = 8,
    SA_GROUP_STRIPS = 4 /* strips whose states share the walk over the keys    */
};

/* How a part is cut: a task is (batch, run of heads, run of blocks, piece of keys). */
typedef struct {
    int64_t heads, head_runs; /* heads of a task; runs in the part */
    int64_t blocks, block_runs;
    int64_t tasks; /* batch * head_runs * block_runs    */
} sa_cut;

typedef struct {
    const sa_problem *p;
    sa_view out, lse;
    const sa_part *parts;
    sa_cut *cuts;
    int n_parts;
    const sa_tile *tile;
    int64_t pieces;
    char *partial; /* [pieces][batch * heads * n_q][m, l, o[dim_v]] when pieces > 1 */
    size_t real_bytes;
} sa_attend_call;

typedef struct {
    int64_t head, i;
    int32_t see_lo, see_hi;   /* what the row may see                  */
    int32_t band_lo, band_hi; /* that, cut by its band               */
} sa_query;

/* Scratch of a worker, carved from its arena. */
typedef struct {
    sa_query *query;      /* [strips * w]                                  */
    unsigned char *warm;  /* [strips * w] 1 at a vector's first column once it has a maximum */
    char *qt, *o, *m, *l; /* [strips][dim][w], [strips][dim_v][w], [strips][w] */
    char *s, *t;          /* [KEYS + STEP][w] scores; [KEYS][w] terms, or scores before the fold */
    char *t_rows;         /* [w][KEYS] terms by row                        */
    char *keep;           /* [KEYS][w] what dropout keeps                  */
    char *k, *v;          /* [KEYS][dim], [KEYS][dim_v]: rows that are not read in place */
    char *factor, *lse;   /* [w]                                           */
} sa_attend_scratch;

/* A tile of keys. */
typedef enum { SA_TILE_FULL, SA_TILE_SEE, SA_TILE_BAND } sa_tile_kind;
typedef struct {
    sa_tile_kind kind;
    int n;
    int v_finite; /* -1: not looked at yet */
    int32_t keys[SA_TILE_KEYS];
    const void *k_row[SA_TILE_KEYS], *v_row[SA_TILE_KEYS];
} sa_key_tile;

/* Where the walk over a block's spans stands. Full spans run together into one tile; clipped ones
 * do not. */
typedef struct {
    const sa_plan *plan;
    int64_t span, see, band, end;
    int32_t at, piece_lo, piece_hi;
} sa_cursor;

/* One group of query rows of one block. */
typedef struct sa_group {
    sa_ctx *ctx;
    /* What is done with a group; rows are those of its whole block. */
    void (*run)(struct sa_group *g, int64_t rows);
    const sa_attend_call *call;
    const sa_plan *plan;
    sa_attend_scratch s;
    int64_t b, g, map, slot; /* batch, kv head, map of the plan, map * n_blocks + block */
    int64_t piece;
    int32_t key_lo, key_hi;                      /* keys that the walk is about */
    int64_t head, n_heads, next_begin, next_end; /* query rows that this task takes next */
    int n_rows, worker;
    bool masked, terms;
} sa_group;

/* Takes bytes for *pointer from an arena; returns how many that costs. With arena NULL it only
 * counts. */
size_t sa_take(sa_arena *arena, void *pointer, size_t bytes);
/* Carves a worker's scratch; with arena NULL only counts the bytes. */
size_t sa_attend_carve(const sa_attend_call *call, sa_arena *arena, sa_attend_scratch *s);
/* SA_EINVAL unless the parts cover every head once, in whole groups. */
sa_status sa_parts_check(sa_ctx *ctx, const sa_problem *p, const sa_part *parts, int n_parts);
/* Heads of a part that share keys and map. */
int64_t sa_part_heads(const sa_problem *p, const sa_part *part);
/* All rows of one block for the heads [head, head + n): g->run on groups of as many strips as share
 * a walk. last: the block after it is not the task's next one. */
void sa_group_block(sa_group *g, int64_t block, bool last, int64_t head, int64_t n_heads);

/* One past the last key that row i of the group's heads sees. */
int32_t sa_group_sees_to(const sa_group *g, int64_t i);
sa_cursor sa_cursor_start(const sa_group *g);
bool sa_cursor_next(sa_cursor *c, sa_key_tile *tile);
/* Fills k_row, v_row; copies rows to scratch where in_place is false. */
void sa_tile_rows(const sa_group *g, sa_key_tile *tile, bool k_in_place, bool v_in_place);
/* Terms of query row r of the group for the tile's keys from x0 on. */
void sa_group_terms(const sa_group *g, int r, const sa_key_tile *tile, int x0, int n, void *t);
/* The same of what dropout keeps: 0 or 1 / (1 - dropout_p). */
void sa_group_keep(const sa_group *g, int r, const sa_key_tile *tile, int x0, int n, void *keep);
/* Either of them for rows first, first + 1, ..: to[x * w + r], rows <= w; 0 in columns past them.
 */
typedef void sa_row_fill(const sa_group *, int r, const sa_key_tile *, int x0, int n, void *row);
void sa_group_columns(const sa_group *g, int first, int rows, int w, const sa_key_tile *tile,
                      int x0, int n, void *to, sa_row_fill *fill);
/* m and l of query row r before any key: of the sink, if there is one. */
void sa_group_sink(const sa_group *g, int r, void *m, void *l);
/* Writes one row's (m, l, o) where it belongs: the partial of its piece. */
char *sa_partial_row(const sa_attend_call *call, int64_t piece, int64_t b, const sa_query *q);
void sa_lse_write(const sa_attend_call *call, int64_t b, const sa_query *q, const void *lse);

/* First and one-past-last tile key that a row sees, relative to the tile. */
static inline void
sa_query_range(const sa_query *query, const sa_key_tile *tile, int32_t *lo, int32_t *hi)
{
    const bool band = tile->kind == SA_TILE_BAND;
    const int64_t first = tile->keys[0];
    const int64_t a = (band ? query->band_lo : query->see_lo) - first,
                  b = (band ? query->band_hi : query->see_hi) - first;
    *lo = (int32_t)SA_MIN(SA_MAX(a, 0), tile->n);
    *hi = (int32_t)SA_MIN(SA_MAX(b, 0), tile->n);
}

/* Columns that hold so many rows, at most a strip. */
static inline int
sa_strip_width(const sa_tile *tile, int rows)
{
    return SA_MIN(tile->strip_max, (rows + tile->lanes - 1) / tile->lanes * tile->lanes);
}

/* Rows whose bytes fall on the same few sets of a 4096-byte cache way, as heads interleaved in a
 * wide row do, are copied once a tile; so are rows of a storage type. */
static inline bool
sa_rows_in_place(const sa_view *v, int64_t dim, size_t real_bytes)
{
    const int64_t step = v->stride[2] * (int64_t)real_bytes;
    return sa_dtype_size(v->dtype) == real_bytes &&
           (step == dim * (int64_t)real_bytes || step % 1024 != 0);
}

void sa_attend_strips(sa_group *g); /* tile path */
void sa_attend_rows(sa_group *g);   /* row path  */

#endif
