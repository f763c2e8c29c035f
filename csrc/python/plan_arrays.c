/* plan_arrays.c - a plan as a dict of scalars and arrays, and back: one table for both ways. */
#include "python/arrays.h"

#include <string.h>

#include "base/alloc.h"
#include "python/plan_type.h"

typedef enum { COUNT, SMALL, FLAG } scalar_kind;

static const struct {
    const char *name;
    scalar_kind kind;
    size_t offset;
} scalars[] = {
    {"n_q", COUNT, offsetof(sa_plan, n_q)},
    {"n_k", COUNT, offsetof(sa_plan, n_k)},
    {"n_blocks", COUNT, offsetof(sa_plan, n_blocks)},
    {"n_maps", COUNT, offsetof(sa_plan, n_maps)},
    {"batch", COUNT, offsetof(sa_plan, batch)},
    {"heads", COUNT, offsetof(sa_plan, heads)},
    {"n_spans", COUNT, offsetof(sa_plan, n_spans)},
    {"see_maps", COUNT, offsetof(sa_plan, see_maps)},
    {"band_maps", COUNT, offsetof(sa_plan, band_maps)},
    {"rows_per_block", SMALL, offsetof(sa_plan, rows_per_block)},
    {"heads_per_map", SMALL, offsetof(sa_plan, heads_per_map)},
    {"span_len", SMALL, offsetof(sa_plan, span_len)},
    {"per_batch", FLAG, offsetof(sa_plan, per_batch)},
    {"term_mask", FLAG, offsetof(sa_plan, term_mask)},
};

typedef enum { BLOCKS, MAP_BLOCKS, MAP_BLOCKS_AND_ONE, SPANS, SEE_ROWS, BAND_ROWS } array_length;

static const struct {
    const char *name;
    array_length length;
    sa_dtype dtype;
    bool optional;
    size_t offset;
} arrays[] = {
    {"row_start", BLOCKS, SA_I32, false, offsetof(sa_plan, row_start)},
    {"row_ptr", MAP_BLOCKS_AND_ONE, SA_I64, false, offsetof(sa_plan, row_ptr)},
    {"see_ptr", MAP_BLOCKS, SA_I64, false, offsetof(sa_plan, see_ptr)},
    {"band_ptr", MAP_BLOCKS, SA_I64, false, offsetof(sa_plan, band_ptr)},
    {"start", SPANS, SA_I32, false, offsetof(sa_plan, start)},
    {"len", SPANS, SA_I32, true, offsetof(sa_plan, len)},
    {"see_lo", SEE_ROWS, SA_I32, false, offsetof(sa_plan, see_lo)},
    {"see_hi", SEE_ROWS, SA_I32, false, offsetof(sa_plan, see_hi)},
    {"band_lo", BAND_ROWS, SA_I32, true, offsetof(sa_plan, band_lo)},
    {"band_hi", BAND_ROWS, SA_I32, true, offsetof(sa_plan, band_hi)},
};

#define LENGTH(table) ((int)(sizeof(table) / sizeof((table)[0])))

/* Entries of an array, from the scalars; false when the product wraps. */
static bool
length_of(const sa_plan *plan, array_length which, size_t *length)
{
    switch (which) {
    case BLOCKS:
        return sa_mul(1, (size_t)plan->n_blocks, length);
    case MAP_BLOCKS:
        return sa_mul((size_t)plan->n_maps, (size_t)plan->n_blocks, length);
    case MAP_BLOCKS_AND_ONE:
        return sa_mul((size_t)plan->n_maps, (size_t)plan->n_blocks, length) &&
               sa_add(*length, 1, length);
    case SPANS:
        return sa_mul(1, (size_t)plan->n_spans, length);
    case SEE_ROWS:
        return sa_mul((size_t)plan->see_maps, (size_t)plan->n_q, length);
    case BAND_ROWS:
        return sa_mul((size_t)plan->band_maps, (size_t)plan->n_q, length);
    }
    return false;
}

static PyObject *
scalar_object(const sa_plan *plan, int i)
{
    const char *at = (const char *)plan + scalars[i].offset;

    if (scalars[i].kind == FLAG) {
        return PyBool_FromLong(*(const bool *)at);
    }
    return scalars[i].kind == SMALL ? PyLong_FromLong(*(const int32_t *)at)
                                    : PyLong_FromLongLong(*(const int64_t *)at);
}

/* A copy, or None for an absent array. */
static PyObject *
array_object(const sa_plan *plan, int i)
{
    const void *data = *(void *const *)((const char *)plan + arrays[i].offset);
    size_t length;

    if (!data || !length_of(plan, arrays[i].length, &length)) {
        Py_RETURN_NONE;
    }
    npy_intp size = (npy_intp)length;
    PyObject *copy = PyArray_SimpleNew(1, &size, arrays[i].dtype == SA_I64 ? NPY_INT64 : NPY_INT32);
    if (copy) {
        memcpy(PyArray_DATA((PyArrayObject *)copy), data, length * sa_dtype_size(arrays[i].dtype));
    }
    return copy;
}

PyObject *
py_plan_write(const sa_plan *plan)
{
    PyObject *dict = PyDict_New();

    for (int i = 0; dict && i < LENGTH(scalars) + LENGTH(arrays); i++) {
        const int a = i - LENGTH(scalars);
        PyObject *value = a < 0 ? scalar_object(plan, i) : array_object(plan, a);
        const char *name = a < 0 ? scalars[i].name : arrays[a].name;
        if (!value || PyDict_SetItemString(dict, name, value) < 0) {
            Py_CLEAR(dict);
        }
        Py_XDECREF(value);
    }
    return dict;
}

/* New reference to dict[name]; NULL with ArgumentError when it is missing. */
static PyObject *
entry_of(py_call *call, PyObject *dict, const char *name)
{
    PyObject *value = PyMapping_GetItemString(dict, name);

    if (!value && PyErr_ExceptionMatches(PyExc_KeyError)) {
        PyErr_Format(call->state->argument,
                     "the dict of a plan needs the entry %s; give all that Plan.arrays() gives",
                     name);
    }
    return value;
}

static int
read_scalar(py_call *call, PyObject *dict, int i, sa_plan *plan)
{
    const int64_t max = scalars[i].kind == FLAG    ? 1
                        : scalars[i].kind == SMALL ? INT32_MAX
                                                   : INT64_MAX / 2;
    char *at = (char *)plan + scalars[i].offset;
    PyObject *value = entry_of(call, dict, scalars[i].name);
    int64_t number;

    if (!value) {
        return -1;
    }
    const int status = py_int(call, value, scalars[i].name, 0, max, &number);
    Py_DECREF(value);
    if (status < 0) {
        return -1;
    }
    if (scalars[i].kind == FLAG) {
        *(bool *)at = number != 0;
    } else if (scalars[i].kind == SMALL) {
        *(int32_t *)at = (int32_t)number;
    } else {
        *(int64_t *)at = number;
    }
    return 0;
}

static int
copy_array(py_call *call, PyObject *value, int i, sa_plan *plan)
{
    const size_t item = sa_dtype_size(arrays[i].dtype);
    sa_view view;
    size_t length;

    if (py_view(call, value, arrays[i].name, 1, PY_DTYPE(arrays[i].dtype), PY_CONTIGUOUS, &view)) {
        return -1;
    }
    if (!length_of(plan, arrays[i].length, &length) || (size_t)view.size[3] != length) {
        PyErr_Format(call->state->argument,
                     "%s must have as many entries as the plan's sizes say, got %lld",
                     arrays[i].name, (long long)view.size[3]);
        return -1;
    }
    void *copy = sa_malloc_array(length, item);
    if (!copy) {
        return py_call_status(call, SA_ENOMEM);
    }
    memcpy(copy, view.data, length * item);
    memcpy((char *)plan + arrays[i].offset, &copy, sizeof(copy));
    return 0;
}

sa_plan *
py_plan_read(py_call *call, PyObject *dict)
{
    sa_plan *plan = sa_malloc(sizeof(*plan));

    if (!plan) {
        py_call_status(call, SA_ENOMEM);
        return NULL;
    }
    memset(plan, 0, sizeof(*plan));
    for (int i = 0; i < LENGTH(scalars); i++) {
        if (read_scalar(call, dict, i, plan) < 0) {
            goto fail;
        }
    }
    for (int i = 0; i < LENGTH(arrays); i++) {
        PyObject *value = entry_of(call, dict, arrays[i].name);
        const int status = !value ? -1
                           : value == Py_None && arrays[i].optional
                               ? 0
                               : copy_array(call, value, i, plan);
        Py_XDECREF(value);
        if (status < 0) {
            goto fail;
        }
    }
    return plan;
fail:
    sa_plan_free(plan);
    return NULL;
}
