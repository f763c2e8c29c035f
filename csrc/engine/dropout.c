/* dropout.c - see dropout.h. */
#include "engine/dropout.h"

#include <math.h>

#include "base/philox.h"

#define TAG UINT64_C(0x64726F70) /* "drop" */

void
sa_dropout_row(const sa_problem *p, int64_t b, int64_t h, int64_t i, const int32_t *keys, int n,
               void *keep)
{
    const uint64_t least = (uint64_t)ceil(p->dropout_p * 4294967296.0);
    const double kept = 1 / (1 - p->dropout_p);
    const bool f64 = sa_real_is_f64(p->q.dtype);
    sa_philox_block block = {{0}};
    int64_t at = -1; /* which block that is */
    for (int x = 0; x < n; x++) {
        const int64_t j = keys[x];
        if (j / 8 != at) {
            at = j / 8;
            block = sa_philox(p->seed, TAG, (uint64_t)at, (uint64_t)i, (uint64_t)h, (uint64_t)b);
        }
        const uint64_t number = block.word[j % 8 / 2] >> (j % 2 * 32) & 0xFFFFFFFFu;
        const double value = number >= least ? kept : 0;
        if (f64) {
            ((double *)keep)[x] = value;
        } else {
            ((float *)keep)[x] = (float)value;
        }
    }
}
