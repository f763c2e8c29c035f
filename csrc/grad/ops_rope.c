/* ops_rope.c - rotary positions [Su et al. 2021, arXiv:2104.09864] in the rotate-half layout of
 * published checkpoints: channels c and c + rotary/2 turn together by the angle pos theta_c;
 * channels from `rotary` on stay. */
#include "grad/chunks.h"
#include "grad/ops.h"

typedef struct {
    void *x;
    const void *cosine, *sine;
    const int32_t *pos;
    int64_t positions, rows, heads, dim, rotary, step;
    bool f64;
} rope_job;

/* One token: its heads share the angles. */
static void
turn_f32(float *x, const float *cosine, const float *sine, int64_t heads, int64_t dim, int64_t half)
{
    for (int64_t h = 0; h < heads; h++, x += dim) {
        for (int64_t c = 0; c < half; c++) {
            const float a = x[c], b = x[half + c];
            x[c] = a * cosine[c] - b * sine[c];
            x[half + c] = b * cosine[c] + a * sine[c];
        }
    }
}

static void
turn_f64(double *x, const double *cosine, const double *sine, int64_t heads, int64_t dim,
         int64_t half)
{
    for (int64_t h = 0; h < heads; h++, x += dim) {
        for (int64_t c = 0; c < half; c++) {
            const double a = x[c], b = x[half + c];
            x[c] = a * cosine[c] - b * sine[c];
            x[half + c] = b * cosine[c] + a * sine[c];
        }
    }
}

static sa_status
rope_rows(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const rope_job *const j = arg;
    const int64_t end = SA_MIN((task + 1) * j->step, j->rows), half = j->rotary / 2;
    (void)worker;
    for (int64_t r = task * j->step; r < end; r++) {
        /* read once: the array is the caller's, and another thread of theirs may write it */
        const int64_t pos = __atomic_load_n(&j->pos[r], __ATOMIC_RELAXED);
        if (pos < 0 || pos >= j->positions) {
            return sa_fail(ctx, SA_EINVAL,
                           "pos[%lld] must be in [0, %lld), the rows of cos, got %lld",
                           (long long)r, (long long)j->positions, (long long)pos);
        }
        const int64_t x = r * j->heads * j->dim, angle = pos * half;
        if (j->f64) {
            turn_f64((double *)j->x + x, (const double *)j->cosine + angle,
                     (const double *)j->sine + angle, j->heads, j->dim, half);
        } else {
            turn_f32((float *)j->x + x, (const float *)j->cosine + angle,
                     (const float *)j->sine + angle, j->heads, j->dim, half);
        }
    }
    return SA_OK;
}

sa_status
sa_op_rope(sa_ctx *ctx, sa_dtype dtype, void *x, const void *cosine, const void *sine,
           const int32_t *pos, int64_t positions, int64_t rows, int64_t heads, int64_t dim,
           int64_t rotary)
{
    rope_job job = {.x = x,
                    .cosine = cosine,
                    .sine = sine,
                    .pos = pos,
                    .positions = positions,
                    .rows = rows,
                    .heads = heads,
                    .dim = dim,
                    .rotary = rotary};
    job.step = sa_chunk_rows(heads * dim);
    job.f64 = dtype == SA_F64;
    return sa_chunk_run(ctx, rows, job.step, rope_rows, &job);
}
