/* plan_rows.c - the keys of one row, whatever kinds of spans and masks they come from. */
#include "engine/plan_parts.h"

void
sa_row_runs_start(sa_row_runs *runs, const sa_plan *plan, const sa_problem *p, int64_t b, int64_t h,
                  int64_t i)
{
    const int64_t map = sa_plan_map(plan, b, h),
                  slot = map * plan->n_blocks + sa_plan_block_of(plan, i);
    const int64_t see = (plan->see_maps > 1 ? b * plan->n_q : 0) + i;
    const int32_t lo = plan->see_lo[see], hi = plan->see_hi[see];
    *runs = (sa_row_runs){
        .plan = plan,
        .next = {plan->row_ptr[slot], plan->see_ptr[slot], plan->band_ptr[slot]},
        .end = {plan->see_ptr[slot], plan->band_ptr[slot], plan->row_ptr[slot + 1]},
        .lo = {0, lo, lo},
        .hi = {(int32_t)plan->n_k, hi, hi},
    };
    if (plan->band_lo != NULL) {
        const int64_t band = (plan->band_maps > 1 ? map * plan->n_q : 0) + i;
        runs->lo[SA_SPAN_BAND] = SA_MAX(lo, plan->band_lo[band]);
        runs->hi[SA_SPAN_BAND] = SA_MIN(hi, plan->band_hi[band]);
    }
    if (plan->term_mask) {
        runs->bits = sa_row_bits_of(p, true, true, b, h, i);
    }
}

/* The lowest span that is left, of any kind. */
static int
next_kind(const sa_row_runs *runs)
{
    int kind = -1;
    for (int x = 0; x < 3; x++) {
        if (runs->next[x] < runs->end[x] &&
            (kind < 0 || runs->plan->start[runs->next[x]] < runs->plan->start[runs->next[kind]])) {
            kind = x;
        }
    }
    return kind;
}

/* The next span as far as the row sees it; *masked: the masks may hide more of it. */
static bool
next_span(sa_row_runs *runs, int64_t *from, int64_t *to, bool *masked)
{
    for (;;) {
        const int kind = next_kind(runs);
        if (kind < 0) {
            return false;
        }
        const int64_t s = runs->next[kind]++, first = runs->plan->start[s];
        *from = SA_MAX(first, runs->lo[kind]);
        *to = SA_MIN(first + sa_plan_span_len(runs->plan, s), runs->hi[kind]);
        *masked = kind != SA_SPAN_FULL && sa_row_bits_any(runs->bits);
        if (*from < *to) {
            return true;
        }
    }
}

bool
sa_row_runs_next(sa_row_runs *runs, int64_t *start, int64_t *end)
{
    for (;;) {
        bool masked;
        if (runs->at < runs->stop) {
            *start = sa_row_bits_next(runs->bits, true, runs->at, runs->stop);
            *end = runs->at = sa_row_bits_next(runs->bits, false, *start, runs->stop);
            if (*start < *end) {
                return true;
            }
        }
        if (!next_span(runs, start, end, &masked)) {
            return false;
        }
        if (!masked) {
            return true;
        }
        runs->at = *start;
        runs->stop = *end;
    }
}

int64_t
sa_row_runs_count(sa_row_runs *runs)
{
    int64_t from, to, keys = 0;
    bool masked;
    while (next_span(runs, &from, &to, &masked)) {
        keys += masked ? sa_row_bits_count(runs->bits, from, to) : to - from;
    }
    return keys;
}
