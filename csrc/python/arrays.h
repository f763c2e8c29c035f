/* arrays.h - NumPy arrays as views: checked, never copied, kept alive for the call. */
#ifndef SA_PY_ARRAYS_H
#define SA_PY_ARRAYS_H

#include "python/module.h"

/* One table of NumPy's functions for all files; module.c fills it. */
#define NPY_TARGET_VERSION NPY_1_25_API_VERSION
#define NPY_NO_DEPRECATED_API NPY_1_25_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL sa_numpy_api
#ifndef SA_IMPORT_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

/* Which dtypes an argument takes: bits of sa_dtype. uint16 stands for bfloat16. */
#define PY_DTYPE(dtype) (1u << (dtype))
#define PY_REAL (PY_DTYPE(SA_F32) | PY_DTYPE(SA_F64))
#define PY_HALF (PY_DTYPE(SA_F16) | PY_DTYPE(SA_BF16))
#define PY_STORED (PY_REAL | PY_HALF)

enum {
    PY_OPTIONAL = 1,   /* None gives a view with data NULL                             */
    PY_WRITE = 2,      /* an output: writable, and no element twice                    */
    PY_ANY_LAST = 4,   /* the last axis may have any stride; otherwise contiguous      */
    PY_CONTIGUOUS = 8, /* C-contiguous throughout                                      */
    PY_SUMS = 16,      /* with PY_WRITE: strides of 0 stand for axes that are summed   */
};

/* The view of an ndarray of exactly n_axes axes (1 to 4), which become the last ones: a (rows, k)
 * array is a view (1, 1, rows, k). Holds the array. Wrong dtype, byte order, alignment, strides
 * or number of axes: -1 with an exception that names the argument and the remedy. */
int py_view(py_call *call, PyObject *object, const char *arg, int n_axes, unsigned dtypes,
            unsigned flags, sa_view *view);

/* -1 unless view axis `axis` has that size: "out must have 5 rows as x has, got 4" style. */
int py_view_size(py_call *call, const sa_view *view, const char *arg, int axis, int64_t size);

/* -1 when memory of the output array may be read through an input array while it is written. */
int py_no_overlap(py_call *call, PyObject *out, const char *out_name, PyObject *in,
                  const char *in_name);

#endif
