/* grads.c - the backward of attention across the boundary. */
#include "python/arrays.h"
#include "python/call.h"

#include "base/alloc.h"
#include "engine/attend_grad.h"

/* One output of the backward, or None; apart from everything that is read. */
static int
read_grad(py_call *call, PyObject *const *args, int at, const char *name, const py_attend_call *in,
          unsigned flags, sa_view *view)
{
    static const char *const names[] = {"dout", "lse", "delta", "dq", "dk", "dv"};
    const unsigned real =
        PY_DTYPE(sa_real_of(in->p.q.dtype)) | (flags & PY_SUMS ? PY_DTYPE(SA_F64) : 0);

    if (py_view(call, args[at], name, 4, real, PY_OPTIONAL | PY_WRITE | flags, view) < 0 ||
        py_output_apart(call, args[at], name, args, in) < 0) {
        return -1;
    }
    for (int other = 5; other < at; other++) {
        if (py_no_overlap(call, args[at], name, args[other], names[other - 5]) < 0) {
            return -1;
        }
    }
    return 0;
}

PyDoc_STRVAR(attend_grad_doc,
             "attend_grad(q, k, v, parts, problem, dout, lse, delta, dq, dk, dv, dbias, /)\n--\n\n"
             "Gradients of attend into dq, dk, dv, and added to dbias (strides 0 where bias was "
             "broadcast); None leaves one out. dout None stands for zeros.");

static PyObject *
py_attend_grad(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    py_attend_call in = {0};
    sa_attend_grads g = {0};

    if (py_call_begin(&call, module, "attend_grad", nargs, 12) < 0 ||
        py_attend_inputs(&call, args, &in) < 0 ||
        py_view(&call, args[5], "dout", 4, PY_STORED, PY_OPTIONAL, &g.dout) < 0 ||
        py_row_view(&call, args[6], "lse", PY_REAL, 0, &g.lse) < 0 ||
        py_row_view(&call, args[7], "delta", PY_REAL, 0, &g.delta) < 0 ||
        read_grad(&call, args, 8, "dq", &in, 0, &g.dq) < 0 ||
        read_grad(&call, args, 9, "dk", &in, 0, &g.dk) < 0 ||
        read_grad(&call, args, 10, "dv", &in, 0, &g.dv) < 0 ||
        read_grad(&call, args, 11, "dbias", &in, PY_ANY_LAST | PY_SUMS, &g.dbias) < 0) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status = sa_attend_grad(call.ctx, &g, &in.p, in.parts, in.n_parts);
    py_call_attach(&call);
    if (py_call_status(&call, status) == 0) {
        result = Py_NewRef(Py_None);
    }
done:
    sa_free(in.parts);
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(attend_delta_doc, "attend_delta(out, dout, dlse, delta, /)\n--\n\n"
                               "Row sums of dout out, less dlse (or None), into delta.");

static PyObject *
py_attend_delta(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    sa_view out, dout, dlse, delta;

    if (py_call_begin(&call, module, "attend_delta", nargs, 4) < 0 ||
        py_view(&call, args[0], "out", 4, PY_STORED, 0, &out) < 0 ||
        py_view(&call, args[1], "dout", 4, PY_STORED, 0, &dout) < 0 ||
        py_row_view(&call, args[2], "dlse", PY_REAL, PY_OPTIONAL, &dlse) < 0 ||
        py_row_view(&call, args[3], "delta", PY_REAL, PY_WRITE, &delta) < 0 ||
        py_no_overlap(&call, args[3], "delta", args[0], "out") < 0 ||
        py_no_overlap(&call, args[3], "delta", args[1], "dout") < 0 ||
        py_no_overlap(&call, args[3], "delta", args[2], "dlse") < 0) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status = sa_attend_delta(call.ctx, delta, out, dout, dlse);
    py_call_attach(&call);
    if (py_call_status(&call, status) == 0) {
        result = Py_NewRef(Py_None);
    }
done:
    py_call_end(&call);
    return result;
}

PyMethodDef py_grad_methods[] = {
    {"attend_grad", PY_FAST(py_attend_grad), attend_grad_doc},
    {"attend_delta", PY_FAST(py_attend_delta), attend_delta_doc},
    {NULL, NULL, 0, NULL},
};
