/* topk.c - each query row keeps its k best-scoring visible keys. [Gupta et al. 2021,
 * arXiv:2106.06899] Ties go to the lower key, so the plan does not depend on threads. */
#include "variants/variant.h"

#include "base/threads.h"
#include "engine/score.h"
#include "engine/select.h"

typedef struct {
    int64_t k;
    int32_t placement; /* which normaliser: the kept set is the same before and after the softmax */
} sa_topk_opts;

static const char *const placements[] = {"pre", "post", NULL};

static const sa_field fields[] = {
    SA_FIELD(sa_topk_opts, k, SA_FIELD_I64, 1, SA_MAX_KEYS),
    SA_FIELD_WORDS(sa_topk_opts, placement, placements),
    SA_FIELD_END,
};

enum { MAX_ROWS = 64, SCORE_BYTES = 4 << 20 };

/* Rows whose scores are held at once: about 4 MiB, however many keys there are. */
static int64_t
rows_at_once(const sa_problem *p, size_t real_bytes)
{
    const int64_t rows = SCORE_BYTES / ((int64_t)real_bytes * SA_MAX(p->n_k, 1));
    return SA_MAX(1, SA_MIN(rows, MAX_ROWS));
}

static sa_status
scratch(sa_ctx *ctx, const sa_problem *p, const void *opts, size_t *bytes)
{
    const sa_topk_opts *const o = opts;
    const size_t real = sa_real_size(p->q.dtype);
    const int64_t rows = rows_at_once(p, real), kept = SA_MIN(o->k, p->n_k);
    if (p->q.data == NULL || p->k.data == NULL) {
        return sa_fail(ctx, SA_EINVAL, "topk needs q and k to score keys; give both");
    }
    *bytes = (size_t)(rows * p->n_k) * real + sa_select_scratch(p->n_k, kept) +
             (size_t)kept * sizeof(int32_t) + sa_score_rows_scratch(p, rows) + 4 * SA_ALIGN;
    return SA_OK;
}

static sa_status
emit(const sa_plan_task *t, sa_spans *spans)
{
    const sa_topk_opts *const o = t->opts;
    const sa_problem *const p = t->problem;
    const bool f64 = sa_real_is_f64(p->q.dtype);
    const size_t real = sa_real_size(p->q.dtype);
    const int64_t step = rows_at_once(p, real), kept = SA_MIN(o->k, p->n_k);
    sa_arena *const arena = sa_scratch(t->ctx, t->worker);
    const int64_t scored = step * p->n_k; /* of MAX_ROWS rows at most */
    char *const scores = sa_arena_take_array(arena, (size_t)scored, real);
    void *const among = sa_arena_take(arena, sa_select_scratch(p->n_k, kept));
    int32_t *const best = sa_arena_take_array(arena, (size_t)kept, sizeof *best);
    sa_status status = SA_OK;
    if (scores == NULL || among == NULL || best == NULL) {
        return sa_fail(t->ctx, SA_EINTERNAL, "topk: the scratch reserved is too small");
    }
    for (int64_t i = t->begin; i < t->end && status == SA_OK; i += step) {
        const int64_t end = SA_MIN(i + step, t->end);
        int64_t lo = p->n_k, hi = 0; /* keys that some row of the chunk sees */
        for (int64_t r = i; r < end; r++) {
            if (t->see_lo[r] < t->see_hi[r]) {
                lo = SA_MIN(lo, t->see_lo[r]);
                hi = SA_MAX(hi, t->see_hi[r]);
            }
        }
        if (sa_stop_asked(t->ctx, t->worker)) {
            return SA_ESTOP;
        }
        if (lo < hi) {
            status = sa_score_rows(t->ctx, t->worker, p, t->batch, t->head, i, end, lo, hi, scores,
                                   hi - lo);
        }
        for (int64_t r = i; r < end && status == SA_OK; r++) {
            const int64_t first = t->see_lo[r], n = t->see_hi[r] - first;
            const void *const s =
                scores + (size_t)(n > 0 ? (r - i) * (hi - lo) + first - lo : 0) * real;
            const int64_t found = f64 ? sa_select_largest_f64(s, n, o->k, best, among)
                                      : sa_select_largest_f32(s, n, o->k, best, among);
            status = sa_spans_row(spans, first, best, found);
        }
    }
    return status;
}

const sa_planner sa_planner_topk = {
    .name = "topk",
    .fields = fields,
    .opts_size = sizeof(sa_topk_opts),
    .reads = SA_READS_Q | SA_READS_K,
    .rows_per_block = 1,
    .span_len = 1,
    .applies_mask = true,
    .scratch = scratch,
    .emit = emit,
};
