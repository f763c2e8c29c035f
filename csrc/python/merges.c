/* merges.c - the gradient of merge across the boundary. */
#include "python/call.h"

#include "python/arrays.h"

PyDoc_STRVAR(merge_grad_doc,
             "merge_grad(out_a, lse_a, out, lse, dout, dlse, dout_a, dlse_a, /)\n--\n\n"
             "Gradients of one part of merge into dout_a and dlse_a; dout or dlse "
             "None stands for zeros.");

static PyObject *
py_merge_grad(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"out_a", "lse_a", "out", "lse", "dout", "dlse"};
    py_call call;
    PyObject *result = NULL;
    sa_view out_a, lse_a, out, lse, dout, dlse, dout_a, dlse_a;

    if (py_call_begin(&call, module, "merge_grad", nargs, 8) < 0 ||
        py_view(&call, args[0], "out_a", 4, PY_STORED, 0, &out_a) < 0 ||
        py_row_view(&call, args[1], "lse_a", PY_REAL, 0, &lse_a) < 0 ||
        py_view(&call, args[2], "out", 4, PY_STORED, 0, &out) < 0 ||
        py_row_view(&call, args[3], "lse", PY_REAL, 0, &lse) < 0 ||
        py_view(&call, args[4], "dout", 4, PY_STORED, PY_OPTIONAL, &dout) < 0 ||
        py_row_view(&call, args[5], "dlse", PY_REAL, PY_OPTIONAL, &dlse) < 0 ||
        py_view(&call, args[6], "dout_a", 4, PY_STORED, PY_WRITE, &dout_a) < 0 ||
        py_row_view(&call, args[7], "dlse_a", PY_REAL, PY_WRITE, &dlse_a) < 0 ||
        py_no_overlap(&call, args[6], "dout_a", args[7], "dlse_a") < 0) {
        goto done;
    }
    for (int at = 0; at < 6; at++) {
        if (py_no_overlap(&call, args[6], "dout_a", args[at], names[at]) < 0 ||
            py_no_overlap(&call, args[7], "dlse_a", args[at], names[at]) < 0) {
            goto done;
        }
    }
    py_call_detach(&call);
    const sa_status status =
        sa_merge_grad(call.ctx, dout_a, dlse_a, dout, dlse, out, lse, out_a, lse_a);
    py_call_attach(&call);
    if (py_call_status(&call, status) == 0) {
        result = Py_NewRef(Py_None);
    }
done:
    py_call_end(&call);
    return result;
}

PyMethodDef py_merge_methods[] = {
    {"merge_grad", PY_FAST(py_merge_grad), merge_grad_doc},
    {NULL, NULL, 0, NULL},
};
