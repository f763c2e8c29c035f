/* test_tile_run.c - the row path over runs of keys: rows of every storage type and groups of
 * queries give the bits of one query over listed rows of reals. */
#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "check.h"
#include "reals.h"

static const int dims[] = {1, 3, 7, 8, 16, 17, 40, 64, 65, 80, 128, 200};
static const int lengths[] = {1, 2, 3, 4, 5, 15, 16, 17, 33, 63, 64};
enum {
    N_DIMS = sizeof dims / sizeof *dims,
    N_LENGTHS = sizeof lengths / sizeof *lengths,
    MOST_ROWS = 9,
    LONG_RUN = 150
};

/* Rows one after another in a storage type, ending where the memory ends; the same rows as reals.
 */
typedef struct {
    int n, dim;
    sa_run run;
    void *memory, *reals;
    const void *row[LONG_RUN];
} run_rows;

static run_rows
run_random(const sa_tile *t, sa_dtype dtype, int n, int dim)
{
    const int64_t size = (int64_t)sa_dtype_size(dtype), step = dim + numbers_below(3) * 5;
    run_rows r = {.n = n, .dim = dim};
    r.memory = sa_malloc((size_t)(((n - 1) * step + dim) * size));
    r.reals = real_array(t, n * (int64_t)dim);
    r.run = (sa_run){r.memory, step * size, dtype};
    for (int j = 0; j < n; j++) {
        void *const from = real_random(t, dim, 1), *const one = real_array(t, 1);
        char *const at = (char *)r.memory + j * step * size;
        real_put(t, one, 0, 1);
        t->store_row(at, dtype, from, dim, one);
        r.row[j] = (char *)r.reals + (int64_t)j * dim * t->real_bytes;
        t->load_rows((void *)r.row[j], dim, at, dtype, 0, 1, dim, 1);
        sa_free(from);
        sa_free(one);
    }
    return r;
}

static void
run_free(run_rows *r)
{
    sa_free(r->memory);
    sa_free(r->reals);
}

/* The storage types of a table: its real type, and the halves where that is float. */
static int
types_of(const sa_tile *t, sa_dtype types[3])
{
    types[0] = t->real_bytes == 8 ? SA_F64 : SA_F32;
    types[1] = SA_F16;
    types[2] = SA_BF16;
    return t->real_bytes == 8 ? 1 : 3;
}

static void *
at_real(const sa_tile *t, void *p, int64_t i)
{
    return (char *)p + i * t->real_bytes;
}

static void
dots_once(const sa_tile *t, sa_dtype dtype, int n, int dim, int n_rows)
{
    run_rows k = run_random(t, dtype, n, dim), other = run_random(t, dtype, n, dim);
    void *q = real_random(t, n_rows * (int64_t)dim, 1), *one = real_array(t, SA_TILE_KEYS);
    void *s = real_array(t, n_rows * (int64_t)SA_TILE_KEYS);
    t->run_dots(s, q, n_rows, &k.run, n, dim, numbers_below(2) ? &other.run : NULL);
    for (int r = 0; r < n_rows; r++) {
        t->dots(one, at_real(t, q, r * (int64_t)dim), k.row, n, dim);
        for (int j = 0; j < SA_TILE_KEYS; j++) {
            const int64_t at = r * (int64_t)SA_TILE_KEYS + j;
            CHECK(j < n ? real_same(t, at_real(t, s, at), at_real(t, one, j), 0)
                        : real_untouched(t, s, at),
                  "%d rows, %d keys of %d: (%d, %d) is %g, not %g", n_rows, n, dim, r, j,
                  real_get(t, s, at), real_get(t, one, j));
        }
    }
    run_free(&k);
    run_free(&other);
    sa_free(q);
    sa_free(one);
    sa_free(s);
}

/* With `seen`, rows that a query does not see hold NaN. */
static void
axpys_once(const sa_tile *t, sa_dtype dtype, int n, int dim, int n_rows)
{
    const int64_t scores = n_rows * (int64_t)SA_TILE_KEYS;
    run_rows v = run_random(t, dtype, n, dim), other = run_random(t, dtype, n, dim);
    void *p = real_random(t, scores, 1), *o = real_random(t, n_rows * (int64_t)dim, 1);
    void *want = real_copy(t, o, n_rows * (int64_t)dim), *seen = NULL;
    if (numbers_below(3) == 0) {
        seen = real_random(t, scores, 1);
        for (int64_t at = 0; at < scores; at++) {
            if (numbers_below(3) == 0) {
                real_put(t, seen, at, -INFINITY);
                real_put(t, p, at, 0);
            }
        }
        const int hidden = (int)numbers_below(n);
        for (int r = 0; r < n_rows; r++) {
            real_put(t, seen, r * (int64_t)SA_TILE_KEYS + hidden, -INFINITY);
        }
        memset((char *)v.memory + hidden * v.run.step, 0xFF,
               (size_t)dim * sa_dtype_size(dtype)); /* NaN in every type */
    }
    t->run_axpys(o, p, seen, n_rows, &v.run, n, dim, numbers_below(2) ? &other.run : NULL);
    for (int r = 0; r < n_rows; r++) {
        const int64_t at = r * (int64_t)SA_TILE_KEYS, to = r * (int64_t)dim;
        t->axpys(at_real(t, want, to), at_real(t, p, at), seen ? at_real(t, seen, at) : NULL, v.row,
                 n, dim);
        for (int64_t c = to; c < to + dim; c++) {
            CHECK(real_same(t, o, want, c), "%d rows, %d keys of %d, row %d%s: %g, not %g", n_rows,
                  n, dim, r, seen ? ", masked" : "", real_get(t, o, c), real_get(t, want, c));
        }
    }
    void *all[] = {p, o, want, seen};
    for (int i = 0; i < 4; i++) {
        sa_free(all[i]);
    }
    run_free(&v);
    run_free(&other);
}

static void
check_runs(const sa_tile *t)
{
    sa_dtype types[3];
    const int n_types = types_of(t, types);
    for (int type = 0; type < n_types; type++) {
        check_case("%s: runs of %d bytes", table_name(t), (int)sa_dtype_size(types[type]));
        for (int n = 0; n < N_LENGTHS; n++) {
            for (int d = 0; d < N_DIMS; d++) {
                const int n_rows = 1 + (n + d) % MOST_ROWS;
                dots_once(t, types[type], lengths[n], dims[d], n_rows);
                axpys_once(t, types[type], lengths[n], dims[d], n_rows);
            }
        }
    }
}

/* A state of n_rows queries that met no key yet. */
static sa_queries
queries_new(const sa_tile *t, const void *q, int n_rows, int dim, int dim_v)
{
    sa_queries a = {.q = q, .n_rows = n_rows, .dim = dim, .dim_v = dim_v};
    a.s = real_array(t, n_rows * (int64_t)SA_TILE_KEYS);
    a.m = real_array(t, n_rows);
    a.l = real_array(t, n_rows);
    a.o = real_array(t, n_rows * (int64_t)dim_v);
    t->fill(a.m, n_rows, -INFINITY);
    t->fill(a.l, n_rows, 0);
    t->fill(a.o, n_rows * (int64_t)dim_v, 0);
    return a;
}

static void
queries_free(sa_queries *a)
{
    void *all[] = {a->s, a->m, a->l, a->o};
    for (int i = 0; i < 4; i++) {
        sa_free(all[i]);
    }
}

/* The same by the three functions that run_attend stands for. */
static void
attend_by_steps(const sa_tile *t, const sa_queries *a, const run_rows *k, const run_rows *v, int n,
                int step)
{
    for (int j = 0; j < n; j += step) {
        const int keys = SA_MIN(step, n - j);
        for (int r = 0; r < a->n_rows; r++) {
            void *const s = at_real(t, a->s, r * (int64_t)SA_TILE_KEYS);
            void *const o = at_real(t, a->o, r * (int64_t)a->dim_v);
            t->dots(s, (const char *)a->q + (int64_t)r * a->dim * t->real_bytes, k->row + j, keys,
                    a->dim);
            t->fold_row(s, keys, at_real(t, a->m, r), at_real(t, a->l, r), o, a->dim_v);
            t->axpys(o, s, NULL, v->row + j, keys, a->dim_v);
        }
    }
}

static void
attend_once(const sa_tile *t, sa_dtype k_type, sa_dtype v_type, int n_rows)
{
    const int dim = dims[numbers_below(N_DIMS)], dim_v = dims[numbers_below(N_DIMS)];
    const int n = 1 + (int)numbers_below(LONG_RUN), step = 16 * (1 + (int)numbers_below(4));
    run_rows k = run_random(t, k_type, n, dim), v = run_random(t, v_type, n, dim_v);
    void *q = real_random(t, n_rows * (int64_t)dim, 1);
    sa_queries a = queries_new(t, q, n_rows, dim, dim_v), b = queries_new(t, q, n_rows, dim, dim_v);
    const bool can = k_type == v_type && (n_rows == 1 || n_rows == 2 || n_rows == 4);
    CHECK(t->run_attend(&a, &k.run, &v.run, n, step, numbers_below(2) ? &k.run : NULL) == can,
          "%d rows", n_rows);
    if (can) {
        attend_by_steps(t, &b, &k, &v, n, step);
    }
    for (int r = 0; r < n_rows; r++) {
        CHECK(real_same(t, a.m, b.m, r) && real_same(t, a.l, b.l, r), "row %d of %d: m %g l %g", r,
              n_rows, real_get(t, a.m, r), real_get(t, a.l, r));
    }
    for (int64_t c = 0; c < n_rows * (int64_t)dim_v; c++) {
        CHECK(real_same(t, a.o, b.o, c), "%d rows, %d keys, dims %d, %d: %g, not %g", n_rows, n,
              dim, dim_v, real_get(t, a.o, c), real_get(t, b.o, c));
    }
    queries_free(&a);
    queries_free(&b);
    sa_free(q);
    run_free(&k);
    run_free(&v);
}

static void
check_attend(const sa_tile *t)
{
    sa_dtype types[3];
    const int n_types = types_of(t, types);
    check_case("%s: softmax over runs", table_name(t));
    for (int trial = 0; trial < 120; trial++) {
        const sa_dtype k = types[numbers_below(n_types)];
        const sa_dtype v = numbers_below(6) ? k : types[numbers_below(n_types)];
        attend_once(t, k, v, (const int[]){1, 2, 4, 4, 3, 5}[trial % 6]);
    }
}

void
sa_selftest_tile_run(void)
{
    each_table(check_runs);
    each_table(check_attend);
}
