/* test_tile_row.c - the row functions of every table against double loops:
 * dots, softmax of one row, products, score terms, thresholds. */
#include <math.h>

#include "base/alloc.h"
#include "check.h"
#include "reals.h"

static const int sizes[] = {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64};
enum { N_SIZES = sizeof sizes / sizeof *sizes };

static void
check_dots(const sa_tile *t)
{
    for (int n = 0; n < N_SIZES; n++) {
        for (int d = 0; d < N_SIZES; d++) {
            const int dim = sizes[d];
            real_rows k = rows_random(t, sizes[n], dim, 1);
            void *q = real_random(t, dim, 1), *s = real_array(t, k.n);
            t->dots(s, q, (const void *const *)k.row, k.n, dim);
            for (int j = 0; j < k.n; j++) {
                double sum = 0, size = 0;
                for (int c = 0; c < dim; c++) {
                    const double x = real_get(t, q, c) * real_get(t, k.row[j], c);
                    sum += x;
                    size += fabs(x);
                }
                CHECK(check_near(real_get(t, s, j), sum, (dim + 2) * real_eps(t) * size),
                      "dim %d, key %d: %g, not %g", dim, j, real_get(t, s, j), sum);
            }
            rows_free(&k);
            sa_free(q);
            sa_free(s);
        }
    }
}

static void
check_axpys(const sa_tile *t)
{
    for (int n = 0; n < N_SIZES; n++) {
        for (int d = 0; d < N_SIZES; d++) {
            const int dim = sizes[d];
            real_rows v = rows_random(t, sizes[n], dim, 1);
            void *p = real_random(t, v.n, 1), *o = real_random(t, dim, 1),
                 *old = real_copy(t, o, dim);
            void *seen = numbers_below(4) ? real_random(t, v.n, 1) : NULL;
            for (int j = 0; j < v.n; j++) {
                if (seen != NULL && numbers_below(3) == 0) { /* an unseen row is not read */
                    real_put(t, p, j, 0);
                    real_put(t, seen, j, -INFINITY);
                    real_put(t, v.row[j], numbers_below(dim), numbers_below(2) ? NAN : -INFINITY);
                }
            }
            t->axpys(o, p, seen, (const void *const *)v.row, v.n, dim);
            for (int c = 0; c < dim; c++) {
                double sum = real_get(t, old, c), size = fabs(sum);
                for (int j = 0; j < v.n; j++) {
                    const double weight = real_get(t, p, j);
                    if (weight != 0) {
                        sum += weight * real_get(t, v.row[j], c);
                        size += fabs(weight * real_get(t, v.row[j], c));
                    }
                }
                CHECK(check_near(real_get(t, o, c), sum, (v.n + 2) * real_eps(t) * size),
                      "%d keys, column %d: %g, not %g", v.n, c, real_get(t, o, c), sum);
            }
            rows_free(&v);
            sa_free(p);
            sa_free(seen);
            sa_free(o);
            sa_free(old);
        }
    }
}

/* A weight that underflowed still counts: 0 NaN is NaN. */
static void
check_axpys_nan(const sa_tile *t)
{
    for (int d = 0; d < N_SIZES; d++) {
        const int dim = sizes[d], at = (int)numbers_below(dim);
        real_rows v = rows_random(t, 3, dim, 1);
        void *p = real_random(t, 3, 1), *o = real_random(t, dim, 1), *seen = real_random(t, 3, 1);
        real_put(t, p, 1, 0);
        real_put(t, v.row[1], at, NAN);
        t->axpys(o, p, numbers_below(2) ? seen : NULL, (const void *const *)v.row, 3, dim);
        for (int c = 0; c < dim; c++) {
            CHECK(!isnan(real_get(t, o, c)) == (c != at), "column %d is %g", c, real_get(t, o, c));
        }
        rows_free(&v);
        sa_free(p);
        sa_free(o);
        sa_free(seen);
    }
}

/* ---- softmax of one row ---- */

/* kind 0: nothing seen before; 1: nothing seen now; 2: neither; 3: far above
 * the old maximum. */
static void
fold_row_once(const sa_tile *t, int n, int dim, int kind)
{
    const bool first = kind == 0 || kind == 2, nothing = kind == 1 || kind == 2;
    void *s = real_random(t, n, 5), *o = real_random(t, dim, 1), *m = real_random(t, 1, 5);
    void *l = real_random(t, 1, 1);
    real_put(t, l, 0, first ? 0 : 2);
    if (first) {
        real_put(t, m, 0, -INFINITY);
        t->fill(o, dim, 0);
    }
    for (int j = 0; j < n; j++) {
        if (nothing || (j > 0 && numbers_below(4) == 0)) {
            real_put(t, s, j, -INFINITY);
        } else if (kind == 3) {
            real_put(t, s, j, 60);
        }
    }
    void *old_s = real_copy(t, s, n), *old_o = real_copy(t, o, dim);
    const double was = real_get(t, m, 0), had = real_get(t, l, 0);
    t->fold_row(s, n, m, l, o, dim);
    const double is = real_get(t, m, 0), base = is == -INFINITY ? 0 : is;
    const double factor = was == -INFINITY ? 0 : exp(was - base);
    double sum = had * factor, high = -INFINITY;
    for (int j = 0; j < n; j++) {
        const double score = real_get(t, old_s, j), want = exp(score - base);
        const double bound = isinf(score) ? 0 : want * (fabs(score) + fabs(base) + 8) * real_eps(t);
        CHECK(check_near(real_get(t, s, j), want, bound + 1e-37), "p %g, not %g", real_get(t, s, j),
              want);
        sum += want;
        high = fmax(high, score);
    }
    CHECK(is >= was && (high == -INFINITY || is >= high - SA_STALE - 1e-4), "m %g after %g and %g",
          is, was, high);
    const double bound = (n + 80) * real_eps(t);
    CHECK(check_near(real_get(t, l, 0), sum, bound * sum), "l %g, not %g", real_get(t, l, 0), sum);
    for (int c = 0; c < dim; c++) {
        const double want = real_get(t, old_o, c) * factor;
        CHECK(check_near(real_get(t, o, c), want, bound * fabs(want)), "o %g, not %g",
              real_get(t, o, c), want);
        CHECK(is != was || real_same(t, o, old_o, c), "o changed though m did not");
    }
    void *all[] = {s, o, m, l, old_s, old_o};
    for (int i = 0; i < 6; i++) {
        sa_free(all[i]);
    }
}

static void
check_fold_row(const sa_tile *t)
{
    for (int n = 0; n < N_SIZES; n++) {
        for (int kind = 0; kind < 4; kind++) {
            fold_row_once(t, sizes[n], sizes[numbers_below(N_SIZES)], kind);
        }
    }
}

/* Two parts of one row, over all four cases of having seen nothing. */
static void
check_join(const sa_tile *t)
{
    for (int kind = 0; kind < 8; kind++) {
        const int dim = sizes[numbers_below(N_SIZES)];
        void *m = real_random(t, 2, 30), *l = real_random(t, 2, 0), *m2, *l2;
        void *o = real_random(t, dim, 1), *o2 = real_random(t, dim, 1), *old = real_copy(t, o, dim);
        for (int side = 0; side < 2; side++) {
            const bool none = kind >> side & 1;
            real_put(t, l, side, none ? 0 : 1.5 + side);
            if (none) {
                real_put(t, m, side, -INFINITY);
                t->fill(side ? o2 : o, dim, 0);
            }
        }
        m2 = (char *)m + t->real_bytes;
        l2 = (char *)l + t->real_bytes;
        const double ma = real_get(t, m, 0), mb = real_get(t, m, 1), top = fmax(ma, mb);
        const double a = ma == -INFINITY ? 0 : exp(ma - top),
                     b = mb == -INFINITY ? 0 : exp(mb - top);
        const double sum = real_get(t, l, 0) * a + real_get(t, l, 1) * b;
        t->join_row(m, l, o, m2, l2, o2, dim);
        const double bound = 80 * real_eps(t);
        CHECK(real_get(t, m, 0) == top, "m %g, not %g", real_get(t, m, 0), top);
        CHECK(check_near(real_get(t, l, 0), sum, bound * sum), "l %g, not %g", real_get(t, l, 0),
              sum);
        for (int c = 0; c < dim; c++) {
            const double x = kind & 1 ? 0 : real_get(t, old, c) * a, y = real_get(t, o2, c) * b;
            CHECK(check_near(real_get(t, o, c), x + y, bound * (fabs(x) + fabs(y))), "o %g, not %g",
                  real_get(t, o, c), x + y);
        }
        void *all[] = {m, l, o, o2, old};
        for (int i = 0; i < 5; i++) {
            sa_free(all[i]);
        }
    }
}

static void
check_finish(const sa_tile *t)
{
    for (int n = 0; n < N_SIZES; n++) {
        void *m = real_random(t, sizes[n], 50), *l = real_random(t, sizes[n], 9);
        void *factor = real_array(t, sizes[n]), *lse = real_array(t, sizes[n]);
        for (int r = 0; r < sizes[n]; r++) {
            const bool none = numbers_below(3) == 0;
            real_put(t, l, r, none ? 0 : fabs(real_get(t, l, r)) + 0.5);
            real_put(t, m, r, none ? -INFINITY : real_get(t, m, r));
        }
        t->finish(factor, lse, m, l, sizes[n]);
        for (int r = 0; r < sizes[n]; r++) {
            const double sum = real_get(t, l, r), top = real_get(t, m, r);
            const double want = sum == 0 ? -INFINITY : top + log(sum), f = sum == 0 ? 0 : 1 / sum;
            CHECK(check_near(real_get(t, factor, r), f, 2 * real_eps(t) * f), "factor of %g", sum);
            CHECK(check_near(real_get(t, lse, r), want, 2 * real_eps(t) * (fabs(top) + 3)),
                  "lse %g, not %g", real_get(t, lse, r), want);
        }
        void *all[] = {m, l, factor, lse};
        for (int i = 0; i < 4; i++) {
            sa_free(all[i]);
        }
    }
}

/* ---- score terms ---- */

static void
check_terms(const sa_tile *t)
{
    for (int n = 0; n < N_SIZES; n++) {
        void *s = real_random(t, sizes[n], 80), *old = real_copy(t, s, sizes[n]);
        void *term = real_random(t, sizes[n], 3);
        const double cap = 30;
        t->softcap(s, sizes[n], cap);
        for (int i = 0; i < sizes[n]; i++) {
            const double want = cap * tanh(real_get(t, old, i) / cap);
            CHECK(check_near(real_get(t, s, i), want, 4 * real_eps(t) * cap),
                  "%g became %g, not %g", real_get(t, old, i), real_get(t, s, i), want);
            if (numbers_below(3) == 0) { /* unseen: whatever the score is */
                real_put(t, term, i, -INFINITY);
                real_put(t, s, i, (const double[]){NAN, INFINITY, 1}[numbers_below(3)]);
            }
        }
        sa_free(old);
        old = real_copy(t, s, sizes[n]);
        t->add_term(s, term, sizes[n]);
        for (int i = 0; i < sizes[n]; i++) {
            const double x = real_get(t, term, i), sum = real_get(t, old, i) + x;
            CHECK(x == -INFINITY ? real_get(t, s, i) == -INFINITY
                                 : check_near(real_get(t, s, i), sum, real_eps(t) * fabs(sum)),
                  "%g + %g gave %g", real_get(t, old, i), x, real_get(t, s, i));
        }
        sa_free(s);
        sa_free(old);
        sa_free(term);
    }
}

static void
check_finite(const sa_tile *t)
{
    for (int n = 0; n < N_SIZES; n++) {
        for (int d = 0; d < N_SIZES; d++) {
            real_rows v = rows_random(t, sizes[n], sizes[d], t->real_bytes == 8 ? 1e308 : 3e38);
            const void *const *row = (const void *const *)v.row;
            CHECK(t->finite(row, v.n, sizes[d]), "finite rows");
            for (int at = 0; at < sizes[d]; at++) {
                void *bad = v.row[numbers_below(v.n)];
                const double x = real_get(t, bad, at);
                real_put(t, bad, at, (const double[]){NAN, INFINITY, -INFINITY}[numbers_below(3)]);
                CHECK(!t->finite(row, v.n, sizes[d]), "column %d of %d", at, sizes[d]);
                real_put(t, bad, at, x);
            }
            rows_free(&v);
        }
    }
}

/* ---- product ---- */

static void
product_once(const sa_tile *t, int m, int n, int k, bool accumulate)
{
    const int64_t lda = k + numbers_below(3), ldb = n + numbers_below(3),
                  ldc = n + numbers_below(3);
    void *a = real_random(t, (m - 1) * lda + k, 1), *b = real_random(t, (k - 1) * ldb + n, 1);
    void *c = real_array(t, (m - 1) * ldc + n);
    for (int i = 0; accumulate && i < m; i++) {
        for (int j = 0; j < n; j++) {
            real_put(t, c, i * ldc + j, numbers_real());
        }
    }
    void *old = real_copy(t, c, (m - 1) * ldc + n);
    t->product(c, ldc, a, lda, b, ldb, m, n, k, accumulate);
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < (i + 1 < m ? ldc : n); j++) {
            if (j >= n) {
                CHECK(real_untouched(t, c, i * ldc + j), "(%d, %d) was written", i, j);
                continue;
            }
            double sum = accumulate ? real_get(t, old, i * ldc + j) : 0, size = fabs(sum);
            for (int x = 0; x < k; x++) {
                const double term = real_get(t, a, i * lda + x) * real_get(t, b, x * ldb + j);
                sum += term;
                size += fabs(term);
            }
            CHECK(check_near(real_get(t, c, i * ldc + j), sum, (k + 2) * real_eps(t) * size),
                  "%d x %d x %d, (%d, %d): %g, not %g", m, n, k, i, j, real_get(t, c, i * ldc + j),
                  sum);
        }
    }
    void *all[] = {a, b, c, old};
    for (int i = 0; i < 4; i++) {
        sa_free(all[i]);
    }
}

static void
check_product(const sa_tile *t)
{
    for (int m = 0; m < N_SIZES; m++) {
        for (int n = 0; n < N_SIZES; n++) {
            product_once(t, sizes[m], sizes[n], sizes[numbers_below(N_SIZES)], (m + n) % 2);
        }
    }
}

/* ---- thresholds ---- */

static void
check_thresholds(const sa_tile *t)
{
    static const int lengths[] = {0, 1, 7, 31, 32, 33, 100, 257, 1000};
    for (size_t i = 0; i < 5 * sizeof lengths / sizeof *lengths; i++) {
        const int n = lengths[i / 5];
        const double level = (const double[]){-INFINITY, -2, 0.3, 0.9, 2}[i % 5];
        void *s = real_random(t, n, 1);
        for (int j = 0; j < n; j++) {
            const int kind = (int)numbers_below(20);
            if (kind < 3) {
                real_put(t, s, j, (const double[]){NAN, -INFINITY, real_round(t, level)}[kind]);
            }
        }
        int64_t want = 0;
        for (int j = 0; j < n; j++) {
            want += !(real_get(t, s, j) < real_round(t, level));
        }
        int32_t *index = sa_malloc_array((size_t)want, sizeof *index); /* no room for one more */
        CHECK(t->count_ge(s, n, level) == want, "%d scores, level %g", n, level);
        CHECK(t->compress_ge(s, n, level, index) == want, "%d scores, level %g", n, level);
        for (int64_t j = 0, at = 0; j < n; j++) {
            if (!(real_get(t, s, j) < real_round(t, level))) {
                CHECK(index[at] == j, "index %lld", (long long)at);
                at++;
            }
        }
        sa_free(s);
        sa_free(index);
    }
}

static void
check_peak(const sa_tile *t)
{
    CHECK(t->fma_peak(0) == 0, "no rounds");
    const double flops = t->fma_peak(100);
    CHECK(flops >= 200.0 * t->lanes && t->fma_peak(200) == 2 * flops, "%g flops", flops);
}

static void
check_read(const sa_tile *t)
{
    for (int n = 0; n < 200; n += 7) {
        void *const x = real_random(t, n, 1);
        double sum = 0;
        for (int i = 0; i < n; i++) {
            sum += real_get(t, x, i);
        }
        CHECK(check_near(t->read_sum(x, n), sum, 20 * real_eps(t) * (n + 1)), "%d numbers", n);
        sa_free(x);
    }
}

static void
check_table(const sa_tile *t)
{
    static const struct {
        const char *name;
        void (*run)(const sa_tile *t);
    } parts[] = {{"dots", check_dots},
                 {"axpys", check_axpys},
                 {"axpys of NaN", check_axpys_nan},
                 {"fold_row", check_fold_row},
                 {"join_row", check_join},
                 {"finish", check_finish},
                 {"softcap and add_term", check_terms},
                 {"finite", check_finite},
                 {"product", check_product},
                 {"thresholds", check_thresholds},
                 {"fma_peak", check_peak},
                 {"read_sum", check_read}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        check_case("%s: %s", table_name(t), parts[i].name);
        parts[i].run(t);
    }
}

void
sa_selftest_tile_row(void)
{
    each_table(check_table);
}
