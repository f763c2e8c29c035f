/* module.h - what every binding shares: module state, one crossing, method tables. */
#ifndef SA_PY_MODULE_H
#define SA_PY_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "base/ctx.h"
#include "base/view.h"

/* Kept per module: exception classes and the heap type. */
typedef struct {
    PyObject *error;    /* SparseAttnError             */
    PyObject *argument; /* ArgumentError, ValueError   */
    PyObject *dtype;    /* DtypeError, TypeError       */
    PyObject *memory;   /* OutOfMemory, MemoryError    */
    PyObject *internal; /* InternalError, RuntimeError */
    PyTypeObject *plan_type;
} py_state;

static inline py_state *
py_state_of(PyObject *module)
{
    return (py_state *)PyModule_GetState(module);
}

/* One crossing of the boundary: a leased context, and strong references to all that the kernel
 * reads. The order in every binding: py_call_begin, views, py_call_detach, one C function,
 * py_call_attach, py_call_status, py_call_end in any state. */
typedef struct {
    py_state *state;
    sa_ctx *ctx; /* leased; its poll is the signal check */
    PyThreadState *thread;
    PyObject *held; /* list of strong references, or NULL   */
} py_call;

/* Zeroes the call, checks the count of positional arguments and leases a context. -1: exception
 * set; py_call_end is safe either way. */
int py_call_begin(py_call *call, PyObject *module, const char *name, Py_ssize_t nargs,
                  Py_ssize_t wanted);
int py_call_hold(py_call *call, PyObject *object); /* a strong reference until py_call_end */
void py_call_detach(py_call *call);                /* drops the GIL                        */
void py_call_attach(py_call *call);                /* takes it back                        */
/* 0 when SA_OK; else -1 with an exception set: one that Python set already (Ctrl-C) stays. */
int py_call_status(py_call *call, sa_status status);
void py_call_end(py_call *call);

/* Scalars of arguments; -1 with an exception that names the argument, the range and the value.
 * Reals between infinities: any number, the core has the last word. */
int py_int(py_call *call, PyObject *object, const char *arg, int64_t min, int64_t max,
           int64_t *value);
int py_real(py_call *call, PyObject *object, const char *arg, double min, double max,
            double *value);

/* The two middle entries of a PyMethodDef of a positional-only METH_FASTCALL function. */
#define PY_FAST(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL

/* Method tables; each ends with an empty entry. */
extern PyMethodDef py_call_methods[];    /* call.c: attend, merge, scores           */
extern PyMethodDef py_plan_methods[];    /* plans.c: build, combine, describe       */
extern PyMethodDef py_runtime_methods[]; /* runtime.c: threads, ISA, memory         */
extern PyMethodDef py_bench_methods[];   /* bench.c: what the benchmarks call       */
extern PyMethodDef py_grad_methods[];    /* grads.c: gradients of attention          */
extern PyMethodDef py_merge_methods[];   /* merges.c: the gradient of merge         */
extern PyMethodDef py_weight_methods[];  /* weights.c: mass and largest weights     */
extern PyMethodDef sa_ops_methods[];     /* ops.c: operators of models              */
extern PyType_Spec py_plan_spec;         /* plan_type.c                             */

#endif
