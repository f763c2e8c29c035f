/* weights.c - what becomes of attention's weights across the boundary: mass of keys, largest of
 * rows. */
#include "python/arrays.h"
#include "python/call.h"

#include "base/alloc.h"
#include "engine/received.h"

/* q, k, v, parts, problem, as attend takes them, and lse. */
static int
read_weights(py_call *call, PyObject *const *args, py_attend_call *in, sa_view *lse)
{
    if (py_attend_inputs(call, args, in) < 0 ||
        py_row_view(call, args[5], "lse", PY_DTYPE(sa_real_of(in->p.q.dtype)), 0, lse) < 0) {
        return -1;
    }
    const int64_t size[] = {in->p.batch, in->p.heads, in->p.n_q};
    for (int axis = 0; axis < 3; axis++) {
        if (py_view_size(call, lse, "lse", axis, size[axis]) < 0) {
            return -1;
        }
    }
    return 0;
}

/* -1 unless the output has these sizes and shares no memory with what is read. */
static int
check_output(py_call *call, PyObject *const *args, int at, const char *name,
             const py_attend_call *in, const sa_view *view, int64_t rows)
{
    const int64_t size[] = {in->p.batch, in->p.heads, rows};

    for (int axis = 0; axis < 3; axis++) {
        if (py_view_size(call, view, name, axis, size[axis]) < 0) {
            return -1;
        }
    }
    return py_output_apart(call, args[at], name, args, in) < 0 ||
                   py_no_overlap(call, args[at], name, args[5], "lse") < 0
               ? -1
               : 0;
}

PyDoc_STRVAR(attend_mass_doc,
             "attend_mass(q, k, v, parts, problem, lse, mass, /)\n--\n\n"
             "What each key received of the weights of that call, whose lse it is, into mass "
             "(batch, heads, n_k); values of v are not read.");

static PyObject *
py_attend_mass(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    py_attend_call in = {0};
    sa_view lse, mass;

    if (py_call_begin(&call, module, "attend_mass", nargs, 7) < 0 ||
        read_weights(&call, args, &in, &lse) < 0 ||
        py_row_view(&call, args[6], "mass", PY_DTYPE(lse.dtype), PY_WRITE, &mass) < 0 ||
        check_output(&call, args, 6, "mass", &in, &mass, in.p.n_k) < 0) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status = sa_received(call.ctx, mass, lse, &in.p, in.parts, in.n_parts);
    py_call_attach(&call);
    if (py_call_status(&call, status) == 0) {
        result = Py_NewRef(Py_None);
    }
done:
    sa_free(in.parts);
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(attend_topn_doc,
             "attend_topn(q, k, v, parts, problem, lse, values, indices, /)\n--\n\n"
             "The largest weights of each row of that call, whose lse it is, and their keys, into "
             "values and indices (batch, heads, n_q, n); values of v are not read.");

static PyObject *
py_attend_topn(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    py_attend_call in = {0};
    sa_view lse, value, index;

    if (py_call_begin(&call, module, "attend_topn", nargs, 8) < 0 ||
        read_weights(&call, args, &in, &lse) < 0 ||
        py_view(&call, args[6], "values", 4, PY_DTYPE(lse.dtype), PY_WRITE, &value) < 0 ||
        py_view(&call, args[7], "indices", 4, PY_DTYPE(SA_I64), PY_WRITE, &index) < 0 ||
        check_output(&call, args, 6, "values", &in, &value, in.p.n_q) < 0 ||
        check_output(&call, args, 7, "indices", &in, &index, in.p.n_q) < 0 ||
        py_view_size(&call, &index, "indices", 3, value.size[3]) < 0 ||
        py_no_overlap(&call, args[7], "indices", args[6], "values") < 0) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status = sa_topn(call.ctx, value, index, lse, &in.p, in.parts, in.n_parts);
    py_call_attach(&call);
    if (py_call_status(&call, status) == 0) {
        result = Py_NewRef(Py_None);
    }
done:
    sa_free(in.parts);
    py_call_end(&call);
    return result;
}

PyMethodDef py_weight_methods[] = {
    {"attend_mass", PY_FAST(py_attend_mass), attend_mass_doc},
    {"attend_topn", PY_FAST(py_attend_topn), attend_topn_doc},
    {NULL, NULL, 0, NULL},
};
