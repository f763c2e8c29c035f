/* ops.c - operators of models across the boundary: checked views in, one C function each. */
#include "python/arrays.h"

#include <string.h>

#include "engine/gemm.h"
#include "grad/ops.h"

/* -1 unless the array has x's dtype. */
static int
same_dtype(py_call *call, const sa_view *view, const char *arg, const sa_view *x)
{
    if (view->data == NULL || view->dtype == x->dtype) {
        return 0;
    }
    PyErr_Format(call->state->dtype, "%s must have the dtype of x, %s; use %s.astype(x.dtype)", arg,
                 x->dtype == SA_F64 ? "float64" : "float32", arg);
    return -1;
}

/* A contiguous real array of n_axes axes. */
static int
read_dense(py_call *call, PyObject *object, const char *arg, int n_axes, unsigned flags,
           sa_view *view)
{
    return py_view(call, object, arg, n_axes, PY_REAL, flags | PY_CONTIGUOUS, view);
}

/* A contiguous array of x's dtype and, over its n_axes last axes, of x's shape. */
static int
read_like(py_call *call, PyObject *object, const char *arg, int n_axes, unsigned flags,
          const sa_view *x, sa_view *view)
{
    if (read_dense(call, object, arg, n_axes, flags, view) < 0 ||
        same_dtype(call, view, arg, x) < 0) {
        return -1;
    }
    for (int a = 4 - n_axes; view->data && a < 4; a++) {
        if (py_view_size(call, view, arg, a, x->size[a]) < 0) {
            return -1;
        }
    }
    return 0;
}

/* The output may be the input itself, element on element, but not overlap it in part. */
static int
same_or_apart(py_call *call, PyObject *out, const sa_view *out_view, PyObject *in,
              const sa_view *in_view, const char *in_name)
{
    if (in_view->data == NULL || in_view->data == out_view->data) {
        return 0;
    }
    return py_no_overlap(call, out, "out", in, in_name);
}

static PyObject *
finish(py_call *call, sa_status status)
{
    return py_call_status(call, status) == 0 ? Py_NewRef(Py_None) : NULL;
}

/* The views and sizes of linear's arguments. */
static int
read_linear(py_call *call, PyObject *const *args, sa_gemm_args *g)
{
    sa_view x, w, bias, out;
    const int transposed = PyObject_IsTrue(args[4]);

    if (transposed < 0 || py_view(call, args[0], "x", 2, PY_REAL, 0, &x) < 0 ||
        py_view(call, args[1], "w", 2, PY_STORED, 0, &w) < 0 ||
        read_dense(call, args[2], "bias", 1, PY_OPTIONAL, &bias) < 0 ||
        py_view(call, args[3], "out", 2, PY_REAL, PY_WRITE, &out) < 0) {
        return -1;
    }
    const int64_t n = w.size[transposed ? 2 : 3];
    if (py_view_size(call, &w, "w", transposed ? 3 : 2, x.size[3]) < 0 ||
        py_view_size(call, &out, "out", 2, x.size[2]) < 0 ||
        py_view_size(call, &out, "out", 3, n) < 0 ||
        (bias.data && py_view_size(call, &bias, "bias", 3, n) < 0) ||
        same_dtype(call, &out, "out", &x) < 0 || same_dtype(call, &bias, "bias", &x) < 0 ||
        (w.dtype <= SA_F64 && same_dtype(call, &w, "w", &x) < 0) ||
        py_no_overlap(call, args[3], "out", args[0], "x") < 0 ||
        py_no_overlap(call, args[3], "out", args[1], "w") < 0 ||
        py_no_overlap(call, args[3], "out", args[2], "bias") < 0) {
        return -1;
    }
    *g = (sa_gemm_args){
        .m = x.size[2],
        .n = n,
        .k = x.size[3],
        .dtype = x.dtype,
        .b_dtype = w.dtype,
        .a = x.data,
        .lda = x.stride[2],
        .b = w.data,
        .ldb = w.stride[2],
        .b_transposed = transposed,
        .c = out.data,
        .ldc = out.stride[2],
        .bias = bias.data,
    };
    return 0;
}

PyDoc_STRVAR(
    linear_doc,
    "linear(x, w, bias, out, transposed, /)\n--\n\n"
    "out = x @ w (+ bias), or x @ w.T where transposed. x (rows, k), out (rows, n); w of x's "
    "dtype, float16, or uint16 for bfloat16; bias (n,) or None.");

static PyObject *
py_linear(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    sa_gemm_args g;

    if (py_call_begin(&call, module, "linear", nargs, 5) < 0 || read_linear(&call, args, &g) < 0) {
        goto done;
    }
    sa_gemm_prepare(); /* with the GIL: no other Python thread changes the environment meanwhile */
    py_call_detach(&call);
    const sa_status status = sa_gemm(call.ctx, &g);
    py_call_attach(&call);
    result = finish(&call, status);
done:
    py_call_end(&call);
    return result;
}

/* x, out and the width's weight and bias of either norm. */
typedef struct {
    sa_view x, weight, bias, out;
    double eps;
} norm_args;

static int
read_norm(py_call *call, PyObject *x, PyObject *weight, PyObject *bias, PyObject *eps,
          PyObject *out, unsigned weight_flags, norm_args *n)
{
    if (read_dense(call, x, "x", 2, 0, &n->x) < 0 ||
        read_dense(call, weight, "weight", 1, weight_flags, &n->weight) < 0 ||
        read_dense(call, bias, "bias", 1, PY_OPTIONAL, &n->bias) < 0 ||
        py_real(call, eps, "eps", 0, 1e300, &n->eps) < 0 ||
        read_like(call, out, "out", 2, PY_WRITE, &n->x, &n->out) < 0 ||
        same_dtype(call, &n->weight, "weight", &n->x) < 0 ||
        same_dtype(call, &n->bias, "bias", &n->x) < 0 ||
        (n->weight.data && py_view_size(call, &n->weight, "weight", 3, n->x.size[3]) < 0) ||
        (n->bias.data && py_view_size(call, &n->bias, "bias", 3, n->x.size[3]) < 0) ||
        same_or_apart(call, out, &n->out, x, &n->x, "x") < 0 ||
        py_no_overlap(call, out, "out", weight, "weight") < 0 ||
        py_no_overlap(call, out, "out", bias, "bias") < 0) {
        return -1;
    }
    return 0;
}

PyDoc_STRVAR(rms_norm_doc,
             "rms_norm(x, weight, eps, out, /)\n--\n\n"
             "out = x weight / sqrt(mean(x^2) + eps) for every row of x (rows, dim).");

static PyObject *
py_rms_norm(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    norm_args n;

    if (py_call_begin(&call, module, "rms_norm", nargs, 4) < 0 ||
        read_norm(&call, args[0], args[1], Py_None, args[2], args[3], 0, &n) < 0) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status = sa_op_rms_norm(call.ctx, n.x.dtype, n.out.data, n.x.data,
                                            n.weight.data, n.x.size[2], n.x.size[3], n.eps);
    py_call_attach(&call);
    result = finish(&call, status);
done:
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(layer_norm_doc,
             "layer_norm(x, weight, bias, eps, out, /)\n--\n\n"
             "out = (x - mean) / sqrt(var + eps) weight + bias for every row of x (rows, dim); "
             "weight and bias may be None.");

static PyObject *
py_layer_norm(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    norm_args n;

    if (py_call_begin(&call, module, "layer_norm", nargs, 5) < 0 ||
        read_norm(&call, args[0], args[1], args[2], args[3], args[4], PY_OPTIONAL, &n) < 0) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status =
        sa_op_layer_norm(call.ctx, n.x.dtype, n.out.data, n.x.data, n.weight.data, n.bias.data,
                         n.x.size[2], n.x.size[3], n.eps);
    py_call_attach(&call);
    result = finish(&call, status);
done:
    py_call_end(&call);
    return result;
}

static int
read_activation(py_call *call, PyObject *kind, sa_activation *act)
{
    static const char *const names[] = {"gelu_tanh", "gelu", "silu", "relu"};

    for (int i = 0; PyUnicode_Check(kind) && i < 4; i++) {
        if (PyUnicode_CompareWithASCIIString(kind, names[i]) == 0) {
            *act = (sa_activation)i;
            return 0;
        }
    }
    PyErr_Format(call->state->argument,
                 "kind must be 'gelu_tanh', 'gelu', 'silu' or 'relu', got %R", kind);
    return -1;
}

PyDoc_STRVAR(activate_doc, "activate(kind, x, gate, out, /)\n--\n\n"
                           "out = kind(x), times gate unless that is None; arrays (rows, dim). "
                           "kind: 'gelu_tanh', 'gelu', 'silu' or 'relu'.");

static PyObject *
py_activate(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    sa_activation act;
    sa_view x, gate, out;

    if (py_call_begin(&call, module, "activate", nargs, 4) < 0 ||
        read_activation(&call, args[0], &act) < 0 ||
        read_dense(&call, args[1], "x", 2, 0, &x) < 0 ||
        read_like(&call, args[2], "gate", 2, PY_OPTIONAL, &x, &gate) < 0 ||
        read_like(&call, args[3], "out", 2, PY_WRITE, &x, &out) < 0 ||
        same_or_apart(&call, args[3], &out, args[1], &x, "x") < 0 ||
        same_or_apart(&call, args[3], &out, args[2], &gate, "gate") < 0) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status =
        sa_op_activate(call.ctx, x.dtype, act, out.data, x.data, gate.data, x.size[2] * x.size[3]);
    py_call_attach(&call);
    result = finish(&call, status);
done:
    py_call_end(&call);
    return result;
}

static int
read_rope(py_call *call, PyObject *const *args, sa_view *x, sa_view *cosine, sa_view *sine,
          sa_view *pos)
{
    if (read_dense(call, args[0], "x", 3, PY_WRITE, x) < 0 ||
        read_dense(call, args[1], "cos", 2, 0, cosine) < 0 ||
        same_dtype(call, cosine, "cos", x) < 0 ||
        read_dense(call, args[2], "sin", 2, 0, sine) < 0 || same_dtype(call, sine, "sin", x) < 0 ||
        py_view_size(call, sine, "sin", 2, cosine->size[2]) < 0 ||
        py_view_size(call, sine, "sin", 3, cosine->size[3]) < 0 ||
        py_view(call, args[3], "pos", 1, PY_DTYPE(SA_I32), PY_CONTIGUOUS, pos) < 0 ||
        py_view_size(call, pos, "pos", 3, x->size[1]) < 0 ||
        py_no_overlap(call, args[0], "x", args[1], "cos") < 0 ||
        py_no_overlap(call, args[0], "x", args[2], "sin") < 0 ||
        py_no_overlap(call, args[0], "x", args[3], "pos") < 0) {
        return -1;
    }
    if (cosine->size[3] > x->size[3] / 2) {
        PyErr_Format(call->state->argument,
                     "cos turns %lld pairs of channels, but x has only %lld channels a head",
                     (long long)cosine->size[3], (long long)x->size[3]);
        return -1;
    }
    return 0;
}

PyDoc_STRVAR(rope_doc, "rope(x, cos, sin, pos, /)\n--\n\n"
                       "Turn the first channels of x (rows, heads, dim) in place, rotate-half, by "
                       "the angles in rows pos[row] of cos and sin (positions, rotary / 2).");

static PyObject *
py_rope(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    sa_view x, cosine, sine, pos;

    if (py_call_begin(&call, module, "rope", nargs, 4) < 0 ||
        read_rope(&call, args, &x, &cosine, &sine, &pos) < 0) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status =
        sa_op_rope(call.ctx, x.dtype, x.data, cosine.data, sine.data, pos.data, cosine.size[2],
                   x.size[1], x.size[2], x.size[3], 2 * cosine.size[3]);
    py_call_attach(&call);
    result = finish(&call, status);
done:
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(add_doc, "add(x, z, out, /)\n--\n\n"
                      "out = x + z, arrays (rows, dim); out may be x or z.");

static PyObject *
py_add(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    sa_view x, z, out;

    if (py_call_begin(&call, module, "add", nargs, 3) < 0 ||
        read_dense(&call, args[0], "x", 2, 0, &x) < 0 ||
        read_like(&call, args[1], "z", 2, 0, &x, &z) < 0 ||
        read_like(&call, args[2], "out", 2, PY_WRITE, &x, &out) < 0 ||
        same_or_apart(&call, args[2], &out, args[0], &x, "x") < 0 ||
        same_or_apart(&call, args[2], &out, args[1], &z, "z") < 0) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status =
        sa_op_add(call.ctx, x.dtype, out.data, x.data, z.data, x.size[2] * x.size[3]);
    py_call_attach(&call);
    result = finish(&call, status);
done:
    py_call_end(&call);
    return result;
}

/* Rows of at least one logit; their count fits the int32 of an arg-max. */
static int
check_vocab(py_call *call, const sa_view *logits, const char *arg)
{
    if (logits->size[3] >= 1 && logits->size[3] <= INT32_MAX) {
        return 0;
    }
    PyErr_Format(call->state->argument, "%s must have between 1 and 2147483647 columns, got %lld",
                 arg, (long long)logits->size[3]);
    return -1;
}

PyDoc_STRVAR(nll_doc, "nll(logits, target, /)\n--\n\n"
                      "(-log softmax(row)[target] as float64, arg-max as int32) for every row of "
                      "logits (rows, vocabulary).");

static PyObject *
py_nll(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL, *nll = NULL, *best = NULL;
    sa_view logits, target;

    if (py_call_begin(&call, module, "nll", nargs, 2) < 0 ||
        read_dense(&call, args[0], "logits", 2, 0, &logits) < 0 ||
        check_vocab(&call, &logits, "logits") < 0 ||
        py_view(&call, args[1], "target", 1, PY_DTYPE(SA_I32), PY_CONTIGUOUS, &target) < 0 ||
        py_view_size(&call, &target, "target", 3, logits.size[2]) < 0) {
        goto done;
    }
    npy_intp rows = (npy_intp)logits.size[2];
    nll = PyArray_SimpleNew(1, &rows, NPY_DOUBLE);
    best = nll ? PyArray_SimpleNew(1, &rows, NPY_INT32) : NULL;
    if (nll == NULL || best == NULL) {
        goto done;
    }
    double *const nll_data = PyArray_DATA((PyArrayObject *)nll);
    int32_t *const best_data = PyArray_DATA((PyArrayObject *)best);
    py_call_detach(&call);
    const sa_status status = sa_op_nll(call.ctx, logits.dtype, nll_data, best_data, logits.data,
                                       target.data, logits.size[2], logits.size[3]);
    py_call_attach(&call);
    if (py_call_status(&call, status) == 0) {
        result = PyTuple_Pack(2, nll, best);
    }
done:
    Py_XDECREF(nll);
    Py_XDECREF(best);
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(sample_doc,
             "sample(logits, u, temperature, top_k, top_p, /)\n--\n\n"
             "A token (int32) for every row of logits (rows, vocabulary), float32, by the uniform "
             "number u (rows,), float64, of [0, 1). temperature 0: the largest; top_k 0 and top_p "
             "1: all.");

static PyObject *
py_sample(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL, *token = NULL;
    sa_view logits, u;
    sa_sampling how;

    if (py_call_begin(&call, module, "sample", nargs, 5) < 0 ||
        py_view(&call, args[0], "logits", 2, PY_DTYPE(SA_F32), PY_CONTIGUOUS, &logits) < 0 ||
        check_vocab(&call, &logits, "logits") < 0 ||
        py_view(&call, args[1], "u", 1, PY_DTYPE(SA_F64), PY_CONTIGUOUS, &u) < 0 ||
        py_view_size(&call, &u, "u", 3, logits.size[2]) < 0 ||
        py_real(&call, args[2], "temperature", 0, 1e300, &how.temperature) < 0 ||
        py_int(&call, args[3], "top_k", 0, INT32_MAX, &how.top_k) < 0 ||
        py_real(&call, args[4], "top_p", 0, 1, &how.top_p) < 0) {
        goto done;
    }
    how.top_k = how.top_k == 0 ? logits.size[3] : how.top_k;
    npy_intp rows = (npy_intp)logits.size[2];
    token = PyArray_SimpleNew(1, &rows, NPY_INT32);
    if (token == NULL) {
        goto done;
    }
    int32_t *const tokens = PyArray_DATA((PyArrayObject *)token);
    py_call_detach(&call);
    const sa_status status =
        sa_op_sample(call.ctx, tokens, logits.data, u.data, logits.size[2], logits.size[3], how);
    py_call_attach(&call);
    if (py_call_status(&call, status) == 0) {
        result = Py_NewRef(token);
    }
done:
    Py_XDECREF(token);
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(kl_doc, "kl(base, other, /)\n--\n\n"
                     "KL(softmax(base) || softmax(other)) in nats, float64, for every row of two "
                     "arrays of logits (rows, vocabulary).");

static PyObject *
py_kl(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL, *kl = NULL;
    sa_view base, other;

    if (py_call_begin(&call, module, "kl", nargs, 2) < 0 ||
        read_dense(&call, args[0], "base", 2, 0, &base) < 0 ||
        check_vocab(&call, &base, "base") < 0 ||
        read_like(&call, args[1], "other", 2, 0, &base, &other) < 0) {
        goto done;
    }
    npy_intp rows = (npy_intp)base.size[2];
    kl = PyArray_SimpleNew(1, &rows, NPY_DOUBLE);
    if (kl == NULL) {
        goto done;
    }
    double *const kl_data = PyArray_DATA((PyArrayObject *)kl);
    py_call_detach(&call);
    const sa_status status =
        sa_op_kl(call.ctx, base.dtype, kl_data, base.data, other.data, base.size[2], base.size[3]);
    py_call_attach(&call);
    if (py_call_status(&call, status) == 0) {
        result = Py_NewRef(kl);
    }
done:
    Py_XDECREF(kl);
    py_call_end(&call);
    return result;
}

static int
read_half(py_call *call, PyObject *kind, sa_dtype *dtype)
{
    if (PyUnicode_Check(kind) && PyUnicode_CompareWithASCIIString(kind, "f16") == 0) {
        *dtype = SA_F16;
        return 0;
    }
    if (PyUnicode_Check(kind) && PyUnicode_CompareWithASCIIString(kind, "bf16") == 0) {
        *dtype = SA_BF16;
        return 0;
    }
    PyErr_Format(call->state->argument, "kind must be 'f16' or 'bf16', got %R", kind);
    return -1;
}

PyDoc_STRVAR(widen_doc, "widen(src, kind, out, /)\n--\n\n"
                        "Bit patterns src (n,) of uint16 as float32 in out (n,); kind: 'f16' or "
                        "'bf16'.");

static PyObject *
py_widen(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    sa_view src, out;
    sa_dtype kind;

    if (py_call_begin(&call, module, "widen", nargs, 3) < 0 ||
        py_view(&call, args[0], "src", 1, PY_DTYPE(SA_BF16), PY_CONTIGUOUS, &src) < 0 ||
        py_view(&call, args[2], "out", 1, PY_DTYPE(SA_F32), PY_CONTIGUOUS | PY_WRITE, &out) < 0 ||
        py_view_size(&call, &out, "out", 3, src.size[3]) < 0 ||
        py_no_overlap(&call, args[2], "out", args[0], "src") < 0 ||
        read_half(&call, args[1], &kind) < 0) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status = sa_op_widen(call.ctx, out.data, src.data, kind, src.size[3]);
    py_call_attach(&call);
    result = finish(&call, status);
done:
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(narrow_doc, "narrow(src, kind, out, /)\n--\n\n"
                         "src (n,) of float32, rounded to nearest even, in out (n,); kind: 'f16', "
                         "into float16 or uint16, or 'bf16', into uint16.");

static PyObject *
py_narrow(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    sa_view src, out;
    sa_dtype kind;

    if (py_call_begin(&call, module, "narrow", nargs, 3) < 0 ||
        py_view(&call, args[0], "src", 1, PY_DTYPE(SA_F32), PY_CONTIGUOUS, &src) < 0 ||
        read_half(&call, args[1], &kind) < 0 ||
        py_view(&call, args[2], "out", 1, PY_DTYPE(kind) | PY_DTYPE(SA_BF16),
                PY_CONTIGUOUS | PY_WRITE, &out) < 0 ||
        py_view_size(&call, &out, "out", 3, src.size[3]) < 0 ||
        py_no_overlap(&call, args[2], "out", args[0], "src") < 0) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status = sa_op_narrow(call.ctx, out.data, kind, src.data, src.size[3]);
    py_call_attach(&call);
    result = finish(&call, status);
done:
    py_call_end(&call);
    return result;
}

PyMethodDef sa_ops_methods[] = {
    {"linear", PY_FAST(py_linear), linear_doc},
    {"rms_norm", PY_FAST(py_rms_norm), rms_norm_doc},
    {"layer_norm", PY_FAST(py_layer_norm), layer_norm_doc},
    {"activate", PY_FAST(py_activate), activate_doc},
    {"rope", PY_FAST(py_rope), rope_doc},
    {"add", PY_FAST(py_add), add_doc},
    {"nll", PY_FAST(py_nll), nll_doc},
    {"sample", PY_FAST(py_sample), sample_doc},
    {"kl", PY_FAST(py_kl), kl_doc},
    {"widen", PY_FAST(py_widen), widen_doc},
    {"narrow", PY_FAST(py_narrow), narrow_doc},
    {0},
};
