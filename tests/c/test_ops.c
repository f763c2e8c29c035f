/* test_ops.c - operators of models against loops in double, for both real types and every
 * instruction set. */
#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/half.h"
#include "base/threads.h"
#include "check.h"
#include "grad/ops.h"
#include "reals.h"

static const int64_t widths[] = {1, 2, 3, 7, 8, 16, 17, 33, 64, 100, 257};
enum { N_WIDTHS = sizeof widths / sizeof *widths };

static sa_ctx *ctx;

static sa_dtype
dtype_of(const sa_tile *t)
{
    return t->real_bytes == 8 ? SA_F64 : SA_F32;
}

static void
expect(const sa_tile *t, const void *got, int64_t i, double want, double scale, const char *what)
{
    const double x = real_get(t, got, i);
    CHECK(check_near(x, want, 8 * real_eps(t) * scale), "%s: entry %d is %.9g, not %.9g", what,
          (int)i, x, want);
}

static void
check_norms(const sa_tile *t)
{
    for (int w = 0; w < N_WIDTHS; w++) {
        const int64_t dim = widths[w], rows = 1 + numbers_below(5), n = rows * dim;
        void *x = real_random(t, n, 3), *weight = real_random(t, dim, 1),
             *bias = real_random(t, dim, 1);
        void *y = real_array(t, n), *z = real_array(t, n), *plain = real_array(t, n);
        const double eps = 1e-5;
        CHECK(sa_op_rms_norm(ctx, dtype_of(t), y, x, weight, rows, dim, eps) == SA_OK, "%s",
              ctx->message);
        CHECK(sa_op_layer_norm(ctx, dtype_of(t), z, x, weight, bias, rows, dim, eps) == SA_OK, "%s",
              ctx->message);
        CHECK(sa_op_layer_norm(ctx, dtype_of(t), plain, x, NULL, NULL, rows, dim, eps) == SA_OK,
              "%s", ctx->message);
        for (int64_t r = 0; r < rows; r++) {
            double mean = 0, square = 0, var = 0;
            for (int64_t c = 0; c < dim; c++) {
                const double v = real_get(t, x, r * dim + c);
                mean += v / (double)dim;
                square += v * v / (double)dim;
            }
            for (int64_t c = 0; c < dim; c++) {
                const double v = real_get(t, x, r * dim + c) - mean;
                var += v * v / (double)dim;
            }
            for (int64_t c = 0; c < dim; c++) {
                const double v = real_get(t, x, r * dim + c), scale = real_get(t, weight, c);
                const double norm = (v - mean) / sqrt(var + eps);
                /* a row of one entry, or of equal ones, has var near 0: errors grow by 1 /
                 * sqrt(eps) */
                const double size = 1 + fabs(v) / sqrt(var + eps);
                expect(t, y, r * dim + c, v / sqrt(square + eps) * scale, 3, "rms_norm");
                expect(t, z, r * dim + c, norm * scale + real_get(t, bias, c), size, "layer_norm");
                expect(t, plain, r * dim + c, norm, size, "layer_norm without weight");
            }
        }
        CHECK(sa_op_rms_norm(ctx, dtype_of(t), x, x, weight, rows, dim, eps) == SA_OK, "%s",
              ctx->message);
        CHECK(memcmp(x, y, (size_t)(n * t->real_bytes)) == 0, "rms_norm in place differs");
        void *all[] = {x, weight, bias, y, z, plain};
        for (int i = 0; i < 6; i++) {
            sa_free(all[i]);
        }
    }
}

static double
activation(int kind, double x)
{
    switch (kind) {
    case SA_ACT_GELU_TANH:
        return 0.5 * x * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    case SA_ACT_GELU:
        return 0.5 * x * (1 + erf(x / sqrt(2)));
    case SA_ACT_SILU:
        return x / (1 + exp(-x));
    default:
        return x > 0 ? x : 0;
    }
}

static void
check_pointwise(const sa_tile *t)
{
    for (int w = 0; w < N_WIDTHS; w++) {
        const int64_t n = widths[w];
        void *x = real_random(t, n, 6), *gate = real_random(t, n, 2), *y = real_array(t, n),
             *z = real_array(t, n);
        for (int kind = 0; kind < 4; kind++) {
            CHECK(sa_op_activate(ctx, dtype_of(t), (sa_activation)kind, y, x, NULL, n) == SA_OK,
                  "%s", ctx->message);
            CHECK(sa_op_activate(ctx, dtype_of(t), (sa_activation)kind, z, x, gate, n) == SA_OK,
                  "%s", ctx->message);
            for (int64_t i = 0; i < n; i++) {
                const double v = real_get(t, x, i), want = activation(kind, v),
                             g = real_get(t, gate, i);
                expect(t, y, i, want, 1 + fabs(v), "activate");
                expect(t, z, i, want * g, (1 + fabs(v)) * (1 + fabs(g)), "activate with a gate");
            }
        }
        CHECK(sa_op_add(ctx, dtype_of(t), y, x, gate, n) == SA_OK, "%s", ctx->message);
        for (int64_t i = 0; i < n; i++) {
            const double sum = real_get(t, x, i) + real_get(t, gate, i);
            expect(t, y, i, sum, fabs(sum), "add");
        }
        void *all[] = {x, gate, y, z};
        for (int i = 0; i < 4; i++) {
            sa_free(all[i]);
        }
    }
}

static void
check_rope(const sa_tile *t)
{
    for (int round = 0; round < 10; round++) {
        const int64_t half = 1 + numbers_below(20), dim = 2 * half + numbers_below(4),
                      heads = 1 + numbers_below(3);
        const int64_t rows = 1 + numbers_below(6), positions = 9, n = rows * heads * dim;
        void *x = real_random(t, n, 1), *old = real_copy(t, x, n);
        void *cosine = real_random(t, positions * half, 1),
             *sine = real_random(t, positions * half, 1);
        int32_t *pos = sa_malloc_array((size_t)rows, sizeof *pos);
        for (int64_t r = 0; r < rows; r++) {
            pos[r] = (int32_t)numbers_below(positions);
        }
        CHECK(sa_op_rope(ctx, dtype_of(t), x, cosine, sine, pos, positions, rows, heads, dim,
                         2 * half) == SA_OK,
              "%s", ctx->message);
        for (int64_t at = 0; at < n; at++) {
            const int64_t c = at % dim, row = at / dim / heads, turn = pos[row] * half + c % half;
            double want = real_get(t, old, at);
            if (c < 2 * half) {
                const double other = real_get(t, old, c < half ? at + half : at - half);
                want = want * real_get(t, cosine, turn) +
                       (c < half ? -other : other) * real_get(t, sine, turn);
            }
            expect(t, x, at, want, 1, "rope");
        }
        pos[rows - 1] = (int32_t)positions;
        CHECK(sa_op_rope(ctx, dtype_of(t), x, cosine, sine, pos, positions, rows, heads, dim,
                         2 * half) == SA_EINVAL,
              "a position outside the tables");
        void *all[] = {x, old, cosine, sine, pos};
        for (int i = 0; i < 5; i++) {
            sa_free(all[i]);
        }
    }
}

/* log sum exp of row r, and where its largest entry is. */
static double
log_sum(const sa_tile *t, const void *x, int64_t r, int64_t vocab, int64_t *best)
{
    double top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < vocab; i++) {
        const double v = real_get(t, x, r * vocab + i);
        *best = v > top ? i : *best;
        top = v > top ? v : top;
    }
    for (int64_t i = 0; i < vocab; i++) {
        sum += exp(real_get(t, x, r * vocab + i) - top);
    }
    return top + log(sum);
}

static void
check_losses(const sa_tile *t)
{
    for (int w = 0; w < N_WIDTHS; w++) {
        const int64_t vocab = widths[w], rows = 1 + numbers_below(5), n = rows * vocab;
        void *x = real_random(t, n, 20), *y = real_random(t, n, 20);
        double *nll = sa_malloc_array((size_t)rows, sizeof *nll),
               *kl = sa_malloc_array((size_t)rows, sizeof *kl);
        int32_t *arg = sa_malloc_array((size_t)rows, 4), *target = sa_malloc_array((size_t)rows, 4);
        for (int64_t r = 0; r < rows; r++) {
            target[r] = (int32_t)numbers_below(vocab);
        }
        CHECK(sa_op_nll(ctx, dtype_of(t), nll, arg, x, target, rows, vocab) == SA_OK, "%s",
              ctx->message);
        CHECK(sa_op_kl(ctx, dtype_of(t), kl, x, y, rows, vocab) == SA_OK, "%s", ctx->message);
        const double bound = 100 * real_eps(t); /* exp in the real type, of scores up to 40 apart */
        for (int64_t r = 0; r < rows; r++) {
            int64_t best = 0, other = 0;
            const double a = log_sum(t, x, r, vocab, &best), b = log_sum(t, y, r, vocab, &other);
            double divergence = 0;
            for (int64_t i = 0; i < vocab; i++) {
                const double p = real_get(t, x, r * vocab + i) - a,
                             q = real_get(t, y, r * vocab + i) - b;
                divergence += exp(p) * (p - q);
            }
            const double want = a - real_get(t, x, r * vocab + target[r]);
            CHECK(check_near(nll[r], want, bound), "nll %g, not %g", nll[r], want);
            CHECK(arg[r] == best, "argmax %d, not %d", arg[r], (int)best);
            CHECK(check_near(kl[r], divergence, bound * 40), "kl %g, not %g", kl[r], divergence);
        }
        target[0] = (int32_t)vocab;
        CHECK(sa_op_nll(ctx, dtype_of(t), nll, arg, x, target, rows, vocab) == SA_EINVAL,
              "a target past the end");
        target[0] = -1;
        CHECK(sa_op_nll(ctx, dtype_of(t), nll, arg, x, target, rows, vocab) == SA_EINVAL,
              "a negative target");
        void *all[] = {x, y, nll, kl, arg, target};
        for (int i = 0; i < 6; i++) {
            sa_free(all[i]);
        }
    }
}

static void
check_widen(void)
{
    for (int w = 0; w < N_WIDTHS; w++) {
        uint16_t *from = sa_malloc_array((size_t)widths[w], 2);
        float *to = sa_malloc_array((size_t)widths[w], 4);
        for (int64_t i = 0; i < widths[w]; i++) {
            from[i] = (uint16_t)(numbers_next() & 0x7BFF); /* finite as float16 */
        }
        for (int bf16 = 0; bf16 < 2; bf16++) {
            CHECK(sa_op_widen(ctx, to, from, bf16 ? SA_BF16 : SA_F16, widths[w]) == SA_OK, "%s",
                  ctx->message);
            for (int64_t i = 0; i < widths[w]; i++) {
                const float want = bf16 ? sa_bf16_to_f32(from[i]) : sa_f16_to_f32(from[i]);
                CHECK(to[i] == want, "%04x became %g, not %g", from[i], (double)to[i],
                      (double)want);
            }
        }
        sa_free(from);
        sa_free(to);
    }
}

static void
check_narrow(void)
{
    for (int w = 0; w < N_WIDTHS; w++) {
        float *from = sa_malloc_array((size_t)widths[w], 4);
        uint16_t *to = sa_malloc_array((size_t)widths[w], 2);
        for (int64_t i = 0; i < widths[w]; i++) {
            from[i] = sa_float_of((uint32_t)numbers_next());
        }
        for (int bf16 = 0; bf16 < 2; bf16++) {
            CHECK(sa_op_narrow(ctx, to, bf16 ? SA_BF16 : SA_F16, from, widths[w]) == SA_OK, "%s",
                  ctx->message);
            for (int64_t i = 0; i < widths[w]; i++) {
                const uint16_t want = bf16 ? sa_f32_to_bf16(from[i]) : sa_f32_to_f16(from[i]);
                CHECK(to[i] == want, "%a became %04x, not %04x", (double)from[i], to[i], want);
            }
        }
        sa_free(from);
        sa_free(to);
    }
}

/* A token of every row, none that is ruled out, the same one by one. */
static void
check_sample(void)
{
    enum { ROWS = 5 };
    static const double shares[] = {1, 0.5, 1e-6};
    for (int w = 0; w < N_WIDTHS; w++) {
        const int64_t vocab = widths[w];
        float *logits = sa_malloc_array((size_t)(ROWS * vocab), 4);
        for (int64_t i = 0; i < ROWS * vocab; i++) {
            logits[i] = i % 3 == 1 && i % vocab != 0 ? -INFINITY : (float)numbers_real();
        }
        for (int how = 0; how < 9; how++) {
            const int64_t counts[] = {vocab, 1, SA_MIN(3, vocab)};
            const sa_sampling sampling = {how == 0 ? 0 : 0.7, counts[how % 3], shares[how / 3]};
            double u[ROWS];
            int32_t token[ROWS], alone;
            for (int r = 0; r < ROWS; r++) {
                u[r] = (double)numbers_below(1000) / 1000;
            }
            CHECK(sa_op_sample(ctx, token, logits, u, ROWS, vocab, sampling) == SA_OK, "%s",
                  ctx->message);
            for (int r = 0; r < ROWS; r++) {
                const float *const row = logits + r * vocab;
                CHECK(token[r] >= 0 && token[r] < vocab && row[token[r]] > -INFINITY,
                      "row %d of %d: token %d", r, (int)vocab, (int)token[r]);
                CHECK(sa_op_sample(ctx, &alone, row, u + r, 1, vocab, sampling) == SA_OK &&
                          alone == token[r],
                      "row %d alone: %d, not %d", r, (int)alone, (int)token[r]);
            }
        }
        sa_free(logits);
    }
}

static void
check_table(const sa_tile *t)
{
    static const struct {
        const char *name;
        void (*run)(const sa_tile *t);
    } parts[] = {{"norms", check_norms},
                 {"activations and sums", check_pointwise},
                 {"rope", check_rope},
                 {"losses", check_losses}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        check_case("%s: %s", table_name(t), parts[i].name);
        parts[i].run(t);
    }
}

void
sa_selftest_ops(void)
{
    sa_num_threads_set(2);
    ctx = sa_ctx_acquire();
    each_table(check_table);
    check_case("tokens drawn");
    check_sample();
    check_case("weights widened");
    check_widen();
    check_case("gradients and keys narrowed");
    check_narrow();
    sa_ctx_release(ctx);
}
