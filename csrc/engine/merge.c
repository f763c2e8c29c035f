/* merge.c - joins normalised partial results over disjoint keys. [algorithms 0.8] */
#include <math.h>

#include "base/half.h"
#include "base/threads.h"
#include "engine/attend.h"

enum { MERGE_ROWS = 64, MERGE_COLUMNS = 64 };

typedef struct {
    sa_view out, lse;
    const sa_view *outs, *lses;
    int n;
} merge_call;

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

static void
store(void *row, sa_dtype dtype, int64_t at, double x)
{
    switch (dtype) {
    case SA_F64:
        ((double *)row)[at] = x;
        break;
    case SA_F16: /* by way of float32, in which halves are computed */
        ((uint16_t *)row)[at] = sa_f32_to_f16((float)x);
        break;
    case SA_BF16:
        ((uint16_t *)row)[at] = sa_f32_to_bf16((float)x);
        break;
    default:
        ((float *)row)[at] = (float)x;
    }
}

static double
lse_of(const merge_call *m, int a, int64_t b, int64_t h, int64_t i)
{
    return load(sa_view_row(m->lses[a], b, h, i), m->lses[a].dtype, 0);
}

/* A part that saw nothing is passed over; any other counts even where its weight underflows, so
 * that its NaN shows. */
static void
merge_row(const merge_call *m, int64_t b, int64_t h, int64_t i)
{
    const int64_t dim = m->out.size[3];
    void *const out = sa_view_row(m->out, b, h, i);
    double high = -INFINITY, sum = 0;
    for (int a = 0; a < m->n; a++) {
        const double x = lse_of(m, a, b, h, i);
        high = x > high || isnan(x) ? x : high;
    }
    for (int a = 0; a < m->n && high != -INFINITY; a++) {
        sum += exp(lse_of(m, a, b, h, i) - high);
    }
    const double total = high == -INFINITY ? -INFINITY : high + log(sum);
    for (int64_t c0 = 0; c0 < dim; c0 += MERGE_COLUMNS) {
        const int64_t n = SA_MIN(MERGE_COLUMNS, dim - c0);
        double x[MERGE_COLUMNS] = {0};
        for (int a = 0; a < m->n; a++) {
            const double lse = lse_of(m, a, b, h, i), weight = exp(lse - total);
            const void *const row = sa_view_row(m->outs[a], b, h, i);
            for (int64_t c = 0; c < n && lse != -INFINITY; c++) {
                x[c] += weight * load(row, m->outs[a].dtype, c0 + c);
            }
        }
        for (int64_t c = 0; c < n; c++) {
            store(out, m->out.dtype, c0 + c, x[c]);
        }
    }
    if (m->lse.data != NULL) {
        store(sa_view_row(m->lse, b, h, i), m->lse.dtype, 0, total);
    }
}

static sa_status
merge_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const merge_call *const m = arg;
    const int64_t heads = m->out.size[1], n_q = m->out.size[2], rows = m->out.size[0] * heads * n_q;
    (void)ctx;
    (void)worker;
    for (int64_t row = task * MERGE_ROWS; row < SA_MIN((task + 1) * MERGE_ROWS, rows); row++) {
        merge_row(m, row / (n_q * heads), row / n_q % heads, row % n_q);
    }
    return SA_OK;
}

sa_status
sa_merge(sa_ctx *ctx, sa_view out, sa_view lse, const sa_view *outs, const sa_view *lses, int n)
{
    merge_call m = {.out = out, .lse = lse, .outs = outs, .lses = lses, .n = n};
    for (int a = 0; a < n; a++) {
        for (int axis = 0; axis < 4; axis++) {
            if (outs[a].size[axis] != out.size[axis] ||
                (axis < 3 && lses[a].size[axis] != out.size[axis])) {
                return sa_fail(
                    ctx, SA_EINVAL,
                    "merge: part %d has another shape than part 0; give parts of one shape", a);
            }
        }
    }
    const int64_t rows = out.size[0] * out.size[1] * out.size[2];
    return sa_parallel(ctx, (rows + MERGE_ROWS - 1) / MERGE_ROWS, merge_task, &m);
}

typedef struct {
    sa_view dout_a, dlse_a; /* written */
    sa_view dout, dlse;     /* data NULL: zeros */
    sa_view out, lse, out_a, lse_a;
} merge_grad_call;

static double
load_or_zero(sa_view view, int64_t b, int64_t h, int64_t i, int64_t at)
{
    return view.data == NULL ? 0 : load(sa_view_row(view, b, h, i), view.dtype, at);
}

/* A part that saw nothing is passed over here too: whatever its out holds, its gradients are 0. */
static void
merge_grad_row(const merge_grad_call *m, int64_t b, int64_t h, int64_t i)
{
    const double total = load(sa_view_row(m->lse, b, h, i), m->lse.dtype, 0);
    const double part = load(sa_view_row(m->lse_a, b, h, i), m->lse_a.dtype, 0);
    const bool seen = part != -INFINITY;
    const double weight = seen ? exp(part - total) : 0;
    const void *const out = sa_view_row(m->out, b, h, i);
    const void *const out_a = sa_view_row(m->out_a, b, h, i);
    void *const dout_a = sa_view_row(m->dout_a, b, h, i);
    double dot = 0;
    for (int64_t c = 0; c < m->out.size[3]; c++) {
        const double dout = seen ? load_or_zero(m->dout, b, h, i, c) : 0;
        /* fwd: out += weight * out_a */
        store(dout_a, m->dout_a.dtype, c, weight * dout);
        /* fwd: weight = exp(part - total), total = log sum exp part */
        if (seen && m->dout.data != NULL) {
            dot += dout * (load(out_a, m->out_a.dtype, c) - load(out, m->out.dtype, c));
        }
    }
    const double dlse = seen ? load_or_zero(m->dlse, b, h, i, 0) : 0;
    store(sa_view_row(m->dlse_a, b, h, i), m->dlse_a.dtype, 0, weight * (dot + dlse));
}

static sa_status
merge_grad_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const merge_grad_call *const m = arg;
    const int64_t heads = m->out.size[1], n_q = m->out.size[2], rows = m->out.size[0] * heads * n_q;
    (void)ctx;
    (void)worker;
    for (int64_t row = task * MERGE_ROWS; row < SA_MIN((task + 1) * MERGE_ROWS, rows); row++) {
        merge_grad_row(m, row / (n_q * heads), row / n_q % heads, row % n_q);
    }
    return SA_OK;
}

sa_status
sa_merge_grad(sa_ctx *ctx, sa_view dout_a, sa_view dlse_a, sa_view dout, sa_view dlse, sa_view out,
              sa_view lse, sa_view out_a, sa_view lse_a)
{
    merge_grad_call m = {dout_a, dlse_a, dout, dlse, out, lse, out_a, lse_a};
    const sa_view *const views[] = {&m.dout_a, &m.dlse_a, &m.dout,  &m.dlse,
                                    &m.out,    &m.lse,    &m.out_a, &m.lse_a};
    for (int x = 0; x < 8; x++) {
        for (int axis = 0; axis < 4; axis++) {
            const int64_t want = axis == 3 && x % 2 == 1 ? 1 : out.size[axis];
            if (views[x]->data != NULL && views[x]->size[axis] != want) {
                return sa_fail(ctx, SA_EINVAL,
                               "merge: arrays of different shapes; give gradients and parts in the "
                               "shapes of out and lse");
            }
        }
    }
    const int64_t rows = out.size[0] * out.size[1] * out.size[2];
    return sa_parallel(ctx, (rows + MERGE_ROWS - 1) / MERGE_ROWS, merge_grad_task, &m);
}
