/* test_select.c - the largest of a row against a full sort. */
#include <math.h>
#include <stdlib.h>

#include "base/alloc.h"
#include "check.h"
#include "engine/select.h"
#include "tile/tile.h"

typedef struct {
    double score;
    int32_t index;
} entry;

/* NaN first, then large before small, then low index before high. */
static int
compare(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    const int nan = !!isnan(y->score) - !!isnan(x->score);
    if (nan != 0 || isnan(x->score)) {
        return nan != 0 ? nan : (x->index > y->index) - (x->index < y->index);
    }
    const int order = (x->score < y->score) - (x->score > y->score);
    return order != 0 ? order : (x->index > y->index) - (x->index < y->index);
}

static int
ascending(const void *a, const void *b)
{
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

static int64_t
by_sorting(const double *s, int64_t n, int64_t count, int32_t *index)
{
    entry *all = malloc((size_t)(n + 1) * sizeof *all);
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        if (s[i] != -INFINITY) {
            all[found++] = (entry){s[i], (int32_t)i};
        }
    }
    qsort(all, (size_t)found, sizeof *all, compare);
    found = found < count ? found : count;
    for (int64_t i = 0; i < found; i++) {
        index[i] = all[i].index;
    }
    qsort(index, (size_t)found, sizeof *index, ascending);
    free(all);
    return found;
}

enum { KINDS = 9 };

/* Rows that are hard for a method that guesses a threshold. */
static double
score_of_kind(int kind, int64_t i, int64_t n)
{
    switch (kind) {
    case 0:
        return numbers_real();
    case 1:
        return (double)numbers_below(3); /* nothing but ties */
    case 2:
        return 1;
    case 3:
        return (double)i;
    case 4:
        return (double)(n - i);
    case 5: /* few large ones */
        return numbers_below(50) ? -1e30 : numbers_real();
    case 6:
        return numbers_below(3) ? -INFINITY : numbers_real();
    case 7: /* everything that floats have */
        return (const double[]){
            NAN, INFINITY, -INFINITY, 0.0, -0.0, 1e-44, -3.4e38, 1}[numbers_below(8)];
    default: /* large at the end only: a sample of the beginning misleads */
        return i > n - 20 ? 5 + numbers_real() : numbers_real();
    }
}

static void
check_row(int64_t n, int64_t count, int kind, bool f64)
{
    double *s = sa_malloc_array((size_t)n, sizeof *s);
    float *single = sa_malloc_array((size_t)n, sizeof *single);
    for (int64_t i = 0; i < n; i++) {
        s[i] = score_of_kind(kind, i, n);
        single[i] = (float)s[i];
        s[i] = f64 ? s[i] : (double)single[i];
    }
    const int64_t room = count < n ? count : n;
    int32_t *want = sa_malloc_array((size_t)room, 4), *got = sa_malloc_array((size_t)room, 4);
    void *scratch = sa_malloc(sa_select_scratch(n, count));
    const int64_t found = by_sorting(s, n, count, want);
    const int64_t here = f64 ? sa_select_largest_f64(s, n, count, got, scratch)
                             : sa_select_largest_f32(single, n, count, got, scratch);
    if (CHECK(here == found, "n %lld, count %lld, kind %d: found %lld, not %lld", (long long)n,
              (long long)count, kind, (long long)here, (long long)found)) {
        for (int64_t i = 0; i < found; i++) {
            CHECK(got[i] == want[i], "n %lld, count %lld, kind %d: entry %lld is %d, not %d",
                  (long long)n, (long long)count, kind, (long long)i, got[i], want[i]);
        }
    }
    void *all[] = {s, single, want, got, scratch};
    for (int i = 0; i < 5; i++) {
        sa_free(all[i]);
    }
}

static void
check_all(const char *isa)
{
    static const int64_t lengths[] = {0, 1, 2, 5, 31, 33, 64, 100, 513, 1000, 5000};
    for (int f64 = 0; f64 < 2; f64++) {
        for (int kind = 0; kind < KINDS; kind++) {
            check_case("select, %s %s, rows of kind %d", f64 ? "float64" : "float32", isa, kind);
            for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
                const int64_t n = lengths[i], counts[] = {1, 2, 8, 64, n / 2 + 1, n, n + 3};
                for (int c = 0; c < 7; c++) {
                    if (counts[c] > 0) {
                        check_row(n, counts[c], kind, f64);
                    }
                }
            }
        }
    }
}

void
sa_selftest_select(void)
{
    const sa_isa best = sa_isa_now();
    for (int isa = 0; isa < SA_ISA_COUNT; isa++) {
        if (sa_isa_set((sa_isa)isa)) {
            check_all(sa_isa_name((sa_isa)isa));
        }
    }
    sa_isa_set(best);
}
