/* window.c - sliding window, with sinks and global columns. [Beltagy et al. 2020, arXiv:2004.05150;
 * Xiao et al. 2023, arXiv:2309.17453]
 *
 * Row i stands at key p(i) = i + n_k - n_q (bottom-right), or i when causality is top-left. Of the
 * keys that causality and masks allow it sees those with
 *
 *   p(i) - left <= j <= p(i) + right,   or j < sinks,   or j in globals
 *
 * Global columns only: a global token's own row is a row like the others.
 */
#include "variants/variant.h"

typedef struct {
    int64_t left, right; /* keys on either side of the row's own; -1: no bound */
    int64_t sinks;       /* the first keys, which all rows see                 */
    sa_ints globals;     /* further such keys; one past the last key is none   */
} sa_window_opts;

static const sa_field fields[] = {
    SA_FIELD(sa_window_opts, left, SA_FIELD_I64, -1, SA_MAX_KEYS),
    SA_FIELD(sa_window_opts, right, SA_FIELD_I64, -1, SA_MAX_KEYS),
    SA_FIELD(sa_window_opts, sinks, SA_FIELD_I64, 0, SA_MAX_KEYS),
    SA_FIELD(sa_window_opts, globals, SA_FIELD_I64S, 0, SA_MAX_KEYS - 1),
    SA_FIELD_END,
};

static void
band(const sa_problem *p, const void *opts, int64_t i, int32_t *lo, int32_t *hi)
{
    const sa_window_opts *const o = opts;
    const int64_t at = i + (p->causal == SA_CAUSAL_TOP_LEFT ? 0 : p->n_k - p->n_q);
    const int64_t first = o->left < 0 ? 0 : SA_MAX(at - o->left, 0);
    const int64_t end = o->right < 0 ? p->n_k : SA_MIN(at + o->right + 1, p->n_k);
    *lo = first < end ? (int32_t)first : 0;
    *hi = first < end ? (int32_t)end : 0;
}

/* Sinks and globals as ascending runs that do not touch: the keys that all rows see. */
typedef struct {
    int64_t count, start[SA_INTS_MAX + 1], end[SA_INTS_MAX + 1];
} key_runs;

static void
find_columns(const sa_window_opts *o, int64_t n_k, key_runs *runs)
{
    sa_ints keys = o->globals;
    for (int64_t x = 1; x < keys.count; x++) {
        const int64_t key = keys.value[x];
        int64_t y = x;
        for (; y > 0 && keys.value[y - 1] > key; y--) {
            keys.value[y] = keys.value[y - 1];
        }
        keys.value[y] = key;
    }
    *runs = (key_runs){.count = 1, .end = {SA_MIN(o->sinks, n_k)}};
    for (int64_t x = 0; x < keys.count && keys.value[x] < n_k; x++) {
        int64_t *const end = &runs->end[runs->count - 1];
        if (keys.value[x] > *end) {
            runs->start[runs->count] = keys.value[x];
            runs->end[runs->count++] = keys.value[x] + 1;
        } else if (keys.value[x] == *end) {
            ++*end;
        }
    }
}

static sa_status
emit(const sa_plan_task *t, sa_spans *spans)
{
    key_runs columns;
    find_columns(t->opts, t->problem->n_k, &columns);
    for (int64_t i = t->begin; i < t->end;) {
        sa_row_block rows;
        sa_status status = sa_spans_block(spans, &rows);
        int64_t done = 0;
        for (int64_t x = 0; x < columns.count && status == SA_OK; x++) {
            status = sa_spans_banded(spans, done, columns.start[x]);
            status = status ? status : sa_spans_seen(spans, columns.start[x], columns.end[x]);
            done = columns.end[x];
        }
        status = status ? status : sa_spans_banded(spans, done, t->problem->n_k);
        if (status != SA_OK) {
            return status;
        }
        i = rows.end;
    }
    return SA_OK;
}

const sa_planner sa_planner_window = {
    .name = "window",
    .fields = fields,
    .opts_size = sizeof(sa_window_opts),
    .rows_per_block = 64,
    .grows = true,
    .band = band,
    .emit = emit,
};
