/* call.h - problems across the boundary, shared by what runs plans and what makes them. */
#ifndef SA_PY_CALL_H
#define SA_PY_CALL_H

#include "python/module.h"

#include "engine/problem.h"

/* What a problem tuple holds besides numbers; borrowed from the tuple. */
typedef struct {
    PyObject *mask, *bias, *key_mask;
} py_problem_arrays;

/* (causal, scale, softcap, mask, bias, key_mask) into p, with q, k and v in place; checked. */
int py_problem(py_call *call, PyObject *tuple, sa_problem *p, py_problem_arrays *arrays);

/* The views of the two masks of a problem; None: absent. The core checks the shapes. */
int py_masks(py_call *call, PyObject *mask, PyObject *key_mask, sa_problem *p);

#endif
