/* ahead.h - asks memory for what the next block of rows meets first, a little at a time.
 *
 * A block meets its rows, what is written for them and its newest keys for the first time, and all
 * at once: the hardware does not foresee that. */
#ifndef SA_AHEAD_H
#define SA_AHEAD_H

#include "engine/attend_call.h"

enum { SA_AHEAD_VIEWS = 3 };

/* One array: its row of a head, for each query or key. */
typedef struct {
    const char *base;
    int64_t step, head_step; /* bytes */
    int lines;               /* of the cache, a row; 0: there is no such array */
} sa_ahead_rows;

typedef struct sa_ahead {
    sa_ahead_rows of_query[SA_AHEAD_VIEWS], of_key[SA_AHEAD_VIEWS];
    int64_t row; /* of the next block, which is asked for next */
    int rows;    /* a step                                     */
} sa_ahead;

/* Begins with the first row of the block that the task takes next; views NULL, or without data, are
 * left out. */
void sa_ahead_start(sa_ahead *a, const sa_group *g, const sa_view *const of_query[SA_AHEAD_VIEWS],
                    const sa_view *const of_key[SA_AHEAD_VIEWS]);
/* The next few rows, and the newest key that each of them sees, which under causality no earlier
 * block has read. To be called between any two pieces of work of some 100 ns. */
void sa_ahead_step(sa_ahead *a, const sa_group *g);

#endif
