/* ops_norm.c - RMSNorm [Zhang, Sennrich 2019, arXiv:1910.07467] and LayerNorm [Ba, Kiros, Hinton
 * 2016, arXiv:1607.06450], a row at a time. */
#include "grad/chunks.h"
#include "grad/ops.h"

typedef struct {
    void *y;
    const void *x, *weight, *bias;
    int64_t rows, dim, step;
    double eps;
    bool centred;
    size_t size;
    const sa_rows *table;
} norm_job;

static sa_status
norm_rows(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const norm_job *const j = arg;
    const int64_t end = SA_MIN((task + 1) * j->step, j->rows);
    (void)ctx, (void)worker;
    for (int64_t r = task * j->step; r < end; r++) {
        j->table->norm(sa_at(j->y, r * j->dim, j->size), sa_at(j->x, r * j->dim, j->size),
                       j->weight, j->bias, j->dim, j->eps, j->centred);
    }
    return SA_OK;
}

static sa_status
run(sa_ctx *ctx, sa_dtype dtype, norm_job job)
{
    job.step = sa_chunk_rows(job.dim);
    job.size = sa_dtype_size(dtype);
    job.table = sa_rows_for(dtype == SA_F64);
    return sa_chunk_run(ctx, job.dim > 0 ? job.rows : 0, job.step, norm_rows, &job);
}

sa_status
sa_op_rms_norm(sa_ctx *ctx, sa_dtype dtype, void *y, const void *x, const void *weight,
               int64_t rows, int64_t dim, double eps)
{
    return run(ctx, dtype,
               (norm_job){.y = y,
                          .x = x,
                          .weight = weight,
                          .rows = rows,
                          .dim = dim,
                          .eps = eps,
                          .centred = false});
}

sa_status
sa_op_layer_norm(sa_ctx *ctx, sa_dtype dtype, void *y, const void *x, const void *weight,
                 const void *bias, int64_t rows, int64_t dim, double eps)
{
    return run(ctx, dtype,
               (norm_job){.y = y,
                          .x = x,
                          .weight = weight,
                          .bias = bias,
                          .rows = rows,
                          .dim = dim,
                          .eps = eps,
                          .centred = true});
}
