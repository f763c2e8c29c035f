/* reals.h - arrays of a table's real type, exactly as long as asked for, and the tables themselves.
 */
#ifndef SA_REALS_H
#define SA_REALS_H

#include "tile/tile.h"

/* Calls run for both real types of every instruction set that this CPU has, then sets the best
 * again. */
void each_table(void (*run)(const sa_tile *t));
const char *table_name(const sa_tile *t);

double real_eps(const sa_tile *t); /* 2^-23 or 2^-52 */
double real_get(const sa_tile *t, const void *p, int64_t i);
void real_put(const sa_tile *t, void *p, int64_t i, double x);
double real_round(const sa_tile *t, double x); /* to the real type */

/* sa_malloc of n reals: poisoned, or random in (-scale, scale). Never fails here. */
void *real_array(const sa_tile *t, int64_t n);
void *real_random(const sa_tile *t, int64_t n, double scale);
void *real_copy(const sa_tile *t, const void *p, int64_t n);

/* Whether element i still holds the poison it was made with. */
bool real_untouched(const sa_tile *t, const void *p, int64_t i);
/* Whether element i is the same in both, bit for bit. */
bool real_same(const sa_tile *t, const void *p, const void *q, int64_t i);

/* Up to 64 rows of dim random reals, each in a block of its own. */
typedef struct {
    int n;
    void *row[SA_TILE_KEYS];
} real_rows;
real_rows rows_random(const sa_tile *t, int n, int dim, double scale);
void rows_free(real_rows *rows);

#endif
