/* dense.c - every visible key: what all others are compared with. */
#include "variants/variant.h"

static const sa_field fields[] = {
    SA_FIELD_END,
};

const sa_planner sa_planner_dense = {
    .name = "dense",
    .fields = fields,
    .rows_per_block = 64,
    .grows = true,
    .emit = sa_spans_everything,
};
