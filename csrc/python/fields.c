/* fields.c - one reader for the options of every variant: a new one adds no binding code. */
#include "python/fields.h"

#include <string.h>

#include "python/arrays.h"

/* What is being read. */
typedef struct {
    py_call *call;
    const sa_field *field;
    const char *owner; /* class of the spec             */
    char label[64];    /* "TopK.k": the name in messages */
    char *at;          /* address of the option         */
} reader;

static int
refuse(const reader *r, PyObject *kind, const char *wanted, PyObject *value)
{
    PyErr_Format(kind, "%s must be %s, got %R", r->label, wanted, value);
    return -1;
}

static int
read_int(const reader *r, PyObject *value, int64_t *out)
{
    return py_int(r->call, value, r->label, (int64_t)r->field->min, (int64_t)r->field->max, out);
}

static int
read_bool(const reader *r, PyObject *value, int32_t *out)
{
    if (!PyBool_Check(value)) {
        return refuse(r, r->call->state->dtype, "True or False", value);
    }
    *out = value == Py_True;
    return 0;
}

static int
read_word(const reader *r, PyObject *value, int32_t *out)
{
    char words[160] = "one of";

    for (int i = 0; r->field->words[i]; i++) {
        if (PyUnicode_Check(value) &&
            PyUnicode_CompareWithASCIIString(value, r->field->words[i]) == 0) {
            *out = i;
            return 0;
        }
        const size_t used = strlen(words);
        PyOS_snprintf(words + used, sizeof(words) - used, "%s '%s'", i ? "," : "",
                      r->field->words[i]);
    }
    return refuse(r, r->call->state->argument, words, value);
}

static int
read_ints(const reader *r, PyObject *value, sa_ints *out)
{
    PyObject *items = PySequence_Tuple(value);

    if (!items) {
        return PyErr_ExceptionMatches(PyExc_TypeError)
                   ? refuse(r, r->call->state->dtype, "a tuple of integers", value)
                   : -1;
    }
    out->count = PyTuple_GET_SIZE(items);
    int status = 0;
    if (out->count > SA_INTS_MAX) {
        PyErr_Format(r->call->state->argument, "%s must have at most %d entries, got %lld",
                     r->label, SA_INTS_MAX, (long long)out->count);
        status = -1;
    }
    for (int64_t i = 0; i < out->count && status == 0; i++) {
        status = read_int(r, PyTuple_GET_ITEM(items, i), &out->value[i]);
    }
    Py_DECREF(items);
    return status;
}

/* A bool array of one to four axes out of params. */
static int
read_array(const reader *r, PyObject *params, sa_view *out)
{
    const char *name = r->field->name;
    PyObject *value = NULL;

    if (params != Py_None) {
        value = PyMapping_GetItemString(params, name);
        if (!value && !PyErr_ExceptionMatches(PyExc_KeyError)) {
            return -1;
        }
        PyErr_Clear();
    }
    if (!value) {
        PyErr_Format(r->call->state->argument,
                     "%s needs the array %s; pass params={\"%s\": ...} with a bool array", r->owner,
                     name, name);
        return -1;
    }
    const int axes = PyArray_Check(value) ? PyArray_NDIM((PyArrayObject *)value) : 1;
    const int status = py_view(r->call, value, name, Py_MIN(Py_MAX(axes, 1), 4), PY_DTYPE(SA_BOOL),
                               PY_ANY_LAST, out);
    Py_DECREF(value);
    return status;
}

static int
read_field(const reader *r, PyObject *spec, PyObject *params)
{
    if (r->field->type == SA_FIELD_ARRAY) {
        return read_array(r, params, (sa_view *)r->at);
    }
    PyObject *value = PyObject_GetAttrString(spec, r->field->name);
    int status = -1;

    if (!value) {
        return -1;
    }
    switch (r->field->type) {
    case SA_FIELD_I64:
        status = read_int(r, value, (int64_t *)r->at);
        break;
    case SA_FIELD_F64:
        status = py_real(r->call, value, r->label, r->field->min, r->field->max, (double *)r->at);
        break;
    case SA_FIELD_BOOL:
        status = read_bool(r, value, (int32_t *)r->at);
        break;
    case SA_FIELD_ENUM:
        status = read_word(r, value, (int32_t *)r->at);
        break;
    case SA_FIELD_I64S:
        status = read_ints(r, value, (sa_ints *)r->at);
        break;
    case SA_FIELD_ARRAY:
        break;
    }
    Py_DECREF(value);
    return status;
}

int
py_fields_read(py_call *call, const sa_planner *planner, PyObject *spec, PyObject *params,
               void *opts)
{
    const char *dot = strrchr(Py_TYPE(spec)->tp_name, '.');
    const char *owner = dot ? dot + 1 : Py_TYPE(spec)->tp_name;

    for (const sa_field *f = planner->fields; f && f->name; f++) {
        reader r = {.call = call, .field = f, .owner = owner, .at = (char *)opts + f->offset};
        PyOS_snprintf(r.label, sizeof(r.label), "%s.%s", owner, f->name);
        if (read_field(&r, spec, params) < 0) {
            return -1;
        }
    }
    return 0;
}

static PyObject *
words_tuple(const char *const *words)
{
    Py_ssize_t n = 0;

    while (words[n]) {
        n++;
    }
    PyObject *tuple = PyTuple_New(n);
    for (Py_ssize_t i = 0; tuple && i < n; i++) {
        PyObject *word = PyUnicode_FromString(words[i]);
        if (!word) {
            Py_CLEAR(tuple);
            break;
        }
        PyTuple_SET_ITEM(tuple, i, word);
    }
    return tuple;
}

static PyObject *
describe_field(const sa_field *f)
{
    static const char *const types[] = {"int", "float", "bool", "enum", "ints", "array"};

    if (f->type == SA_FIELD_I64 || f->type == SA_FIELD_I64S) {
        return Py_BuildValue("(ssLLO)", f->name, types[f->type], (long long)f->min,
                             (long long)f->max, Py_None);
    }
    if (f->type == SA_FIELD_F64) {
        return Py_BuildValue("(ssddO)", f->name, types[f->type], f->min, f->max, Py_None);
    }
    if (f->type == SA_FIELD_ENUM) {
        return Py_BuildValue("(ssOON)", f->name, types[f->type], Py_None, Py_None,
                             words_tuple(f->words));
    }
    return Py_BuildValue("(ssOOO)", f->name, types[f->type], Py_None, Py_None, Py_None);
}

PyObject *
py_fields_describe(const sa_field *fields)
{
    PyObject *list = PyList_New(0);

    for (const sa_field *f = fields; list && f && f->name; f++) {
        PyObject *entry = describe_field(f);
        if (!entry || PyList_Append(list, entry) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(entry);
    }
    return list;
}
