/* variant.h - what a variant is to the engine, and the list of all of them. */
#ifndef SA_VARIANT_H
#define SA_VARIANT_H

#include "engine/fields.h"
#include "engine/problem.h"
#include "engine/plan.h"
#include "engine/planner.h"

extern const sa_planner sa_planner_dense, sa_planner_window, sa_planner_prefix,
    sa_planner_blockmask, sa_planner_topk, sa_planner_random;

/* NULL when there is none of that name. */
const sa_planner *sa_planner_find(const char *name);
/* The i-th record, NULL past the end. */
const sa_planner *sa_planner_at(int i);

#endif
