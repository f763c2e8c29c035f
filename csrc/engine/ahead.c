/* ahead.c - prefetches, spread thinly: a burst of more lines than a core can have under way stops
 * it. Into the first cache: Zen 5 does nothing when asked for the second alone. */
#include "engine/ahead.h"

enum { LINE = 64, STEP_LINES = 48 };

static sa_ahead_rows
rows_of(const sa_view *v, const sa_group *g, int64_t head)
{
    if (v == NULL || v->data == NULL) {
        return (sa_ahead_rows){NULL, 0, 0, 0};
    }
    const int64_t bytes = (int64_t)sa_dtype_size(v->dtype);
    return (sa_ahead_rows){
        .base = sa_view_row(*v, g->b, head, 0),
        .step = v->stride[2] * bytes,
        .head_step = v->stride[1] * bytes,
        .lines = (int)((v->size[3] * bytes + LINE - 1) / LINE),
    };
}

void
sa_ahead_start(sa_ahead *a, const sa_group *g, const sa_view *const of_query[SA_AHEAD_VIEWS],
               const sa_view *const of_key[SA_AHEAD_VIEWS])
{
    int64_t lines = 1;
    for (int i = 0; i < SA_AHEAD_VIEWS; i++) {
        a->of_query[i] = rows_of(of_query[i], g, g->head);
        a->of_key[i] = rows_of(of_key[i], g, g->g);
        lines += a->of_query[i].lines * g->n_heads + a->of_key[i].lines;
    }
    a->row = g->next_begin;
    a->rows = (int)SA_MAX(1, (STEP_LINES + lines / 2) / lines);
}

static void
ask(const sa_ahead_rows *rows, int64_t row, int64_t heads)
{
    const char *at = rows->base + row * rows->step;
    for (int64_t h = 0; h < heads && rows->lines > 0; h++, at += rows->head_step) {
        for (int x = 0; x < rows->lines; x++) {
            __builtin_prefetch(at + (int64_t)x * LINE, 0, 3);
        }
    }
    __asm__ volatile(""); /* GCC drops calls to a function that does nothing but prefetch */
}

void
sa_ahead_step(sa_ahead *a, const sa_group *g)
{
    const int64_t end = SA_MIN(a->row + a->rows, g->next_end);
    for (; a->row < end; a->row++) {
        const int32_t key = sa_group_sees_to(g, a->row) - 1;
        for (int i = 0; i < SA_AHEAD_VIEWS; i++) {
            ask(&a->of_query[i], a->row, g->n_heads);
            if (key >= 0) {
                ask(&a->of_key[i], key, 1);
            }
        }
    }
}
