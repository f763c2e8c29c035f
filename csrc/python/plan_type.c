/* plan_type.c - the type Plan: sizes as attributes, the mask it stands for, what it counts. */
#include "python/plan_type.h"

#include <string.h>

#include "base/threads.h"
#include "python/arrays.h"
#include "python/call.h"

PyObject *
py_plan_new(py_call *call, sa_plan *plan, sa_causal causal, PyObject *mask, PyObject *key_mask)
{
    py_plan *self = PyObject_New(py_plan, call->state->plan_type);

    if (!self) {
        sa_plan_free(plan);
        return NULL;
    }
    self->plan = plan;
    self->causal = causal;
    self->mask = Py_NewRef(mask);
    self->key_mask = Py_NewRef(key_mask);
    return (PyObject *)self;
}

static void
plan_dealloc(PyObject *object)
{
    py_plan *self = (py_plan *)object;
    PyTypeObject *type = Py_TYPE(object);

    sa_plan_free(self->plan);
    Py_DECREF(self->mask);
    Py_DECREF(self->key_mask);
    PyObject_Free(object);
    Py_DECREF(type);
}

py_plan *
py_plan_get(py_call *call, PyObject *object, const char *arg)
{
    if (!PyObject_TypeCheck(object, call->state->plan_type)) {
        PyErr_Format(call->state->dtype, "%s must be a Plan, got %s", arg,
                     Py_TYPE(object)->tp_name);
        return NULL;
    }
    return py_call_hold(call, object) < 0 ? NULL : (py_plan *)object;
}

int
py_plan_problem(py_call *call, py_plan *self, int64_t kv_heads, sa_problem *p)
{
    memset(p, 0, sizeof(*p));
    p->causal = self->causal;
    p->batch = self->plan->batch;
    p->heads = self->plan->heads;
    p->kv_heads = kv_heads;
    p->n_q = self->plan->n_q;
    p->n_k = self->plan->n_k;
    if (py_masks(call, self->mask, self->key_mask, p) < 0) {
        return -1;
    }
    if (self->plan->term_mask && !p->mask.data && !p->key_mask.data) {
        PyErr_SetString(call->state->argument,
                        "the plan reads a mask that it does not carry; build it with that mask");
        return -1;
    }
    return 0;
}

PyDoc_STRVAR(
    to_mask_doc,
    "to_mask($self, /)\n--\n\nbool array (batch, heads, n_q, n_k): which keys a row sees.");

static PyObject *
plan_to_mask(PyObject *object, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    py_plan *self = (py_plan *)object;
    const sa_plan *plan = self->plan;
    npy_intp shape[] = {plan->batch, plan->heads, plan->n_q, plan->n_k};
    PyObject *result = NULL;
    sa_problem p;
    py_call call;

    if (py_call_begin(&call, PyType_GetModule(Py_TYPE(object)), "to_mask", nargs, 0) < 0 ||
        py_plan_problem(&call, self, plan->heads, &p) < 0) {
        goto done;
    }
    result = PyArray_SimpleNew(4, shape, NPY_BOOL);
    if (!result) {
        goto done;
    }
    unsigned char *out = PyArray_DATA((PyArrayObject *)result);
    const int64_t n_maps = PyArray_SIZE((PyArrayObject *)result) ? plan->batch * plan->heads : 0;
    sa_status status = SA_OK;
    py_call_detach(&call);
    for (int64_t m = 0; m < n_maps && status == SA_OK; m++) {
        status = sa_stop_asked(call.ctx, 0)
                     ? SA_ESTOP
                     : sa_plan_to_mask(call.ctx, plan, &p, m / plan->heads, m % plan->heads,
                                       out + m * plan->n_q * plan->n_k);
    }
    py_call_attach(&call);
    if (py_call_status(&call, status) < 0) {
        Py_CLEAR(result);
    }
done:
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(
    count_doc,
    "count($self, kv_heads, /)\n--\n\n"
    "(kept, visible, union_rows) over all batches and heads: pairs that the plan shows, pairs\n"
    "that causality and masks alone would show, K or V rows that an ideal reader must read.");

static PyObject *
plan_count(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    py_plan *self = (py_plan *)object;
    sa_plan_counts counts = {0};
    PyObject *result = NULL;
    int64_t kv_heads;
    sa_problem p;
    py_call call;

    if (py_call_begin(&call, PyType_GetModule(Py_TYPE(object)), "count", nargs, 1) < 0 ||
        py_int(&call, args[0], "kv_heads", 1, Py_MAX(self->plan->heads, 1), &kv_heads) < 0 ||
        py_plan_problem(&call, self, kv_heads, &p) < 0) {
        goto done;
    }
    if (self->plan->heads % kv_heads != 0) {
        PyErr_Format(call.state->argument, "kv_heads must divide the plan's %lld heads, got %lld",
                     (long long)self->plan->heads, (long long)kv_heads);
        goto done;
    }
    py_call_detach(&call);
    const sa_status status = sa_plan_count(call.ctx, self->plan, &p, &counts);
    py_call_attach(&call);
    if (py_call_status(&call, status) == 0) {
        result = Py_BuildValue("(LLL)", (long long)counts.kept, (long long)counts.visible,
                               (long long)counts.union_rows);
    }
done:
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(arrays_doc,
             "arrays($self, /)\n--\n\nCopies of every scalar and array of the plan, as a dict.");

static PyObject *
plan_arrays(PyObject *object, PyObject *Py_UNUSED(none))
{
    return py_plan_write(((py_plan *)object)->plan);
}

static PyObject *
get_count(PyObject *object, void *offset)
{
    const char *plan = (const char *)((py_plan *)object)->plan;

    return PyLong_FromLongLong(*(const int64_t *)(plan + (uintptr_t)offset));
}

static PyObject *
get_small(PyObject *object, void *offset)
{
    const char *plan = (const char *)((py_plan *)object)->plan;

    return PyLong_FromLong(*(const int32_t *)(plan + (uintptr_t)offset));
}

static PyObject *
get_nbytes(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(sa_plan_bytes(((py_plan *)object)->plan));
}

static PyObject *
get_term_mask(PyObject *object, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(((py_plan *)object)->plan->term_mask);
}

#define AT(member) (void *)offsetof(sa_plan, member)

static PyGetSetDef plan_getset[] = {
    {"n_q", get_count, NULL, "Query rows.", AT(n_q)},
    {"n_k", get_count, NULL, "Keys.", AT(n_k)},
    {"batch", get_count, NULL, "Batch entries.", AT(batch)},
    {"heads", get_count, NULL, "Query heads.", AT(heads)},
    {"n_maps", get_count, NULL, "Maps: structures that heads or batch entries share.", AT(n_maps)},
    {"n_blocks", get_count, NULL, "Row blocks of a map.", AT(n_blocks)},
    {"rows_per_block", get_small, NULL, "Rows that share a list of spans.", AT(rows_per_block)},
    {"heads_per_map", get_small, NULL, "Query heads that share a map.", AT(heads_per_map)},
    {"nbytes", get_nbytes, NULL, "Bytes of all arrays.", NULL},
    {"term_mask", get_term_mask, NULL, "Whether a mask is read where spans are clipped.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef plan_methods[] = {
    {"to_mask", PY_FAST(plan_to_mask), to_mask_doc},
    {"count", PY_FAST(plan_count), count_doc},
    {"arrays", plan_arrays, METH_NOARGS, arrays_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(plan_doc, "Which keys each query row sees; made by plan_build and its like.");

static PyType_Slot plan_slots[] = {
    {Py_tp_dealloc, plan_dealloc},
    {Py_tp_doc, (void *)plan_doc},
    {Py_tp_methods, plan_methods},
    {Py_tp_getset, plan_getset},
    {0, NULL},
};

PyType_Spec py_plan_spec = {
    .name = "sparseattn._core.Plan",
    .basicsize = sizeof(py_plan),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = plan_slots,
};
