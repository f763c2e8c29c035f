/* arrays.c - views of ndarrays: everything that could lead a kernel astray is refused here. */
#include "python/arrays.h"

#include <stdio.h>
#include <string.h>

static const char *const dtype_names[] = {
    "float32", "float64", "float16", "uint16 (bfloat16)", "bool", "int32", "int64",
};

/* sa_dtype of an array, -1 for any other. */
static int
dtype_of(PyArrayObject *array)
{
    const int type = PyArray_TYPE(array);

    switch (type) {
    case NPY_FLOAT:
        return SA_F32;
    case NPY_DOUBLE:
        return SA_F64;
    case NPY_HALF:
        return SA_F16;
    case NPY_USHORT:
        return SA_BF16;
    case NPY_BOOL:
        return SA_BOOL;
    default:
        break;
    }
    if (PyTypeNum_ISINTEGER(type) && PyTypeNum_ISSIGNED(type)) {
        return PyArray_ITEMSIZE(array) == 4 ? SA_I32 : PyArray_ITEMSIZE(array) == 8 ? SA_I64 : -1;
    }
    return -1;
}

static int
check_dtype(py_call *call, PyArrayObject *array, const char *arg, unsigned dtypes)
{
    const int dtype = dtype_of(array);
    char words[96] = "";

    if (dtype >= 0 && (dtypes & PY_DTYPE(dtype)) && PyArray_ISNOTSWAPPED(array)) {
        return dtype;
    }
    for (int d = 0; d < (int)(sizeof(dtype_names) / sizeof(dtype_names[0])); d++) {
        if (dtypes & PY_DTYPE(d)) {
            const size_t used = strlen(words);
            snprintf(words + used, sizeof(words) - used, "%s%s", used ? " or " : "",
                     dtype_names[d]);
        }
    }
    PyErr_Format(call->state->dtype, "%s must be %s in native byte order, got %R; use %s.astype",
                 arg, words, (PyObject *)PyArray_DESCR(array), arg);
    return -1;
}

/* Memory that the array spans: [*low, *high). */
static void
extent(PyArrayObject *array, const char **low, const char **high)
{
    *low = *high = PyArray_BYTES(array);
    if (PyArray_SIZE(array) == 0) {
        return;
    }
    for (int a = 0; a < PyArray_NDIM(array); a++) {
        const npy_intp reach = (PyArray_DIM(array, a) - 1) * PyArray_STRIDE(array, a);
        *(reach < 0 ? low : high) += reach;
    }
    *high += PyArray_ITEMSIZE(array);
}

/* True when no two elements share memory: each stride steps over all that smaller strides reach.
 * With sums, but for those along strides of 0. */
static bool
elements_apart(PyArrayObject *array, bool sums)
{
    npy_intp reach = PyArray_ITEMSIZE(array);
    unsigned seen = 0;

    if (PyArray_SIZE(array) == 0) {
        return true;
    }
    for (int round = 0; round < PyArray_NDIM(array); round++) {
        int next = -1;
        for (int a = 0; a < PyArray_NDIM(array); a++) {
            const npy_intp step = Py_ABS(PyArray_STRIDE(array, a));
            if (!(seen & (1u << a)) && (next < 0 || step < Py_ABS(PyArray_STRIDE(array, next)))) {
                next = a;
            }
        }
        seen |= 1u << next;
        if (PyArray_DIM(array, next) > 1) {
            const npy_intp step = Py_ABS(PyArray_STRIDE(array, next));
            if (step < reach && !(sums && step == 0)) {
                return false;
            }
            reach += (PyArray_DIM(array, next) - 1) * step;
        }
    }
    return true;
}

/* Fills sizes and strides, counted in elements; the array's axes become the last ones. */
static int
fill_axes(py_call *call, PyArrayObject *array, const char *arg, unsigned flags, sa_view *view)
{
    const int pad = 4 - PyArray_NDIM(array);
    const npy_intp item = PyArray_ITEMSIZE(array);
    const bool empty = PyArray_SIZE(array) == 0;

    for (int a = 0; a < 4; a++) {
        view->size[a] = a < pad ? 1 : PyArray_DIM(array, a - pad);
        view->stride[a] = 0;
        if (view->size[a] > 1 && !empty) { /* strides never taken may be any number */
            const npy_intp bytes = PyArray_STRIDE(array, a - pad);
            if (bytes % item != 0) {
                PyErr_Format(call->state->argument,
                             "%s has a stride of %zd bytes, which is not a multiple of its "
                             "itemsize %zd; pass a copy",
                             arg, bytes, item);
                return -1;
            }
            view->stride[a] = bytes / item;
        }
    }
    if (view->size[3] <= 1 || empty) {
        view->stride[3] = 1;
    } else if (!(flags & PY_ANY_LAST) && view->stride[3] != 1) {
        PyErr_Format(call->state->argument,
                     "the last axis of %s must be contiguous, got a stride of %lld elements; "
                     "use np.ascontiguousarray(%s)",
                     arg, (long long)view->stride[3], arg);
        return -1;
    }
    return 0;
}

static int
check_layout(py_call *call, PyArrayObject *array, const char *arg, unsigned flags)
{
    const char *fault = NULL;

    if (!PyArray_ISALIGNED(array)) {
        fault = "must be aligned in memory; pass a copy";
    } else if ((flags & PY_CONTIGUOUS) && !PyArray_IS_C_CONTIGUOUS(array)) {
        fault = "must be C-contiguous; use np.ascontiguousarray";
    } else if ((flags & PY_WRITE) && !PyArray_ISWRITEABLE(array)) {
        fault = "is read-only; pass an array that may be written";
    } else if ((flags & PY_WRITE) && !elements_apart(array, flags & PY_SUMS)) {
        fault = "overlaps itself; pass an array whose elements are apart in memory";
    }
    if (fault) {
        PyErr_Format(call->state->argument, "%s %s", arg, fault);
        return -1;
    }
    return 0;
}

int
py_view(py_call *call, PyObject *object, const char *arg, int n_axes, unsigned dtypes,
        unsigned flags, sa_view *view)
{
    static double nothing; /* stands where an empty array has no memory: NULL means absent */
    PyArrayObject *array = (PyArrayObject *)object;

    memset(view, 0, sizeof(*view));
    if (object == Py_None && (flags & PY_OPTIONAL)) {
        return 0;
    }
    if (!PyArray_Check(object)) {
        PyErr_Format(call->state->dtype, "%s must be a NumPy array, got %s; use np.asarray", arg,
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    if (PyArray_NDIM(array) != n_axes) {
        PyErr_Format(call->state->argument, "%s must have %d axes, got %d; reshape it", arg, n_axes,
                     PyArray_NDIM(array));
        return -1;
    }
    const int dtype = check_dtype(call, array, arg, dtypes);
    if (dtype < 0 || check_layout(call, array, arg, flags) < 0 ||
        fill_axes(call, array, arg, flags, view) < 0 || py_call_hold(call, object) < 0) {
        return -1;
    }
    view->dtype = (sa_dtype)dtype;
    view->data = PyArray_DATA(array) ? PyArray_DATA(array) : &nothing;
    return 0;
}

int
py_view_size(py_call *call, const sa_view *view, const char *arg, int axis, int64_t size)
{
    if (view->size[axis] == size) {
        return 0;
    }
    PyErr_Format(call->state->argument, "%s must have %lld entries on axis %d, got %lld", arg,
                 (long long)size, axis - 4, (long long)view->size[axis]);
    return -1;
}

int
py_no_overlap(py_call *call, PyObject *out, const char *out_name, PyObject *in, const char *in_name)
{
    const char *out_low, *out_high, *in_low, *in_high;

    if (out == Py_None || in == Py_None) {
        return 0;
    }
    extent((PyArrayObject *)out, &out_low, &out_high);
    extent((PyArrayObject *)in, &in_low, &in_high);
    if (out_high <= in_low || in_high <= out_low) {
        return 0;
    }
    /* Interleaved views of one buffer may still be apart: NumPy's exact test decides. */
    PyObject *numpy = PyImport_ImportModule("numpy");
    PyObject *shared =
        numpy ? PyObject_CallMethod(numpy, "shares_memory", "OOi", out, in, 100000) : NULL;
    Py_XDECREF(numpy);
    if (!shared && !PyErr_ExceptionMatches(PyExc_RuntimeError)) {
        return -1;
    }
    const bool apart = shared == Py_False;
    PyErr_Clear(); /* TooHardError, a RuntimeError: taken as shared */
    Py_XDECREF(shared);
    if (!apart) {
        PyErr_Format(call->state->argument, "%s shares memory with %s; pass a new array as %s",
                     out_name, in_name, out_name);
        return -1;
    }
    return 0;
}
