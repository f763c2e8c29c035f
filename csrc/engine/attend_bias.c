/* attend_bias.c - the gradient of the bias, in a pass of its own.
 *
 * One task writes an entry of bias: batches, heads and rows over which it was broadcast are summed
 * in order inside of the task.
 */
#include "base/threads.h"
#include "engine/attend_grad_call.h"

enum { WANTED_TASKS = 64, MOST_RUNS = 16, LEAST_RUN_KEYS = 128 };

/* dbias += ds[x * step] at row r of the group and keys[x], x < n. */
static void
add_row(const sa_grad_group *gg, int r, const int32_t *keys, int n, const char *ds, int64_t step)
{
    const sa_query *const q = &gg->g.s.query[r];
    const sa_view dbias = gg->call->grads->dbias;
    const int64_t bytes = (int64_t)gg->g.call->real_bytes;
    void *const row = sa_view_row(dbias, gg->g.b, q->head, q->i);
    for (int x = 0; x < n; x++) {
        const double more = sa_real_at(ds + x * step * bytes, bytes == 8);
        const int64_t at = keys[x] * dbias.stride[3];
        if (dbias.dtype == SA_F64) {
            ((double *)row)[at] += more;
        } else {
            ((float *)row)[at] += (float)more;
        }
    }
}

static void
bias_sums(sa_grad_group *gg, int r, const sa_key_tile *tile, int a, int n)
{
    const size_t bytes = gg->g.call->real_bytes;
    if (r >= 0) {
        add_row(gg, r, tile->keys + a, n, gg->s.ds, 1);
        return;
    }
    const int first = gg->strip * gg->w, end = SA_MIN(first + gg->w, gg->g.n_rows);
    const char *const ds = gg->s.ds + (size_t)(gg->strip * gg->step + a * gg->w) * bytes;
    for (int row = first; row < end; row++) {
        add_row(gg, row, tile->keys + a, n, ds + (size_t)(row - first) * bytes, gg->w);
    }
}

/* How many tasks share out an axis: all of it is one task's where bias is broadcast over it. */
typedef struct {
    int64_t batches, heads, rows, keys;
} bias_cut;

static bias_cut
cut_bias(const sa_grad_call *call)
{
    const sa_problem *const p = call->call.p;
    const sa_view bias = call->grads->dbias;
    bias_cut c = {1, 1, 1, 1};
    c.batches = bias.stride[0] != 0 ? p->batch : 1;
    c.heads = bias.stride[1] != 0 ? p->heads : 1;
    if (bias.stride[2] != 0 && call->call.n_parts == 1) {
        c.rows = SA_MIN(call->call.parts[0].plan->n_blocks, WANTED_TASKS);
    } else if (bias.stride[3] != 0) {
        c.keys = SA_MAX(1, SA_MIN(p->n_k / LEAST_RUN_KEYS, MOST_RUNS));
    }
    return c;
}

static sa_status
bias_head(sa_ctx *ctx, const sa_grad_call *call, bias_cut cut, int64_t b, int64_t head,
          const int64_t run[2], int worker)
{
    const sa_problem *const p = call->call.p;
    sa_grad_group gg;
    const sa_part *part;
    const sa_status status = sa_grad_group_begin(ctx, call, b, head, worker, &gg, &part);
    if (status != SA_OK) {
        return status;
    }
    gg.ds_scale = 1;
    gg.raw = true;
    gg.bias_sums = bias_sums;
    gg.g.map = sa_plan_map(gg.g.plan, b, head);
    gg.g.key_lo = (int32_t)(run[1] * p->n_k / cut.keys);
    gg.g.key_hi = (int32_t)((run[1] + 1) * p->n_k / cut.keys);
    const int64_t n_blocks = gg.g.plan->n_blocks, end = (run[0] + 1) * n_blocks / cut.rows;
    for (int64_t block = run[0] * n_blocks / cut.rows; block < end && !sa_stopped(ctx); block++) {
        sa_group_block(&gg.g, block, true, head, 1);
    }
    return SA_OK;
}

static sa_status
bias_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const sa_grad_call *const call = arg;
    const sa_problem *const p = call->call.p;
    const bias_cut cut = cut_bias(call);
    const int64_t run[] = {task % cut.rows, task / cut.rows % cut.keys};
    task /= cut.rows * cut.keys;
    const int64_t head = task % cut.heads, b = task / cut.heads;
    sa_status status = SA_OK;
    for (int64_t c = b; c < (cut.batches > 1 ? b + 1 : p->batch); c++) {
        for (int64_t h = head; h < (cut.heads > 1 ? head + 1 : p->heads); h++) {
            if (status == SA_OK && !sa_stopped(ctx)) {
                status = bias_head(ctx, call, cut, c, h, run, worker);
            }
        }
    }
    return status;
}

sa_status
sa_grad_bias(sa_ctx *ctx, const sa_grad_call *given)
{
    sa_attend_grads grads = *given->grads;
    sa_grad_call call = *given;
    grads.dq.data = grads.dk.data = grads.dv.data = NULL;
    call.grads = &grads;
    call.round = 0;
    const bias_cut cut = cut_bias(&call);
    return sa_parallel(ctx, cut.batches * cut.heads * cut.rows * cut.keys, bias_task, &call);
}
