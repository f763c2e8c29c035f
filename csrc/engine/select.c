/* select.c - exact selection by a sampled guess: one SIMD pass drops almost all scores, bisection
 * ranks the rest. */
#include "engine/select.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "base/alloc.h"
#include "base/view.h"
#include "tile/tile.h"

enum {
    SAMPLES = 512,     /* scores that guess the level                                       */
    SAMPLE_FROM = 2048 /* shorter rows: bisection over the row itself costs less than a guess */
};

#define REAL float
#define KEY int32_t
#define KEY_MAX INT32_MAX
#define LOWEST (-FLT_MAX)
#define NAME(name) name##_f32
#include "engine/select_body.h"
#undef REAL
#undef KEY
#undef KEY_MAX
#undef LOWEST
#undef NAME

#define REAL double
#define KEY int64_t
#define KEY_MAX INT64_MAX
#define LOWEST (-DBL_MAX)
#define NAME(name) name##_f64
#include "engine/select_body.h"

size_t
sa_select_scratch(int64_t n, int64_t count)
{
    (void)count; /* ties may let every score survive the guess */
    return SAMPLES * sizeof(double) + (size_t)n * (sizeof(double) + sizeof(int32_t)) + SA_ALIGN;
}

/* Hoare's partition around the median of three until place k holds what sorting downwards would put
 * there. */
static float
quick_kth(float *x, int64_t n, int64_t k)
{
    int64_t first = 0, last = n - 1;
    while (first < last) {
        const float a = x[first], b = x[(first + last) / 2], c = x[last];
        const float pivot = a < b ? (b < c ? b : (a < c ? c : a)) : (a < c ? a : (b < c ? c : b));
        int64_t i = first, j = last;
        while (i <= j) {
            while (x[i] > pivot) {
                i++;
            }
            while (x[j] < pivot) {
                j--;
            }
            if (i <= j) {
                const float swap = x[i];
                x[i++] = x[j];
                x[j--] = swap;
            }
        }
        if (k <= j) {
            last = j;
        } else if (k >= i) {
            first = i;
        } else {
            break;
        }
    }
    return x[k];
}

int64_t
sa_select_quick_f32(const float *s, int64_t n, int64_t count, int32_t *index, void *scratch)
{
    count = SA_MIN(count, n);
    if (count <= 0) {
        return 0;
    }
    memcpy(scratch, s, (size_t)n * sizeof *s);
    const float level = quick_kth(scratch, n, count - 1);
    int64_t equal = count, kept = 0;
    for (int64_t i = 0; i < n; i++) {
        equal -= s[i] > level;
    }
    for (int64_t i = 0; kept < count && i < n; i++) {
        if (s[i] > level || (s[i] == level && equal-- > 0)) {
            index[kept++] = (int32_t)i;
        }
    }
    return kept;
}
