/* dense.c - every visible key: what all others are compared with. */
#include "variants/variant.h"

static const sa_field fields[] = {
    SA_FIELD_END,
};

/* Blocks of 128 rows halve the reads of keys from outside the first cache; short inputs keep more
 * tasks, and masks are looked at in blocks of 64 x 64. */
static void
shape(const sa_problem *p, const void *opts, sa_plan_shape *shape)
{
    (void)opts;
    shape->rows_per_block = p->n_q >= 2048 && p->mask.data == NULL ? 128 : 64;
}

const sa_planner sa_planner_dense = {
    .name = "dense",
    .fields = fields,
    .rows_per_block = 64,
    .shape = shape,
    .emit = sa_spans_everything,
};
