/* test_tile_grad.c - the sums that keys receive, of every table, against double loops. */
#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "check.h"
#include "reals.h"

static const int dims[] = {1, 3, 8, 15, 16, 17, 24, 40, 64, 65, 100};
static const int key_counts[] = {1, 2, 3, 4, 5, 8, 9, 12, 13, 31, 64};
enum { N_DIMS = sizeof dims / sizeof *dims, N_KEYS = sizeof key_counts / sizeof *key_counts };

/* p and seen as strips hold them, rows b, and what keys had before. */
typedef struct {
    const sa_tile *t;
    sa_strip_sums s;
    void *p, *seen, *b;
    real_rows before;
} trial;

static int64_t
place(const sa_strip_sums *s, int j, int i)
{
    return i / s->w * s->step + (int64_t)j * s->w + i % s->w;
}

/* A third of the weights is hidden: weight 0, score -inf. */
static trial
make_trial(const sa_tile *t, int n_keys, int dim)
{
    const int w = t->lanes * (1 + (int)numbers_below(t->strip_max / t->lanes));
    const int n_rows = 1 + (int)numbers_below(3 * w), strips = (n_rows + w - 1) / w;
    const int64_t step = (int64_t)(n_keys + numbers_below(5)) * w;
    const int64_t ld = (dim + t->lanes - 1) / t->lanes * t->lanes;
    trial x = {
        .t = t,
        .s = {.step = step, .ldb = ld, .w = w, .n_rows = n_rows, .n_keys = n_keys, .dim = dim},
        .p = real_random(t, strips * step, 1),
        .seen = real_random(t, strips * step, 1),
        .b = real_random(t, n_rows * ld, 1),
        .before = rows_random(t, n_keys, dim, 1),
    };
    for (int64_t at = 0; at < strips * step; at++) {
        if (numbers_below(3) == 0) {
            real_put(t, x.p, at, 0);
            real_put(t, x.seen, at, -INFINITY);
        }
    }
    x.s.p = x.p;
    x.s.b = x.b;
    return x;
}

static void
free_trial(trial *x)
{
    sa_free(x->p);
    sa_free(x->seen);
    sa_free(x->b);
    rows_free(&x->before);
}

static real_rows
run(const trial *x, const void *seen, const void *b)
{
    sa_strip_sums s = x->s;
    real_rows to = {.n = x->before.n};
    for (int j = 0; j < to.n; j++) {
        to.row[j] = real_copy(x->t, x->before.row[j], s.dim);
    }
    s.seen = seen;
    s.b = b;
    x->t->sums(to.row, &s);
    return to;
}

/* The hidden rows of the last query alone are NaN: keys that do not see it keep their bits. */
static void
check_hidden(const trial *x, const real_rows *clean)
{
    const sa_strip_sums *const s = &x->s;
    const int64_t last = (s->n_rows - 1) * s->ldb;
    void *const b = real_copy(x->t, x->b, s->n_rows * s->ldb);
    for (int c = 0; c < s->dim; c++) {
        real_put(x->t, b, last + c, NAN);
    }
    real_rows got = run(x, x->seen, b);
    bool same = true, lost = false;
    for (int j = 0; j < s->n_keys; j++) {
        const bool hidden = real_get(x->t, x->seen, place(s, j, s->n_rows - 1)) == -INFINITY;
        for (int c = 0; c < s->dim; c++) {
            same = same && (!hidden || real_same(x->t, got.row[j], clean->row[j], c));
            lost = lost || (!hidden && !isnan(real_get(x->t, got.row[j], c)));
        }
    }
    CHECK(same, "%d keys, %d rows: a row that keys do not see changes them", s->n_keys, s->n_rows);
    CHECK(!lost, "%d keys, %d rows: a NaN in use is lost", s->n_keys, s->n_rows);
    sa_free(b);
    rows_free(&got);
}

static void
check_trial(const trial *x)
{
    const sa_strip_sums *const s = &x->s;
    real_rows plain = run(x, NULL, x->b), select = run(x, x->seen, x->b);
    bool near = true, same = true;
    for (int at = 0; at < s->n_keys * s->dim; at++) {
        const int j = at / s->dim, c = at % s->dim;
        double want = real_get(x->t, x->before.row[j], c);
        for (int i = 0; i < s->n_rows; i++) {
            want += real_get(x->t, x->p, place(s, j, i)) * real_get(x->t, x->b, i * s->ldb + c);
        }
        const double bound = (s->n_rows + 2) * real_eps(x->t) * (s->n_rows + 1);
        near = near && check_near(real_get(x->t, plain.row[j], c), want, bound);
        same = same && real_same(x->t, plain.row[j], select.row[j], c);
    }
    CHECK(near, "%d keys, %d rows, dim %d: wrong sums", s->n_keys, s->n_rows, s->dim);
    CHECK(same, "%d keys, %d rows, dim %d: other bits with seen", s->n_keys, s->n_rows, s->dim);
    check_hidden(x, &select);
    rows_free(&plain);
    rows_free(&select);
}

/* Set, and not added to: what stands in the rows before, NaN too, is not read. */
static void
check_fresh(trial *x)
{
    sa_strip_sums *const s = &x->s;
    real_rows kept = x->before;
    x->before = (real_rows){.n = kept.n};
    for (int j = 0; j < kept.n; j++) {
        x->before.row[j] = real_copy(x->t, kept.row[j], s->dim);
        for (int c = 0; c < s->dim; c++) {
            real_put(x->t, x->before.row[j], c, 0);
        }
    }
    real_rows want = run(x, NULL, x->b);
    for (int at = 0; at < s->n_keys * s->dim; at++) {
        real_put(x->t, x->before.row[at / s->dim], at % s->dim, NAN);
    }
    s->fresh = true;
    real_rows got = run(x, NULL, x->b);
    s->fresh = false;
    bool same = true;
    for (int at = 0; at < s->n_keys * s->dim; at++) {
        same = same && real_same(x->t, want.row[at / s->dim], got.row[at / s->dim], at % s->dim);
    }
    CHECK(same, "%d keys, %d rows: fresh rows differ from sums added to 0", s->n_keys, s->n_rows);
    rows_free(&want);
    rows_free(&got);
    rows_free(&x->before);
    x->before = kept;
}

/* Of rows [i, i + n) of growing i alone, as begin and end of each key say: those of the whole,
 * where the others have weight 0. */
static void
check_ranges(trial *x)
{
    sa_strip_sums *const s = &x->s;
    int32_t begin[64], end[64];
    const int span = 1 + (int)numbers_below(s->n_rows);
    for (int j = 0, i = 0; j < s->n_keys; j++) {
        i = SA_MIN(i + (int)numbers_below(3), s->n_rows);
        begin[j] = i;
        end[j] = SA_MIN(i + span, s->n_rows);
        for (int r = 0; r < s->n_rows; r++) {
            if (r < begin[j] || r >= end[j]) {
                real_put(x->t, x->p, place(s, j, r), 0);
            }
        }
    }
    real_rows all = run(x, NULL, x->b);
    s->begin = begin;
    s->end = end;
    real_rows some = run(x, NULL, x->b);
    s->begin = s->end = NULL;
    bool same = true;
    for (int at = 0; at < s->n_keys * s->dim; at++) {
        same = same && real_same(x->t, all.row[at / s->dim], some.row[at / s->dim], at % s->dim);
    }
    CHECK(same, "%d keys, %d rows: rows outside a range count", s->n_keys, s->n_rows);
    rows_free(&all);
    rows_free(&some);
}

static void
check_sums(const sa_tile *t)
{
    check_case("sums, %s", table_name(t));
    for (int d = 0; d < N_DIMS; d++) {
        for (int k = 0; k < N_KEYS; k++) {
            trial x = make_trial(t, key_counts[k], dims[d]);
            check_trial(&x);
            check_ranges(&x);
            check_fresh(&x);
            free_trial(&x);
        }
    }
}

static void
check_inner(const sa_tile *t)
{
    check_case("inner products, %s", table_name(t));
    for (int64_t n = 0; n < 70; n++) {
        void *const a = real_random(t, n + 1, 1), *const b = real_random(t, n + 1, 1);
        double want = 0;
        for (int64_t c = 0; c < n; c++) {
            want += real_get(t, a, c) * real_get(t, b, c);
        }
        CHECK(check_near(t->inner(a, b, n), want, 1e-14 * (double)(n + 1)), "%d numbers", (int)n);
        sa_free(a);
        sa_free(b);
    }
}

void
sa_selftest_tile_grad(void)
{
    each_table(check_inner);
    each_table(check_sums);
}
