/* test_tile_strip.c - the strip functions of every table against double loops:
 * scores, softmax, values. */
#include <math.h>

#include "base/alloc.h"
#include "check.h"
#include "reals.h"

static const int dims[] = {1, 2, 3, 7, 16, 33, 64, 80, 129};
static const int key_counts[] = {1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 24, 31, 63, 64};
enum { N_DIMS = sizeof dims / sizeof *dims, N_KEYS = sizeof key_counts / sizeof *key_counts };

/* A strip of `wide` queries in columns w apart, and n_keys keys; w > wide
 * leaves columns that nobody may touch. */
typedef struct {
    const sa_tile *t;
    int w, wide, n_keys, dim;
    void *qt;
    real_rows keys;
} strip;

static strip
make_strip(const sa_tile *t, int wide, int n_keys, int dim)
{
    const int w = numbers_below(2) ? wide : wide + t->lanes;
    return (strip){t,
                   w,
                   wide,
                   n_keys,
                   dim,
                   real_random(t, (int64_t)dim * w, 1),
                   rows_random(t, n_keys, dim, 1)};
}

static void
free_strip(strip *s)
{
    sa_free(s->qt);
    rows_free(&s->keys);
}

/* Score of key j and query r; *bound: what rounding may add, times eps. */
static double
score_of(const strip *s, int j, int r, double *bound)
{
    double sum = 0, size = 0;
    for (int c = 0; c < s->dim; c++) {
        const double x =
            real_get(s->t, s->qt, (int64_t)c * s->w + r) * real_get(s->t, s->keys.row[j], c);
        sum += x;
        size += fabs(x);
    }
    *bound = (s->dim + 2) * real_eps(s->t) * size;
    return sum;
}

static void *
new_scores(const strip *s)
{
    const int rows = (s->n_keys + SA_TILE_STEP - 1) / SA_TILE_STEP * SA_TILE_STEP;
    return real_array(s->t, (int64_t)rows * s->w);
}

/* Columns beyond `wide` belong to somebody else. */
static bool
margin_untouched(const strip *s, const void *p, int n_rows)
{
    for (int j = 0; j < n_rows; j++) {
        for (int r = s->wide; r < s->w; r++) {
            if (!real_untouched(s->t, p, (int64_t)j * s->w + r)) {
                return false;
            }
        }
    }
    return true;
}

static void
check_scores(const sa_tile *t, const strip *s)
{
    void *out = new_scores(s);
    t->scores(out, s->qt, s->w, s->wide, (const void *const *)s->keys.row, s->n_keys, s->dim);
    for (int j = 0; j < s->n_keys; j++) {
        for (int r = 0; r < s->wide; r++) {
            double bound;
            const double want = score_of(s, j, r, &bound),
                         got = real_get(t, out, (int64_t)j * s->w + r);
            CHECK(check_near(got, want, bound), "%d keys, dim %d, (%d, %d): %.9g, not %.9g",
                  s->n_keys, s->dim, j, r, got, want);
        }
    }
    CHECK(margin_untouched(s, out, s->n_keys), "wrote beyond %d of %d columns", s->wide, s->w);
    sa_free(out);
}

/* ---- scores_exp ---- */

/* Intervals such that some rows see nothing, some everything, some only what comes after the keys;
 * first is not 0. */
static sa_clip
make_clip(int32_t *lo, int32_t *hi, int wide, int n_keys)
{
    const int32_t first = 1000;
    for (int r = 0; r < wide; r++) {
        lo[r] = first + (int32_t)numbers_below(n_keys + 5) - 1;
        hi[r] = first + (int32_t)numbers_below(n_keys + 12) - 1; /* often below lo: sees nothing */
        if (numbers_below(4) == 0) {
            lo[r] = 0;
            hi[r] = first + n_keys;
        }
    }
    return (sa_clip){first, lo, hi};
}

static bool
sees(const sa_clip *clip, int j, int r)
{
    return clip == NULL || (clip->lo[r] <= clip->first + j && clip->first + j < clip->hi[r]);
}

/* p = exp(s - m) and l += sum p for what the rows see. */
static void
check_exp_values(const strip *s, const void *p, const void *m, const void *l, const void *old_l,
                 const sa_clip *clip)
{
    const sa_tile *t = s->t;
    for (int r = 0; r < s->wide; r++) {
        double sum = real_get(t, old_l, r), slack = 0;
        const double top = real_get(t, m, r);
        for (int j = 0; j < s->n_keys; j++) {
            double bound;
            const double score = score_of(s, j, r, &bound);
            const double want = sees(clip, j, r) ? exp(score - top) : 0;
            const double relative = bound + (fabs(score) + fabs(top) + 8) * real_eps(t);
            const double got = real_get(t, p, (int64_t)j * s->w + r);
            CHECK(check_near(got, want, want * relative + 1e-37),
                  "%d keys, dim %d, (%d, %d): %g, not %g", s->n_keys, s->dim, j, r, got, want);
            sum += want;
            slack += want * relative;
        }
        slack += (s->n_keys + 2) * real_eps(t) * sum + 1e-36;
        CHECK(check_near(real_get(t, l, r), sum, slack), "sum of row %d: %g, not %g", r,
              real_get(t, l, r), sum);
    }
}

static void
check_scores_exp(const sa_tile *t, const strip *s, bool clipped)
{
    int32_t *lo = sa_malloc_array((size_t)s->wide, 4), *hi = sa_malloc_array((size_t)s->wide, 4);
    const sa_clip clip = make_clip(lo, hi, s->wide, s->n_keys);
    const sa_clip *const c = clipped ? &clip : NULL;
    void *m = real_random(t, s->wide, 4), *l = real_random(t, s->wide, 0), *p = new_scores(s);
    for (int r = 0; r < s->wide; r++) {
        real_put(t, l, r, numbers_below(2) ? 3 : 0);
    }
    void *old = real_copy(t, l, s->wide), *old_m = real_copy(t, m, s->wide);
    const void *const *row = (const void *const *)s->keys.row;
    bool ok = t->scores_exp(p, s->qt, s->w, s->wide, row, s->n_keys, s->dim, m, l, c);
    /* |s| <= dim / 3 or so: only long rows may exceed m + SA_STALE */
    double excess = -INFINITY, bound;
    for (int r = 0; r < s->wide; r++) {
        for (int j = 0; j < s->n_keys; j++) {
            const double over = score_of(s, j, r, &bound) - real_get(t, m, r) - SA_STALE;
            excess = sees(c, j, r) ? fmax(excess, over) : excess;
        }
    }
    CHECK(fabs(excess) < 1e-3 || ok == (excess < 0), "excess %g, returned %d", excess, ok);
    if (ok) {
        check_exp_values(s, p, m, l, old, c);
    }
    CHECK(margin_untouched(s, p, s->n_keys), "wrote beyond %d of %d columns", s->wide, s->w);

    /* one row whose maximum is too low, or not there yet */
    const int r = (int)numbers_below(s->wide), j = (int)numbers_below(s->n_keys);
    real_put(t, m, r, numbers_below(2) ? -INFINITY : score_of(s, j, r, &bound) - SA_STALE - 1);
    void *before = real_copy(t, l, s->wide);
    ok = t->scores_exp(p, s->qt, s->w, s->wide, row, s->n_keys, s->dim, m, l, c);
    if (sees(c, j, r)) {
        CHECK(!ok, "row %d exceeds its maximum unnoticed", r);
    }
    for (int i = 0; !ok && i < s->wide; i++) {
        CHECK(real_same(t, l, before, i), "l was touched");
    }
    for (int i = 0; i < s->wide; i++) {
        CHECK(i == r || real_same(t, m, old_m, i), "m was touched");
    }
    void *all[] = {lo, hi, m, l, p, old, old_m, before};
    for (int i = 0; i < 8; i++) {
        sa_free(all[i]);
    }
}

/* ---- clip and fold ---- */

static void
check_clip(const sa_tile *t, const strip *s)
{
    int32_t *lo = sa_malloc_array((size_t)s->wide, 4), *hi = sa_malloc_array((size_t)s->wide, 4);
    const sa_clip clip = make_clip(lo, hi, s->wide, s->n_keys);
    void *p = real_random(t, (int64_t)s->n_keys * s->w, 1);
    real_put(t, p, 0, NAN); /* unseen or not, NaN follows the same rule */
    void *old = real_copy(t, p, (int64_t)s->n_keys * s->w);
    t->clip(p, s->w, s->wide, s->n_keys, &clip);
    for (int j = 0; j < s->n_keys; j++) {
        for (int r = 0; r < s->w; r++) {
            const int64_t at = (int64_t)j * s->w + r;
            if (r >= s->wide || sees(&clip, j, r)) {
                CHECK(real_same(t, p, old, at), "(%d, %d) changed", j, r);
            } else {
                CHECK(real_get(t, p, at) == -INFINITY, "(%d, %d) is %g", j, r, real_get(t, p, at));
            }
        }
    }
    sa_free(lo);
    sa_free(hi);
    sa_free(p);
    sa_free(old);
}

typedef struct {
    void *s, *m, *l, *o;
} softmax;

/* Rows of four kinds: ordinary, nothing seen before, nothing seen now, far
 * above the old maximum.
 */
static softmax
make_softmax(const strip *s, int dim_v)
{
    const sa_tile *t = s->t;
    softmax x = {real_random(t, (int64_t)s->n_keys * s->w, 6), real_random(t, s->wide, 6),
                 real_random(t, s->wide, 1), real_random(t, (int64_t)dim_v * s->w, 1)};
    for (int r = 0; r < s->wide; r++) {
        const int kind = (int)numbers_below(6);
        real_put(t, x.l, r, 1 + fabs(real_get(t, x.l, r)));
        if (kind == 0 || kind == 1) {
            real_put(t, x.m, r, -INFINITY);
            real_put(t, x.l, r, 0);
            for (int c = 0; c < dim_v; c++) {
                real_put(t, x.o, (int64_t)c * s->w + r, 0);
            }
        }
        for (int j = 0; j < s->n_keys; j++) {
            const int64_t at = (int64_t)j * s->w + r;
            if (kind == 0 || kind == 2 || numbers_below(5) == 0) {
                real_put(t, x.s, at, -INFINITY);
            } else if (kind == 3) {
                real_put(t, x.s, at, 40 + real_get(t, x.s, at));
            }
        }
    }
    return x;
}

static softmax
copy_softmax(const strip *s, const softmax *x, int dim_v)
{
    return (softmax){real_copy(s->t, x->s, (int64_t)s->n_keys * s->w),
                     real_copy(s->t, x->m, s->wide), real_copy(s->t, x->l, s->wide),
                     real_copy(s->t, x->o, (int64_t)dim_v * s->w)};
}

static void
free_softmax(softmax *x)
{
    sa_free(x->s);
    sa_free(x->m);
    sa_free(x->l);
    sa_free(x->o);
}

/* Row r after the fold: the maximum is fresh enough, a row that was not raised
 * keeps its bits, and l, o and s stand relative to the new maximum. */
static void
check_fold_row(const strip *s, const softmax *old, const softmax *x, int r, int dim_v)
{
    const sa_tile *t = s->t;
    const double was = real_get(t, old->m, r), is = real_get(t, x->m, r);
    double high = -INFINITY;
    for (int j = 0; j < s->n_keys; j++) {
        high = fmax(high, real_get(t, old->s, (int64_t)j * s->w + r));
    }
    CHECK(is >= was && (high == -INFINITY || is >= high - SA_STALE - 1e-4), "m %g after %g and %g",
          is, was, high);
    const double base = is == -INFINITY ? 0 : is, factor = was == -INFINITY ? 0 : exp(was - base);
    double sum = real_get(t, old->l, r) * factor;
    for (int j = 0; j < s->n_keys; j++) {
        const double score = real_get(t, old->s, (int64_t)j * s->w + r), want = exp(score - base);
        const double got = real_get(t, x->s, (int64_t)j * s->w + r);
        const double relative = isinf(score) ? 0 : (fabs(score) + fabs(base) + 8) * real_eps(t);
        CHECK(check_near(got, want, want * relative + 1e-37), "p %g, not %g", got, want);
        sum += want;
    }
    const double bound = (s->n_keys + 80) * real_eps(t);
    CHECK(check_near(real_get(t, x->l, r), sum, bound * sum), "l %g, not %g", real_get(t, x->l, r),
          sum);
    for (int c = 0; c < dim_v; c++) {
        const int64_t at = (int64_t)c * s->w + r;
        const double want = real_get(t, old->o, at) * factor, got = real_get(t, x->o, at);
        CHECK(check_near(got, want, bound * fabs(want)), "o %g, not %g", got, want);
        CHECK(is != was || real_same(t, x->o, old->o, at), "o changed though m did not");
    }
}

static void
check_fold(const sa_tile *t, const strip *s)
{
    const int dim_v = s->dim;
    softmax x = make_softmax(s, dim_v), old = copy_softmax(s, &x, dim_v);
    t->fold(x.s, s->w, s->wide, s->n_keys, x.m, x.l, x.o, dim_v);
    for (int r = 0; r < s->wide; r++) {
        check_fold_row(s, &old, &x, r, dim_v);
    }
    for (int r = s->wide; r < s->w; r++) {
        for (int c = 0; c < dim_v; c++) {
            CHECK(real_same(t, x.o, old.o, (int64_t)c * s->w + r), "o beyond the strip");
        }
        for (int j = 0; j < s->n_keys; j++) {
            CHECK(real_same(t, x.s, old.s, (int64_t)j * s->w + r), "s beyond the strip");
        }
    }
    free_softmax(&x);
    free_softmax(&old);
}

/* ---- values ---- */

static void
check_values(const sa_tile *t, const strip *s)
{
    const int dim_v = s->dim;
    real_rows v = rows_random(t, s->n_keys, dim_v, 1);
    void *p = real_random(t, (int64_t)s->n_keys * s->w, 1),
         *o = real_random(t, (int64_t)dim_v * s->w, 1);
    void *seen = real_random(t, (int64_t)s->n_keys * s->w, 1);
    for (int64_t i = 0; i < (int64_t)s->n_keys * s->w; i++) {
        const int kind = (int)numbers_below(6); /* 0: unseen; 1: a weight that underflowed */
        real_put(t, p, i, kind > 1 ? fabs(real_get(t, p, i)) : 0);
        real_put(t, seen, i, kind > 0 ? real_get(t, seen, i) : -INFINITY);
    }
    void *old = real_copy(t, o, (int64_t)dim_v * s->w),
         *chosen = real_copy(t, o, (int64_t)dim_v * s->w);
    const void *const *row = (const void *const *)v.row;
    t->values(o, p, s->w, s->wide, row, s->n_keys, dim_v);
    t->values_select(chosen, p, seen, s->w, s->wide, row, s->n_keys, dim_v);
    for (int c = 0; c < dim_v; c++) {
        for (int r = 0; r < s->w; r++) {
            const int64_t at = (int64_t)c * s->w + r;
            double sum = real_get(t, old, at), size = fabs(sum);
            for (int j = 0; r < s->wide && j < s->n_keys; j++) {
                const double x = real_get(t, p, (int64_t)j * s->w + r) * real_get(t, v.row[j], c);
                sum += x;
                size += fabs(x);
            }
            CHECK(check_near(real_get(t, o, at), sum, (s->n_keys + 2) * real_eps(t) * size),
                  "%d keys, dim %d, (%d, %d): %g, not %g", s->n_keys, dim_v, c, r,
                  real_get(t, o, at), sum);
            CHECK(real_same(t, o, chosen, at), "values_select differs at (%d, %d)", c, r);
        }
    }

    /* a value that is not finite reaches the rows that see it, and no bit of any
     * other */
    const int bad = (int)numbers_below(s->n_keys), at = (int)numbers_below(dim_v);
    real_put(t, v.row[bad], at, numbers_below(2) ? NAN : INFINITY);
    t->values_select(old, p, seen, s->w, s->wide, row, s->n_keys, dim_v);
    for (int c = 0; c < dim_v; c++) {
        for (int r = 0; r < s->wide; r++) {
            const int64_t i = (int64_t)c * s->w + r;
            if (c == at && real_get(t, seen, (int64_t)bad * s->w + r) != -INFINITY) {
                CHECK(!isfinite(real_get(t, old, i)), "(%d, %d) is finite", c, r);
            } else {
                CHECK(real_same(t, old, chosen, i), "(%d, %d) changed", c, r);
            }
        }
    }
    rows_free(&v);
    sa_free(p);
    sa_free(seen);
    sa_free(o);
    sa_free(old);
    sa_free(chosen);
}

static void
check_table(const sa_tile *t)
{
    static const struct {
        const char *name;
        void (*run)(const sa_tile *t, const strip *s);
    } parts[] = {{"scores", check_scores},
                 {"clip", check_clip},
                 {"fold", check_fold},
                 {"values", check_values}};

    check_case("%s: sizes of the table", table_name(t));
    CHECK(t->real_bytes * t->lanes >= 16 && t->strip_max % t->lanes == 0 &&
              t->strip_max <= SA_STRIP_MAX,
          "%d lanes, strips of %d", t->lanes, t->strip_max);
    for (size_t i = 0; i < 6; i++) {
        check_case("%s: %s", table_name(t),
                   i < 4    ? parts[i].name
                   : i == 4 ? "scores_exp"
                            : "scores_exp, clipped");
        for (int wide = t->lanes; wide <= t->strip_max; wide += t->lanes) {
            for (int k = 0; k < N_KEYS; k++) {
                strip s = make_strip(t, wide, key_counts[k], dims[numbers_below(N_DIMS)]);
                if (i < 4) {
                    parts[i].run(t, &s);
                } else {
                    check_scores_exp(t, &s, i == 5);
                }
                free_strip(&s);
            }
        }
    }
}

void
sa_selftest_tile_strip(void)
{
    each_table(check_table);
}
