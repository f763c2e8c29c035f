/* attend_delta.c - one number a row: what the backward subtracts from dout.v. [algorithms 1.3] */
#include "base/half.h"
#include "base/threads.h"
#include "engine/attend_grad.h"
#include "tile/tile.h"

enum { DELTA_ROWS = 64 };

typedef struct {
    sa_view delta, out, dout, dlse;
    const sa_tile *tile; /* NULL: out and dout are not both of one real type */
} delta_call;

static double
load(const void *row, sa_dtype dtype, int64_t at)
{
    switch (dtype) {
    case SA_F64:
        return ((const double *)row)[at];
    case SA_F16:
        return sa_f16_to_f32(((const uint16_t *)row)[at]);
    case SA_BF16:
        return sa_bf16_to_f32(((const uint16_t *)row)[at]);
    default:
        return ((const float *)row)[at];
    }
}

static double
row_delta(const delta_call *d, int64_t b, int64_t h, int64_t i)
{
    const void *const out = sa_view_row(d->out, b, h, i), *const dout =
                                                              sa_view_row(d->dout, b, h, i);
    double sum = 0;
    if (d->tile != NULL) {
        sum = d->tile->inner(out, dout, d->out.size[3]);
    } else {
        for (int64_t c = 0; c < d->out.size[3]; c++) {
            sum += load(out, d->out.dtype, c) * load(dout, d->dout.dtype, c);
        }
    }
    return d->dlse.data == NULL ? sum : sum - load(sa_view_row(d->dlse, b, h, i), d->dlse.dtype, 0);
}

static sa_status
delta_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const delta_call *const d = arg;
    const int64_t heads = d->delta.size[1], n_q = d->delta.size[2];
    const int64_t rows = d->delta.size[0] * heads * n_q;
    (void)ctx, (void)worker;
    for (int64_t row = task * DELTA_ROWS; row < SA_MIN((task + 1) * DELTA_ROWS, rows); row++) {
        const int64_t b = row / (n_q * heads), h = row / n_q % heads, i = row % n_q;
        void *const to = sa_view_row(d->delta, b, h, i);
        if (d->delta.dtype == SA_F64) {
            *(double *)to = row_delta(d, b, h, i);
        } else {
            *(float *)to = (float)row_delta(d, b, h, i);
        }
    }
    return SA_OK;
}

sa_status
sa_attend_delta(sa_ctx *ctx, sa_view delta, sa_view out, sa_view dout, sa_view dlse)
{
    const bool reals = out.dtype == dout.dtype && (out.dtype == SA_F32 || out.dtype == SA_F64);
    delta_call d = {delta, out, dout, dlse, reals ? sa_tile_for(out.dtype == SA_F64) : NULL};
    for (int axis = 0; axis < 4; axis++) {
        if (out.size[axis] != dout.size[axis] ||
            (axis < 3 && (delta.size[axis] != out.size[axis] ||
                          (dlse.data != NULL && dlse.size[axis] != out.size[axis])))) {
            return sa_fail(ctx, SA_EINVAL,
                           "delta: out, dout, dlse and delta disagree on axis %d; give one shape",
                           axis);
        }
    }
    const int64_t rows = out.size[0] * out.size[1] * out.size[2];
    return sa_parallel(ctx, (rows + DELTA_ROWS - 1) / DELTA_ROWS, delta_task, &d);
}
