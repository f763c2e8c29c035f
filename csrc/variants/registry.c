/* registry.c - the list of all variants. */
#include "variants/variant.h"

#include <string.h>

static const sa_planner *const planners[] = {
    &sa_planner_dense,     &sa_planner_window, &sa_planner_prefix,
    &sa_planner_blockmask, &sa_planner_topk,   &sa_planner_random,
};

const sa_planner *
sa_planner_at(int i)
{
    return i >= 0 && i < (int)(sizeof planners / sizeof *planners) ? planners[i] : NULL;
}

const sa_planner *
sa_planner_find(const char *name)
{
    for (int i = 0; sa_planner_at(i) != NULL; i++) {
        if (strcmp(planners[i]->name, name) == 0) {
            return planners[i];
        }
    }
    return NULL;
}
