/* call.h - problems across the boundary, shared by what runs plans and what makes them. */
#ifndef SA_PY_CALL_H
#define SA_PY_CALL_H

#include "python/module.h"

#include "engine/attend.h"

/* What a problem tuple holds besides numbers; borrowed from the tuple. */
typedef struct {
    PyObject *mask, *bias, *key_mask, *sink;
    PyObject *cu_seqlens; /* None: one sequence, else for the makers of plans */
} py_problem_arrays;

/* (causal, scale, softcap, mask, bias, key_mask[, dropout_p, seed, sink[, cu_seqlens]]) into p,
 * with q, k and v in place; checked. */
int py_problem(py_call *call, PyObject *tuple, sa_problem *p, py_problem_arrays *arrays);

/* The views of the two masks of a problem; None: absent. The core checks the shapes. */
int py_masks(py_call *call, PyObject *mask, PyObject *key_mask, sa_problem *p);

/* What attend and its gradients read, in the order of their arguments: q, k, v, parts, problem. */
typedef struct {
    sa_problem p;
    sa_part *parts; /* the caller's to free, in any state */
    int n_parts;
    py_problem_arrays given;
} py_attend_call;
int py_attend_inputs(py_call *call, PyObject *const *args, py_attend_call *in);
/* Refuses an output, an array or None, that shares memory with what that call reads. */
int py_output_apart(py_call *call, PyObject *out, const char *name, PyObject *const *args,
                    const py_attend_call *in);

/* lse (batch, heads, n_q), or another array of one number a row, with a last axis of 1. */
int py_row_view(py_call *call, PyObject *object, const char *name, unsigned dtypes, unsigned flags,
                sa_view *view);

#endif
