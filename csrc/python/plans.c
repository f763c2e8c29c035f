/* plans.c - plans across the boundary: of a variant, a mask, arrays, two plans. */
#include "python/arrays.h"

#include <string.h>

#include "base/alloc.h"
#include "python/call.h"
#include "python/fields.h"
#include "python/plan_type.h"
#include "variants/variant.h"

static PyObject *
variant_names(void)
{
    PyObject *list = PyList_New(0);

    for (int i = 0; list && sa_planner_at(i); i++) {
        PyObject *name = PyUnicode_FromString(sa_planner_at(i)->name);
        if (!name || PyList_Append(list, name) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(name);
    }
    return list;
}

/* The record of that name; NULL with an exception that lists all names. */
static const sa_planner *
find_planner(const py_state *state, PyObject *name)
{
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : "";
    const sa_planner *planner = text ? sa_planner_find(text) : NULL;

    if (text && !planner) {
        PyObject *names = variant_names();
        if (names) {
            PyErr_Format(state->argument, "name must be one of %R, got %R", names, name);
            Py_DECREF(names);
        }
    }
    return planner;
}

/* The result of a builder that ran under call: a Plan, or NULL with an exception. */
static PyObject *
finish(py_call *call, sa_status status, sa_plan *plan, sa_causal causal, PyObject *mask,
       PyObject *key_mask)
{
    if (py_call_status(call, status) < 0) {
        sa_plan_free(plan);
        return NULL;
    }
    return py_plan_new(call, plan, causal, mask, key_mask);
}

PyDoc_STRVAR(
    plan_build_doc,
    "plan_build(name, spec, params, q, k, problem, /)\n--\n\n"
    "The Plan of a variant: its fields are attributes of spec, its arrays entries of params.");

static PyObject *
py_plan_build(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    sa_problem p = {0};
    py_problem_arrays given;
    sa_plan *plan = NULL;
    void *opts = NULL;
    const sa_planner *planner;

    if (py_call_begin(&call, module, "plan_build", nargs, 6) < 0 ||
        !(planner = find_planner(call.state, args[0]))) {
        goto done;
    }
    opts = sa_malloc(planner->opts_size);
    if (!opts) {
        py_call_status(&call, SA_ENOMEM);
        goto done;
    }
    memset(opts, 0, planner->opts_size);
    if (py_view(&call, args[3], "q", 4, PY_REAL, 0, &p.q) < 0 ||
        py_view(&call, args[4], "k", 4, PY_REAL, 0, &p.k) < 0 ||
        py_problem(&call, args[5], &p, &given) < 0 ||
        py_fields_read(&call, planner, args[1], args[2], opts) < 0) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status = sa_plan_build(call.ctx, &p, planner, opts, &plan);
    py_call_attach(&call);
    result = finish(&call, status, plan, p.causal, given.mask, given.key_mask);
done:
    sa_free(opts);
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(plan_from_mask_doc,
             "plan_from_mask(mask, /)\n--\n\n"
             "The Plan of a bool array (batch, heads, n_q, n_k), which it keeps.");

static PyObject *
py_plan_from_mask(PyObject *module, PyObject *mask)
{
    py_call call;
    PyObject *result = NULL;
    sa_problem p = {.causal = SA_CAUSAL_NONE, .scale = 1};
    sa_plan *plan = NULL;

    if (py_call_begin(&call, module, "plan_from_mask", 1, 1) < 0 ||
        py_view(&call, mask, "mask", 4, PY_DTYPE(SA_BOOL), PY_ANY_LAST, &p.mask) < 0) {
        goto done;
    }
    p.batch = p.mask.size[0];
    p.heads = p.kv_heads = p.mask.size[1];
    p.n_q = p.mask.size[2];
    p.n_k = p.mask.size[3];
    py_call_detach(&call);
    const sa_status status = sa_plan_from_mask(call.ctx, &p, &plan);
    py_call_attach(&call);
    result = finish(&call, status, plan, SA_CAUSAL_NONE, mask, Py_None);
done:
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(plan_from_arrays_doc,
             "plan_from_arrays(arrays, /)\n--\n\n"
             "The Plan of a dict as Plan.arrays() gives it: copied, then validated.");

static PyObject *
py_plan_from_arrays(PyObject *module, PyObject *dict)
{
    py_call call;
    PyObject *result = NULL;
    sa_plan *plan = NULL;

    if (py_call_begin(&call, module, "plan_from_arrays", 1, 1) < 0) {
        goto done;
    }
    if (!PyDict_Check(dict)) {
        PyErr_Format(call.state->dtype, "arrays must be a dict, got %s", Py_TYPE(dict)->tp_name);
        goto done;
    }
    plan = py_plan_read(&call, dict);
    if (!plan) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status = sa_plan_validate(call.ctx, plan);
    py_call_attach(&call);
    result = finish(&call, status, plan, SA_CAUSAL_NONE, Py_None, Py_None);
done:
    py_call_end(&call);
    return result;
}

/* The mask that a combination reads: that of either plan where only one has any; borrowed. */
static PyObject *
common_mask(py_call *call, PyObject *a, PyObject *b, const char *arg)
{
    if (a != b && a != Py_None && b != Py_None) {
        PyErr_Format(call->state->argument,
                     "the plans were built under different arrays as %s; build both under one",
                     arg);
        return NULL;
    }
    return a == Py_None ? b : a;
}

/* What the result stands under: a union what both plans do, an intersection what either does. */
static PyObject *
finish_combine(py_call *call, sa_status status, sa_plan *plan, const py_plan *a, const py_plan *b,
               bool is_union, PyObject *mask, PyObject *key_mask)
{
    const bool keep = !is_union || !plan || plan->term_mask;
    const sa_causal either = a->causal == SA_CAUSAL_NONE ? b->causal : a->causal;
    sa_causal causal = SA_CAUSAL_NONE;

    if (a->causal == b->causal || (!is_union && (a->causal == either) != (b->causal == either))) {
        causal = either;
    }
    return finish(call, status, plan, causal, keep || a->mask == b->mask ? mask : Py_None,
                  keep || a->key_mask == b->key_mask ? key_mask : Py_None);
}

PyDoc_STRVAR(plan_combine_doc, "plan_combine(a, b, op, /)\n--\n\n"
                               "Plan a or b ('union'), or a and b ('intersection'), row by row.");

static PyObject *
py_plan_combine(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL, *mask, *key_mask;
    sa_plan *plan = NULL;
    py_plan *a, *b;
    sa_problem p;

    if (py_call_begin(&call, module, "plan_combine", nargs, 3) < 0 ||
        !(a = py_plan_get(&call, args[0], "a")) || !(b = py_plan_get(&call, args[1], "b")) ||
        !(mask = common_mask(&call, a->mask, b->mask, "mask")) ||
        !(key_mask = common_mask(&call, a->key_mask, b->key_mask, "key_mask"))) {
        goto done;
    }
    const bool is_union =
        PyUnicode_Check(args[2]) && PyUnicode_CompareWithASCIIString(args[2], "union") == 0;
    if (!is_union && !(PyUnicode_Check(args[2]) &&
                       PyUnicode_CompareWithASCIIString(args[2], "intersection") == 0)) {
        PyErr_Format(call.state->argument, "op must be 'union' or 'intersection', got %R", args[2]);
        goto done;
    }
    if (py_plan_problem(&call, a, a->plan->heads, &p) < 0 ||
        py_masks(&call, mask, key_mask, &p) < 0) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status = sa_plan_combine(
        call.ctx, a->plan, b->plan, &p, is_union ? SA_PLAN_UNION : SA_PLAN_INTERSECTION, &plan);
    py_call_attach(&call);
    result = finish_combine(&call, status, plan, a, b, is_union, mask, key_mask);
done:
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(describe_doc, "describe(name, /)\n--\n\n"
                           "Fields of a variant: (field, type, min, max, words) each.");

static PyObject *
py_describe(PyObject *module, PyObject *name)
{
    const sa_planner *planner = find_planner(py_state_of(module), name);

    return planner ? py_fields_describe(planner->fields) : NULL;
}

PyDoc_STRVAR(variants_doc, "variants()\n--\n\nNames of all variants that the core knows.");

static PyObject *
py_variants(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return variant_names();
}

PyMethodDef py_plan_methods[] = {
    {"plan_build", PY_FAST(py_plan_build), plan_build_doc},
    {"plan_from_mask", py_plan_from_mask, METH_O, plan_from_mask_doc},
    {"plan_from_arrays", py_plan_from_arrays, METH_O, plan_from_arrays_doc},
    {"plan_combine", PY_FAST(py_plan_combine), plan_combine_doc},
    {"describe", py_describe, METH_O, describe_doc},
    {"variants", py_variants, METH_NOARGS, variants_doc},
    {NULL, NULL, 0, NULL},
};
