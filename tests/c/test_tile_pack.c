/* test_tile_pack.c - rows in and out of storage types, whole and transposed, for every table. */
#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/half.h"
#include "check.h"
#include "reals.h"

static const int dims[] = {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 40, 64, 65};
enum { N_DIMS = sizeof dims / sizeof *dims };

static const struct {
    sa_dtype dtype;
    const char *name;
    double eps, least; /* of the storage type; half a step of its subnormal numbers */
} types[] = {{SA_F32, "float32", 0x1p-23, 0x1p-150},
             {SA_F64, "float64", 0x1p-52, 0},
             {SA_F16, "float16", 0x1p-10, 0x1p-25},
             {SA_BF16, "bfloat16", 0x1p-7, 0x1p-134}};

static double
stored_get(sa_dtype dtype, const void *p, int64_t i)
{
    switch (dtype) {
    case SA_F32:
        return (double)((const float *)p)[i];
    case SA_F64:
        return ((const double *)p)[i];
    case SA_F16:
        return (double)sa_f16_to_f32(((const uint16_t *)p)[i]);
    default:
        return (double)sa_bf16_to_f32(((const uint16_t *)p)[i]);
    }
}

static void
stored_put(sa_dtype dtype, void *p, int64_t i, double x)
{
    switch (dtype) {
    case SA_F32:
        ((float *)p)[i] = (float)x;
        break;
    case SA_F64:
        ((double *)p)[i] = x;
        break;
    case SA_F16:
        ((uint16_t *)p)[i] = sa_f32_to_f16((float)x);
        break;
    default:
        ((uint16_t *)p)[i] = sa_f32_to_bf16((float)x);
    }
}

static void *
stored_random(sa_dtype dtype, int64_t n)
{
    void *p = sa_malloc_array((size_t)n, sa_dtype_size(dtype));
    for (int64_t i = 0; i < n; i++) {
        stored_put(dtype, p, i, numbers_real());
    }
    return p;
}

static void
check_load_rows(const sa_tile *t, int type)
{
    const sa_dtype dtype = types[type].dtype;
    for (int d = 0; d < N_DIMS; d++) {
        const int dim = dims[d], n_rows = (int)numbers_below(9), ld = dim + (int)numbers_below(3);
        const int64_t step = (int64_t[]){dim, 2 * dim + 1, 0, -dim - 2}[numbers_below(4)];
        const int64_t reach = step < 0 ? -step * 8 : step * 8;
        char *src = stored_random(dtype, reach + dim);
        const void *first = step < 0 ? src + reach * (int64_t)sa_dtype_size(dtype) : src;
        void *rows = real_array(t, 9 * (int64_t)ld);
        const double scale = numbers_below(2) ? 1 : 0.3;
        t->load_rows(rows, ld, first, dtype, step, n_rows, dim, scale);
        for (int r = 0; r < 9; r++) {
            for (int c = 0; c < ld; c++) {
                const double got = real_get(t, rows, r * (int64_t)ld + c);
                if (r >= n_rows || c >= dim) {
                    CHECK(real_untouched(t, rows, r * (int64_t)ld + c), "(%d, %d) was written", r,
                          c);
                    continue;
                }
                const double want =
                    real_round(t, scale) * real_round(t, stored_get(dtype, first, r * step + c));
                CHECK(check_near(got, want, real_eps(t) * fabs(want)), "(%d, %d): %g, not %g", r, c,
                      got, want);
            }
        }
        sa_free(src);
        sa_free(rows);
    }
}

/* Transposed in, then out again into rows that are exactly dim long. */
static void
check_cols(const sa_tile *t, int type)
{
    const sa_dtype dtype = types[type].dtype;
    for (int w = t->lanes; w <= t->strip_max; w += t->lanes) {
        for (int d = 0; d < N_DIMS; d++) {
            const int dim = dims[d], n_rows = 1 + (int)numbers_below(w);
            const double scale = numbers_below(2) ? 1 : -1.7;
            const void *src[SA_STRIP_MAX];
            void *dst[SA_STRIP_MAX], *cols = real_array(t, (int64_t)dim * w);
            void *factor = real_random(t, w, 2);
            for (int r = 0; r < n_rows; r++) {
                src[r] = stored_random(dtype, dim);
                dst[r] = sa_malloc_array((size_t)dim, sa_dtype_size(dtype));
            }
            t->load_cols(cols, w, src, dtype, n_rows, dim, scale);
            t->store_cols(dst, dtype, cols, w, n_rows, dim, factor);
            for (int r = 0; r < w; r++) {
                for (int c = 0; c < dim; c++) {
                    const double got = real_get(t, cols, (int64_t)c * w + r);
                    if (r >= n_rows) {
                        CHECK(got == 0, "padding (%d, %d) is %g", r, c, got);
                        continue;
                    }
                    const double x = real_round(t, stored_get(dtype, src[r], c));
                    CHECK(check_near(got, real_round(t, scale) * x, real_eps(t) * fabs(scale * x)),
                          "(%d, %d): %g from %g", r, c, got, x);
                    const double want = got * real_get(t, factor, r),
                                 out = stored_get(dtype, dst[r], c);
                    const double eps = fmax(types[type].eps, real_eps(t));
                    CHECK(check_near(out, want, eps * fabs(want) + types[type].least),
                          "out (%d, %d): %g, not %g", r, c, out, want);
                }
            }
            for (int r = 0; r < n_rows; r++) {
                sa_free((void *)src[r]);
                sa_free(dst[r]);
            }
            sa_free(cols);
            sa_free(factor);
        }
    }
}

static void
check_store_row(const sa_tile *t, int type)
{
    for (int d = 0; d < N_DIMS; d++) {
        void *src = real_random(t, dims[d], 1), *factor = real_random(t, 1, 3);
        void *dst = sa_malloc_array((size_t)dims[d], sa_dtype_size(types[type].dtype));
        t->store_row(dst, types[type].dtype, src, dims[d], factor);
        for (int c = 0; c < dims[d]; c++) {
            const double want = real_get(t, src, c) * real_get(t, factor, 0);
            const double got = stored_get(types[type].dtype, dst, c),
                         eps = fmax(types[type].eps, real_eps(t));
            CHECK(check_near(got, want, eps * fabs(want) + types[type].least), "%d: %g, not %g", c,
                  got, want);
        }
        sa_free(src);
        sa_free(dst);
        sa_free(factor);
    }
}

/* In vectors as one by one: every half in, and floats of any bits out, NaN and their payloads too.
 * A zero is written as 0 of sign +. */
static void
check_halves(const sa_tile *t, sa_dtype dtype)
{
    enum { N = 1 << 16 };
    uint16_t *const half = sa_malloc_array(N, sizeof *half);
    float *const wide = sa_malloc_array(N, sizeof *wide), one = 1;
    for (int i = 0; i < N; i++) {
        half[i] = (uint16_t)i;
    }
    t->load_rows(wide, N, half, dtype, 0, 1, N, 1.0);
    for (int i = 0; i < N; i++) {
        const float want =
            dtype == SA_F16 ? sa_f16_to_f32((uint16_t)i) : sa_bf16_to_f32((uint16_t)i);
        CHECK(sa_bits_of(wide[i]) == sa_bits_of(want), "pattern %04x gave %08x", (unsigned)i,
              sa_bits_of(wide[i]));
    }
    for (int round = 0; round < 8; round++) {
        for (int i = 0; i < N; i++) { /* the last rounds: halves, and middles between two of them */
            const uint32_t bits = (uint32_t)numbers_next();
            const uint32_t tie = dtype == SA_F16 ? bits & 0xFFFFF000 : bits & 0xFFFF8000;
            wide[i] = sa_float_of(round < 4 ? bits : tie);
        }
        t->store_row(half, dtype, wide, N, &one);
        for (int i = 0; i < N; i++) {
            const float x = wide[i] * one + 0;
            const uint16_t want = dtype == SA_F16 ? sa_f32_to_f16(x) : sa_f32_to_bf16(x);
            CHECK(half[i] == want, "%a became %04x, not %04x", (double)x, half[i], want);
        }
    }
    sa_free(half);
    sa_free(wide);
}

static void
check_fill(const sa_tile *t)
{
    for (int d = 0; d < N_DIMS; d++) {
        void *p = real_array(t, dims[d] + 1);
        t->fill(p, dims[d], -INFINITY);
        for (int i = 0; i < dims[d]; i++) {
            CHECK(real_get(t, p, i) == -INFINITY, "element %d", i);
        }
        CHECK(real_untouched(t, p, dims[d]), "one too many");
        sa_free(p);
    }
}

static void
check_table(const sa_tile *t)
{
    for (int type = 0; type < 4; type++) {
        check_case("%s: rows from %s", table_name(t), types[type].name);
        check_load_rows(t, type);
        check_case("%s: columns from and to %s", table_name(t), types[type].name);
        check_cols(t, type);
        check_case("%s: a row to %s", table_name(t), types[type].name);
        check_store_row(t, type);
    }
    for (int type = 2; type < 4 && t->real_bytes == 4; type++) {
        check_case("%s: all of %s", table_name(t), types[type].name);
        check_halves(t, types[type].dtype);
    }
    check_case("%s: fill", table_name(t));
    check_fill(t);
}

void
sa_selftest_tile_pack(void)
{
    each_table(check_table);
}
