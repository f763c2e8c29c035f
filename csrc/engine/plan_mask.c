/* plan_mask.c - boolean masks as structure: full, empty and mixed blocks; a plan of a mask alone.
 */
#include "engine/plan_parts.h"

/* Notes what row bits show in [from, to); true once both kinds have been met. */
static bool
look(sa_bits bits, int64_t from, int64_t to, bool *shown, bool *hidden)
{
    *shown = *shown || sa_bits_next(bits, true, from, to) < to;
    *hidden = *hidden || sa_bits_next(bits, false, from, to) < to;
    return *shown && *hidden;
}

static sa_block_state
state_of(bool shown, bool hidden)
{
    return !shown ? SA_BLOCK_EMPTY : hidden ? SA_BLOCK_MIXED : SA_BLOCK_FULL;
}

/* Padding is the same for all rows, so one look at the widest interval does. */
sa_block_state
sa_mask_block(const sa_plan_task *task, const sa_row_block *rows, bool band, int64_t start,
              int64_t end)
{
    bool shown = false, hidden = false, decided = false;
    int64_t first = end, last = start;
    for (int64_t i = rows->begin; i < rows->end; i++) {
        int64_t lo = SA_MAX(start, task->see_lo[i]), hi = SA_MIN(end, task->see_hi[i]);
        if (band) {
            lo = SA_MAX(lo, task->band_lo[i]);
            hi = SA_MIN(hi, task->band_hi[i]);
        }
        if (lo < hi) {
            first = SA_MIN(first, lo);
            last = SA_MAX(last, hi);
            decided = decided || look(sa_row_bits_of(task->problem, task->sight->mask, false,
                                                     task->batch, task->head, i)
                                          .mask,
                                      lo, hi, &shown, &hidden);
        }
    }
    const sa_block_state mask = state_of(shown, hidden);
    if (!task->sight->key_mask || first >= last || mask == SA_BLOCK_EMPTY) {
        return mask;
    }
    shown = hidden = false;
    look(sa_row_bits_of(task->problem, false, true, task->batch, task->head, 0).keys, first, last,
         &shown, &hidden);
    const sa_block_state keys = state_of(shown, hidden);
    return keys == SA_BLOCK_FULL ? mask : keys;
}

sa_status
sa_plan_from_mask(sa_ctx *ctx, const sa_problem *p, sa_plan **plan)
{
    static const sa_planner everything = {
        .name = "mask", .rows_per_block = 64, .emit = sa_spans_everything};
    sa_problem sizes = {
        .mask = p->mask,
        .batch = p->mask.size[0],
        .heads = p->mask.size[1],
        .kv_heads = p->mask.size[1],
        .n_q = p->mask.size[2],
        .n_k = p->mask.size[3],
    };
    *plan = NULL;
    if (p->mask.data == NULL || p->mask.dtype != SA_BOOL) {
        return sa_fail(ctx, SA_ETYPE, "mask must be a bool array (True = may attend)");
    }
    const sa_status status = sa_problem_sizes_check(ctx, &sizes);
    return status ? status : sa_plan_build(ctx, &sizes, &everything, NULL, plan);
}
