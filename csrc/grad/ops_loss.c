/* ops_loss.c - what evaluation reads from rows of logits: loss, arg-max, divergence. Sums in
 * float64. */
#include <math.h>

#include "grad/chunks.h"
#include "grad/ops.h"

typedef struct {
    double *loss; /* nll or kl */
    int32_t *arg;
    const void *logits, *other;
    const int32_t *target;
    int64_t rows, vocab, step;
    bool f64;
    const sa_rows *table;
} loss_job;

static double
element(const loss_job *j, const void *row, int64_t v)
{
    return j->f64 ? ((const double *)row)[v] : (double)((const float *)row)[v];
}

static const void *
row_of(const loss_job *j, const void *array, int64_t r)
{
    return sa_at(array, r * j->vocab, j->f64 ? sizeof(double) : sizeof(float));
}

static sa_status
nll_rows(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const loss_job *const j = arg;
    const int64_t end = SA_MIN((task + 1) * j->step, j->rows);
    (void)worker;
    for (int64_t r = task * j->step; r < end; r++) {
        const void *const row = row_of(j, j->logits, r);
        /* read once: the array is the caller's, and another thread of theirs may write it */
        const int64_t target = __atomic_load_n(&j->target[r], __ATOMIC_RELAXED);
        int64_t at;
        if (target < 0 || target >= j->vocab) {
            return sa_fail(ctx, SA_EINVAL, "target[%lld] must be in [0, %lld), got %lld",
                           (long long)r, (long long)j->vocab, (long long)target);
        }
        const double top = j->table->peak(row, j->vocab, &at);
        const double sum = j->table->exp_sum(row, j->vocab, top);
        j->loss[r] = log(sum) - (element(j, row, target) - top);
        j->arg[r] = (int32_t)at;
    }
    return SA_OK;
}

sa_status
sa_op_nll(sa_ctx *ctx, sa_dtype dtype, double *nll, int32_t *arg, const void *logits,
          const int32_t *target, int64_t rows, int64_t vocab)
{
    loss_job job = {
        .loss = nll, .arg = arg, .logits = logits, .target = target, .rows = rows, .vocab = vocab};
    job.step = sa_chunk_rows(vocab);
    job.f64 = dtype == SA_F64;
    job.table = sa_rows_for(job.f64);
    return sa_chunk_run(ctx, rows, job.step, nll_rows, &job);
}

/* With a = x - max x, b = y - max y: sum p (log p - log q) = sum p (a - b) - log sum e^a + log sum
 * e^b. */
static sa_status
kl_rows(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const loss_job *const j = arg;
    const int64_t end = SA_MIN((task + 1) * j->step, j->rows);
    (void)ctx, (void)worker;
    for (int64_t r = task * j->step; r < end; r++) {
        const void *const x = row_of(j, j->logits, r), *const y = row_of(j, j->other, r);
        int64_t at;
        double sums[3];
        const double x_top = j->table->peak(x, j->vocab, &at);
        const double y_top = j->table->peak(y, j->vocab, &at);
        j->table->kl_sums(x, y, j->vocab, x_top, y_top, sums);
        const double kl = sums[2] / sums[0] - log(sums[0]) + log(sums[1]);
        j->loss[r] = kl < 0 ? 0 : kl; /* below 0 by rounding alone; NaN stays */
    }
    return SA_OK;
}

sa_status
sa_op_kl(sa_ctx *ctx, sa_dtype dtype, double *kl, const void *base, const void *other, int64_t rows,
         int64_t vocab)
{
    loss_job job = {.loss = kl, .logits = base, .other = other, .rows = rows, .vocab = vocab};
    job.step = sa_chunk_rows(vocab);
    job.f64 = dtype == SA_F64;
    job.table = sa_rows_for(job.f64);
    return sa_chunk_run(ctx, rows, job.step, kl_rows, &job);
}
