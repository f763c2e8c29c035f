/* ops_pointwise.c - activations, sums, widening and narrowing, elementwise. */
#include "base/half.h"
#include "grad/chunks.h"
#include "grad/ops.h"
#include "tile/tile.h"

typedef struct {
    void *y;
    const void *x, *z; /* z: the gate, or the second term */
    int64_t count;
    sa_dtype dtype; /* of x; of y where x is narrowed */
    sa_activation act;
    const sa_rows *table;
    const sa_tile *tile;
} pointwise_job;

typedef struct {
    int64_t first, n;
} part;

static part
part_of(const pointwise_job *job, int64_t task)
{
    return (part){task * SA_CHUNK, SA_MIN(SA_CHUNK, job->count - task * SA_CHUNK)};
}

static sa_status
activate_part(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const pointwise_job *const j = arg;
    const part p = part_of(j, task);
    const size_t size = sa_dtype_size(j->dtype);
    (void)ctx, (void)worker;
    j->table->activate(j->act, sa_at(j->y, p.first, size), sa_at(j->x, p.first, size),
                       j->z != NULL ? sa_at(j->z, p.first, size) : NULL, p.n);
    return SA_OK;
}

sa_status
sa_op_activate(sa_ctx *ctx, sa_dtype dtype, sa_activation act, void *y, const void *x,
               const void *gate, int64_t count)
{
    pointwise_job job = {.y = y, .x = x, .z = gate, .count = count, .dtype = dtype, .act = act};
    job.table = sa_rows_for(dtype == SA_F64);
    return sa_chunk_run(ctx, count, SA_CHUNK, activate_part, &job);
}

static sa_status
add_part(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const pointwise_job *const j = arg;
    const part p = part_of(j, task);
    (void)ctx, (void)worker;
    if (j->dtype == SA_F64) {
        double *const y = (double *)j->y + p.first;
        const double *const x = (const double *)j->x + p.first;
        const double *const z = (const double *)j->z + p.first;
        for (int64_t i = 0; i < p.n; i++) {
            y[i] = x[i] + z[i];
        }
    } else {
        float *const y = (float *)j->y + p.first;
        const float *const x = (const float *)j->x + p.first;
        const float *const z = (const float *)j->z + p.first;
        for (int64_t i = 0; i < p.n; i++) {
            y[i] = x[i] + z[i];
        }
    }
    return SA_OK;
}

sa_status
sa_op_add(sa_ctx *ctx, sa_dtype dtype, void *y, const void *x, const void *z, int64_t count)
{
    pointwise_job job = {.y = y, .x = x, .z = z, .count = count, .dtype = dtype};
    return sa_chunk_run(ctx, count, SA_CHUNK, add_part, &job);
}

static sa_status
widen_part(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const pointwise_job *const j = arg;
    const part p = part_of(j, task);
    (void)ctx, (void)worker;
    j->tile->load_rows((float *)j->y + p.first, p.n, sa_at(j->x, p.first, sizeof(uint16_t)),
                       j->dtype, p.n, 1, (int)p.n, 1.0);
    return SA_OK;
}

sa_status
sa_op_widen(sa_ctx *ctx, float *to, const void *from, sa_dtype dtype, int64_t count)
{
    pointwise_job job = {.y = to, .x = from, .count = count, .dtype = dtype};
    job.tile = sa_tile_for(false);
    return sa_chunk_run(ctx, count, SA_CHUNK, widen_part, &job);
}

static sa_status
narrow_part(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const pointwise_job *const j = arg;
    const part p = part_of(j, task);
    uint16_t *const y = (uint16_t *)j->y + p.first;
    const float *const x = (const float *)j->x + p.first;
    (void)ctx, (void)worker;
    if (j->dtype == SA_F16) {
        for (int64_t i = 0; i < p.n; i++) {
            y[i] = sa_f32_to_f16(x[i]);
        }
    } else {
        for (int64_t i = 0; i < p.n; i++) {
            y[i] = sa_f32_to_bf16(x[i]);
        }
    }
    return SA_OK;
}

sa_status
sa_op_narrow(sa_ctx *ctx, void *to, sa_dtype dtype, const float *from, int64_t count)
{
    pointwise_job job = {.y = to, .x = from, .count = count, .dtype = dtype};
    return sa_chunk_run(ctx, count, SA_CHUNK, narrow_part, &job);
}
