/* test_gemm.c - large products on the tile path against double loops. */
#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/half.h"
#include "base/threads.h"
#include "check.h"
#include "engine/gemm.h"
#include "tile/tile.h"

static void *
random_matrix(sa_dtype dtype, int64_t rows, int64_t columns, int64_t ld)
{
    const int64_t reach = (rows - 1) * ld + columns;
    void *p = sa_malloc_array((size_t)reach, sa_dtype_size(dtype));
    for (int64_t i = 0; i < rows * columns; i++) {
        const int64_t at = i / columns * ld + i % columns;
        const double x = numbers_real();
        if (dtype == SA_F64) {
            ((double *)p)[at] = x;
        } else if (dtype == SA_F32) {
            ((float *)p)[at] = (float)x;
        } else {
            ((uint16_t *)p)[at] =
                dtype == SA_F16 ? sa_f32_to_f16((float)x) : sa_f32_to_bf16((float)x);
        }
    }
    return p;
}

static double
at(const void *p, sa_dtype dtype, int64_t i)
{
    switch (dtype) {
    case SA_F64:
        return ((const double *)p)[i];
    case SA_F32:
        return (double)((const float *)p)[i];
    case SA_F16:
        return (double)sa_f16_to_f32(((const uint16_t *)p)[i]);
    default:
        return (double)sa_bf16_to_f32(((const uint16_t *)p)[i]);
    }
}

static void
check_values(const sa_gemm_args *g, const void *c)
{
    const double eps = g->dtype == SA_F64 ? 0x1p-52 : 0x1p-23;
    for (int64_t i = 0; i < g->m; i++) {
        for (int64_t j = 0; j < g->n; j++) {
            double sum = g->bias != NULL ? at(g->bias, g->dtype, j) : 0, size = fabs(sum);
            for (int64_t t = 0; t < g->k; t++) {
                const int64_t b = g->b_transposed ? j * g->ldb + t : t * g->ldb + j;
                const double x = at(g->a, g->dtype, i * g->lda + t) * at(g->b, g->b_dtype, b);
                sum += x;
                size += fabs(x);
            }
            const double got = at(c, g->dtype, i * g->ldc + j);
            CHECK(check_near(got, sum, eps * size * (8 + 2 * sqrt((double)g->k))),
                  "%d x %d x %d, (%d, %d): %g, not %g", (int)g->m, (int)g->n, (int)g->k, (int)i,
                  (int)j, got, sum);
        }
    }
}

static void
check_product(const int64_t size[3], bool turned, sa_dtype dtype, sa_dtype b_dtype)
{
    const int64_t m = size[0], n = size[1], k = size[2];
    sa_gemm_args g = {.m = m, .n = n, .k = k, .dtype = dtype, .b_dtype = b_dtype};
    g.lda = k + numbers_below(3);
    g.b_transposed = turned;
    g.ldb = (g.b_transposed ? k : n) + numbers_below(3);
    g.ldc = n + numbers_below(3);
    void *a = random_matrix(dtype, m, k, g.lda), *bias = random_matrix(dtype, 1, n, n);
    void *b =
        g.b_transposed ? random_matrix(b_dtype, n, k, g.ldb) : random_matrix(b_dtype, k, n, g.ldb);
    const size_t bytes = (size_t)((m - 1) * g.ldc + n) * sa_dtype_size(dtype);
    void *c = sa_malloc(bytes), *again = sa_malloc(bytes);
    g.a = a;
    g.b = b;
    g.bias = numbers_below(2) ? bias : NULL;
    sa_ctx *ctx = sa_ctx_acquire();
    for (int threads = 1; threads <= 3; threads += 2) {
        sa_num_threads_set(threads);
        g.c = threads == 1 ? c : again;
        CHECK(sa_gemm(ctx, &g) == SA_OK, "%s", ctx->message);
    }
    sa_ctx_release(ctx);
    check_values(&g, c);
    CHECK(memcmp(c, again, bytes) == 0, "three threads differ, or wrote between rows");
    void *all[] = {a, b, bias, c, again};
    for (int i = 0; i < 5; i++) {
        sa_free(all[i]);
    }
}

static void
check_isa(const char *isa)
{
    static const int64_t sizes[][3] = {{1, 1, 1},    {1, 7, 300},    {1, 45, 31},    {2, 515, 70},
                                       {3, 200, 5},  {4, 1030, 290}, {4, 33, 257},   {17, 33, 65},
                                       {64, 64, 64}, {65, 193, 7},   {130, 50, 260}, {5, 400, 129},
                                       {600, 20, 33}};
    static const sa_dtype types[][2] = {
        {SA_F32, SA_F32}, {SA_F64, SA_F64}, {SA_F32, SA_F16}, {SA_F32, SA_BF16}};
    static const char *const names[] = {"float32", "float64", "float16 weights",
                                        "bfloat16 weights"};
    for (int type = 0; type < 4; type++) {
        check_case("products, %s, %s", names[type], isa);
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            for (int turned = 0; turned < 2; turned++) {
                check_product(sizes[i], turned, types[type][0], types[type][1]);
            }
        }
    }
}

void
sa_selftest_gemm(void)
{
    const sa_isa best = sa_isa_now();
    check_case("products run on tiles where no library is given");
    CHECK(strcmp(sa_blas_config(), "tiles") == 0, "%s", sa_blas_config());
    for (int isa = 0; isa < SA_ISA_COUNT; isa++) {
        if (sa_isa_set((sa_isa)isa)) {
            check_isa(sa_isa_name((sa_isa)isa));
        }
    }
    sa_isa_set(best);
}
