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

/* -1 where the problem packs several: their plans are made one by one, then packed. */
static int
one_sequence(py_call *call, const py_problem_arrays *given)
{
    if (given->cu_seqlens != Py_None) {
        PyErr_SetString(call->state->argument,
                        "the problem has cu_seqlens, and plan_build plans one sequence; "
                        "use plan_pack on the plans of all");
        return -1;
    }
    return 0;
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
    if (py_view(&call, args[3], "q", 4, PY_STORED, 0, &p.q) < 0 ||
        py_view(&call, args[4], "k", 4, PY_STORED, 0, &p.k) < 0 ||
        py_problem(&call, args[5], &p, &given) < 0 || one_sequence(&call, &given) < 0 ||
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

/* The plans of a tuple, for the caller to free; NULL with an exception. *causal: what all of them
 * were made under, or none. */
static const sa_plan **
read_plans(py_call *call, PyObject *tuple, sa_causal *causal)
{
    const Py_ssize_t n = PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : 0;

    if (n < 1) {
        PyErr_SetString(call->state->dtype, "plans must be a tuple of Plans, at least one");
        return NULL;
    }
    const sa_plan **plans = sa_malloc_array((size_t)n, sizeof(*plans));
    if (!plans) {
        py_call_status(call, SA_ENOMEM);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        py_plan *plan = py_plan_get(call, PyTuple_GET_ITEM(tuple, i), "each of plans");
        if (!plan) {
            sa_free(plans);
            return NULL;
        }
        plans[i] = plan->plan;
        *causal = i == 0 || *causal == plan->causal ? plan->causal : SA_CAUSAL_NONE;
    }
    return plans;
}

/* Masks that a packed plan carries: as large as the whole call. */
static int
check_masks(py_call *call, PyObject *mask, PyObject *key_mask, const sa_plan *plan)
{
    sa_problem p = {0};

    if (py_masks(call, mask, key_mask, &p) < 0) {
        return -1;
    }
    const int64_t size[] = {plan->batch, plan->heads, plan->n_q, plan->n_k};
    for (int axis = 0; axis < 4; axis++) {
        if (p.mask.data && py_view_size(call, &p.mask, "mask", axis, size[axis]) < 0) {
            return -1;
        }
    }
    return p.key_mask.data && (py_view_size(call, &p.key_mask, "key_mask", 0, plan->batch) < 0 ||
                               py_view_size(call, &p.key_mask, "key_mask", 3, plan->n_k) < 0)
               ? -1
               : 0;
}

PyDoc_STRVAR(plan_pack_doc,
             "plan_pack(plans, mask, key_mask, /)\n--\n\n"
             "One Plan of a tuple of plans, one sequence after the other; the masks, of the whole\n"
             "call, are those whose parts the plans were made under, or None.");

static PyObject *
py_plan_pack(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    const sa_plan **plans = NULL;
    sa_causal causal = SA_CAUSAL_NONE;
    sa_plan *plan = NULL;

    if (py_call_begin(&call, module, "plan_pack", nargs, 3) < 0 ||
        !(plans = read_plans(&call, args[0], &causal))) {
        goto done;
    }
    const Py_ssize_t n = PyTuple_GET_SIZE(args[0]);
    py_call_detach(&call);
    const sa_status status = sa_plan_pack(call.ctx, plans, n, &plan);
    py_call_attach(&call);
    if (status == SA_OK && check_masks(&call, args[1], args[2], plan) < 0) {
        sa_plan_free(plan);
        goto done;
    }
    result = finish(&call, status, plan, causal, args[1], args[2]);
done:
    sa_free(plans);
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(plan_from_intervals_doc,
             "plan_from_intervals(lo, hi, n_k, batch, heads, /)\n--\n\n"
             "The Plan of intervals: row i of batch entry b sees lo[b, i] <= j < hi[b, i]. lo and\n"
             "hi are int64 (batch or 1, n_q).");

static PyObject *
py_plan_from_intervals(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    sa_problem p = {.scale = 1};
    sa_plan *plan = NULL;
    sa_view lo, hi;

    if (py_call_begin(&call, module, "plan_from_intervals", nargs, 5) < 0 ||
        py_view(&call, args[0], "lo", 2, PY_DTYPE(SA_I64), PY_CONTIGUOUS, &lo) < 0 ||
        py_view(&call, args[1], "hi", 2, PY_DTYPE(SA_I64), PY_CONTIGUOUS, &hi) < 0 ||
        py_int(&call, args[2], "n_k", 0, SA_MAX_KEYS, &p.n_k) < 0 ||
        py_int(&call, args[3], "batch", 0, INT64_MAX, &p.batch) < 0 ||
        py_int(&call, args[4], "heads", 1, INT64_MAX, &p.heads) < 0 ||
        py_view_size(&call, &hi, "hi", 2, lo.size[2]) < 0 ||
        py_view_size(&call, &hi, "hi", 3, lo.size[3]) < 0) {
        goto done;
    }
    p.kv_heads = p.heads;
    p.n_q = lo.size[3];
    py_call_detach(&call);
    const sa_status status =
        sa_plan_from_intervals(call.ctx, &p, lo.size[2], lo.data, hi.data, &plan);
    py_call_attach(&call);
    result = finish(&call, status, plan, SA_CAUSAL_NONE, Py_None, Py_None);
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
    {"plan_from_intervals", PY_FAST(py_plan_from_intervals), plan_from_intervals_doc},
    {"plan_combine", PY_FAST(py_plan_combine), plan_combine_doc},
    {"plan_pack", PY_FAST(py_plan_pack), plan_pack_doc},
    {"describe", py_describe, METH_O, describe_doc},
    {"variants", py_variants, METH_NOARGS, variants_doc},
    {NULL, NULL, 0, NULL},
};
