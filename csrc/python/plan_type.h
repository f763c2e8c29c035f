/* plan_type.h - the Python object around a plan: immutable once made. */
#ifndef SA_PY_PLAN_TYPE_H
#define SA_PY_PLAN_TYPE_H

#include "python/module.h"

#include "engine/plan.h"

typedef struct {
    PyObject_HEAD sa_plan *plan;
    PyObject *mask, *key_mask; /* the arrays the plan was built under, or None */
    sa_causal causal;
} py_plan;

/* New reference; owns plan from here on, also when it fails. mask and key_mask: arrays or None. */
PyObject *py_plan_new(py_call *call, sa_plan *plan, sa_causal causal, PyObject *mask,
                      PyObject *key_mask);

/* The plan behind an argument, held by the call; NULL with an exception for anything else. */
py_plan *py_plan_get(py_call *call, PyObject *object, const char *arg);

/* A problem without tensors that carries the sizes, causality and masks of a plan. */
int py_plan_problem(py_call *call, py_plan *self, int64_t kv_heads, sa_problem *p);

/* Plan.arrays(): copies of every scalar and array; and the way back, not yet validated. */
PyObject *py_plan_write(const sa_plan *plan);
sa_plan *py_plan_read(py_call *call, PyObject *dict);

#endif
