/* prefix.c - a prefix that all rows see, causal after it. [Raffel et al. 2020, arXiv:1910.10683,
 * section 3.2.1; Dong et al. 2019, arXiv:1905.03197]
 *
 * Row i stands at key p(i) = i + n_k - n_q. Of the keys that masks allow it sees those with
 *
 *   j < n,   or j <= p(i)
 *
 * so that its band is one interval.
 */
#include "variants/variant.h"

typedef struct {
    int64_t n; /* keys of the prefix */
} sa_prefix_opts;

static const sa_field fields[] = {
    SA_FIELD(sa_prefix_opts, n, SA_FIELD_I64, 0, SA_MAX_KEYS),
    SA_FIELD_END,
};

static void
band(const sa_problem *p, const void *opts, int64_t i, int32_t *lo, int32_t *hi)
{
    const sa_prefix_opts *const o = opts;
    *lo = 0;
    *hi = (int32_t)SA_MIN(SA_MAX(o->n, i + p->n_k - p->n_q + 1), p->n_k);
}

static sa_status
emit(const sa_plan_task *t, sa_spans *spans)
{
    sa_status status = SA_OK;
    for (int64_t i = t->begin; i < t->end && status == SA_OK;) {
        sa_row_block rows;
        status = sa_spans_block(spans, &rows);
        status = status ? status : sa_spans_banded(spans, 0, t->problem->n_k);
        i = rows.end;
    }
    return status;
}

const sa_planner sa_planner_prefix = {
    .name = "prefix",
    .fields = fields,
    .opts_size = sizeof(sa_prefix_opts),
    .rows_per_block = 64,
    .grows = true,
    .band = band,
    .emit = emit,
};
