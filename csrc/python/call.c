/* call.c - attention across the boundary: problems, parts, attend, merge, scores, selection. */
#include "python/call.h"

#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/threads.h"
#include "engine/attend.h"
#include "engine/score.h"
#include "engine/select.h"
#include "python/arrays.h"
#include "python/plan_type.h"

int
py_masks(py_call *call, PyObject *mask, PyObject *key_mask, sa_problem *p)
{
    const unsigned flags = PY_OPTIONAL | PY_ANY_LAST;
    sa_view *v = &p->key_mask;

    if (py_view(call, mask, "mask", 4, PY_DTYPE(SA_BOOL), flags, &p->mask) < 0 ||
        py_view(call, key_mask, "key_mask", 2, PY_DTYPE(SA_BOOL), flags, v) < 0) {
        return -1;
    }
    if (v->data) { /* (1, 1, batch, n_k) to (batch, 1, 1, n_k) */
        v->size[0] = v->size[2];
        v->stride[0] = v->stride[2];
        v->size[2] = 1;
        v->stride[2] = 0;
    }
    return 0;
}

/* Dropout and sinks, where the tuple has them. */
static int
read_extras(py_call *call, PyObject *tuple, sa_problem *p)
{
    int64_t seed;
    sa_view *v = &p->sink;

    if (py_real(call, PyTuple_GET_ITEM(tuple, 6), "dropout_p", -INFINITY, INFINITY, &p->dropout_p) <
            0 ||
        py_int(call, PyTuple_GET_ITEM(tuple, 7), "seed", 0, INT64_MAX, &seed) < 0 ||
        py_view(call, PyTuple_GET_ITEM(tuple, 8), "sink", 1, PY_REAL, PY_OPTIONAL | PY_ANY_LAST,
                v) < 0) {
        return -1;
    }
    p->seed = (uint64_t)seed;
    if (v->data) { /* (1, 1, 1, heads) to (1, heads, 1, 1) */
        v->size[1] = v->size[3];
        v->stride[1] = v->stride[3];
        v->size[3] = v->stride[3] = 1;
    }
    return 0;
}

int
py_problem(py_call *call, PyObject *tuple, sa_problem *p, py_problem_arrays *arrays)
{
    const double any = INFINITY; /* the core refuses what is not finite */
    int64_t causal;

    const Py_ssize_t size = PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : 0;

    if (size != 6 && size != 9 && size != 10) {
        PyErr_SetString(call->state->dtype,
                        "problem must be a tuple (causal, scale, softcap, mask, bias, key_mask) "
                        "and perhaps (dropout_p, seed, sink) and cu_seqlens");
        return -1;
    }
    arrays->cu_seqlens = size == 10 ? PyTuple_GET_ITEM(tuple, 9) : Py_None;
    arrays->mask = PyTuple_GET_ITEM(tuple, 3);
    arrays->bias = PyTuple_GET_ITEM(tuple, 4);
    arrays->key_mask = PyTuple_GET_ITEM(tuple, 5);
    arrays->sink = size > 6 ? PyTuple_GET_ITEM(tuple, 8) : Py_None;
    if (py_int(call, PyTuple_GET_ITEM(tuple, 0), "causal", 0, 2, &causal) < 0 ||
        py_real(call, PyTuple_GET_ITEM(tuple, 1), "scale", -any, any, &p->scale) < 0 ||
        py_real(call, PyTuple_GET_ITEM(tuple, 2), "softcap", -any, any, &p->softcap) < 0 ||
        py_masks(call, arrays->mask, arrays->key_mask, p) < 0 ||
        py_view(call, arrays->bias, "bias", 4, PY_REAL, PY_OPTIONAL | PY_ANY_LAST, &p->bias) < 0 ||
        (size > 6 && read_extras(call, tuple, p) < 0)) {
        return -1;
    }
    p->causal = (sa_causal)causal;
    return py_call_status(call, sa_problem_check(call->ctx, p));
}

static bool
same_memory(const sa_view *a, const sa_view *b)
{
    return a->data == b->data && memcmp(a->size, b->size, sizeof(a->size)) == 0 &&
           memcmp(a->stride, b->stride, sizeof(a->stride)) == 0;
}

/* One plan against the masks and the causality of the call. What the call leaves out is the plan's;
 * what it gives must be what the plan was built under, because full spans never ask. */
static int
settle_masks(py_call *call, py_plan *plan, const sa_problem *given, sa_problem *p)
{
    const bool carries = plan->mask != Py_None || plan->key_mask != Py_None;
    const char *fault = NULL;
    sa_problem held = {.causal = plan->causal};

    if (py_masks(call, plan->mask, plan->key_mask, &held) < 0) {
        return -1;
    }
    if (given->causal != SA_CAUSAL_NONE && given->causal != plan->causal) {
        fault = "causal";
    } else if (!carries && plan->plan->term_mask) {
        held = *given; /* a plan from arrays takes the call's masks */
    } else if (given->mask.data && !same_memory(&given->mask, &held.mask)) {
        fault = "mask";
    } else if (given->key_mask.data && !same_memory(&given->key_mask, &held.key_mask)) {
        fault = "key_mask";
    }
    if (fault) {
        PyErr_Format(call->state->argument,
                     "%s is not the one that the plan was built under; leave it out, or build the "
                     "plan with it",
                     fault);
        return -1;
    }
    if (plan->plan->term_mask && !held.mask.data && !held.key_mask.data) {
        PyErr_SetString(call->state->argument,
                        "the plan reads a mask that it does not carry; pass that mask");
        return -1;
    }
    if ((p->mask.data && held.mask.data && !same_memory(&p->mask, &held.mask)) ||
        (p->key_mask.data && held.key_mask.data && !same_memory(&p->key_mask, &held.key_mask))) {
        PyErr_SetString(call->state->argument,
                        "parts were built under different masks; build them under one");
        return -1;
    }
    p->mask = held.mask.data ? held.mask : p->mask;
    p->key_mask = held.key_mask.data ? held.key_mask : p->key_mask;
    return 0;
}

/* The heads of one (Plan, head_begin, head_end). */
static int
read_heads(py_call *call, PyObject *entry, int64_t heads, sa_part *part)
{
    if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) != 3) {
        PyErr_SetString(call->state->dtype,
                        "each of parts must be a tuple (plan, head_begin, head_end)");
        return -1;
    }
    PyObject *const begin = PyTuple_GET_ITEM(entry, 1), *const end = PyTuple_GET_ITEM(entry, 2);
    return py_int(call, begin, "head_begin", 0, heads, &part->head_begin) < 0 ||
                   py_int(call, end, "head_end", 0, heads, &part->head_end) < 0
               ? -1
               : 0;
}

/* A Plan for all heads, or a tuple of (Plan, head_begin, head_end). The caller frees *parts. */
static int
read_parts(py_call *call, PyObject *object, sa_problem *p, sa_part **parts, int *n_parts)
{
    const bool many = PyTuple_Check(object);
    const Py_ssize_t n = many ? PyTuple_GET_SIZE(object) : 1;
    const sa_problem given = *p;

    if (n < 1 || n > Py_MAX(p->heads, 1)) {
        PyErr_Format(call->state->argument, "parts must be 1 to %lld for as many heads, got %zd",
                     (long long)p->heads, n);
        return -1;
    }
    *parts = sa_malloc_array((size_t)n, sizeof(sa_part));
    if (!*parts) {
        return py_call_status(call, SA_ENOMEM);
    }
    *n_parts = (int)n;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *entry = many ? PyTuple_GET_ITEM(object, i) : object;
        sa_part *part = &(*parts)[i];
        *part = (sa_part){.head_begin = 0, .head_end = p->heads};
        if (many) {
            if (read_heads(call, entry, p->heads, part) < 0) {
                return -1;
            }
            entry = PyTuple_GET_ITEM(entry, 0);
        }
        py_plan *plan = py_plan_get(call, entry, "plan");
        if (!plan || settle_masks(call, plan, &given, p) < 0) {
            return -1;
        }
        part->plan = plan->plan;
    }
    return 0;
}

int
py_row_view(py_call *call, PyObject *object, const char *name, unsigned dtypes, unsigned flags,
            sa_view *lse)
{
    if (py_view(call, object, name, 3, dtypes, flags | PY_ANY_LAST, lse) < 0) {
        return -1;
    }
    if (lse->data) { /* (1, B, H, n_q) to (B, H, n_q, 1) */
        memmove(lse->size, lse->size + 1, 3 * sizeof(lse->size[0]));
        memmove(lse->stride, lse->stride + 1, 3 * sizeof(lse->stride[0]));
        lse->size[3] = lse->stride[3] = 1;
    }
    return 0;
}
/* out (batch, heads, n_q, dim_v), stored as dtype or in its real type, and lse (batch, heads, n_q).
 */
static int
read_outputs(py_call *call, PyObject *out_object, PyObject *lse_object, const int64_t size[4],
             sa_dtype dtype, sa_view *out, sa_view *lse)
{
    const unsigned real = PY_DTYPE(sa_real_of(dtype));

    if (py_view(call, out_object, "out", 4, real | PY_DTYPE(dtype), PY_WRITE, out) < 0 ||
        py_row_view(call, lse_object, "lse", real, PY_OPTIONAL | PY_WRITE, lse) < 0) {
        return -1;
    }
    for (int axis = 0; axis < 4; axis++) {
        if (py_view_size(call, out, "out", axis, size[axis]) < 0 ||
            (lse->data && axis < 3 && py_view_size(call, lse, "lse", axis, size[axis]) < 0)) {
            return -1;
        }
    }
    return py_no_overlap(call, out_object, "out", lse_object, "lse");
}

/* Refuses outputs that share memory with what the kernel reads. */
static int
outputs_apart(py_call *call, PyObject *out, PyObject *lse, PyObject *const *inputs,
              const char *const *names, int n)
{
    for (int i = 0; i < n; i++) {
        if (py_no_overlap(call, out, "out", inputs[i], names[i]) < 0 ||
            py_no_overlap(call, lse, "lse", inputs[i], names[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

int
py_attend_inputs(py_call *call, PyObject *const *args, py_attend_call *in)
{
    sa_problem *p = &in->p;

    return py_view(call, args[0], "q", 4, PY_STORED, 0, &p->q) < 0 ||
                   py_view(call, args[1], "k", 4, PY_STORED, 0, &p->k) < 0 ||
                   py_view(call, args[2], "v", 4, PY_STORED, 0, &p->v) < 0 ||
                   py_problem(call, args[4], p, &in->given) < 0 ||
                   read_parts(call, args[3], p, &in->parts, &in->n_parts) < 0 ||
                   /* the plans' masks as well */
                   py_call_status(call, sa_problem_check(call->ctx, p)) < 0
               ? -1
               : 0;
}

int
py_output_apart(py_call *call, PyObject *out, const char *name, PyObject *const *args,
                const py_attend_call *in)
{
    static const char *const names[] = {"q", "k", "v", "mask", "bias", "key_mask", "sink"};
    PyObject *const inputs[] = {args[0],        args[1],        args[2],
                                in->given.mask, in->given.bias, in->given.key_mask,
                                in->given.sink};

    for (int i = 0; i < 7; i++) {
        if (py_no_overlap(call, out, name, inputs[i], names[i]) < 0) {
            return -1;
        }
    }
    const bool many = PyTuple_Check(args[3]);
    for (int i = 0; i < in->n_parts; i++) {
        PyObject *const entry = many ? PyTuple_GET_ITEM(args[3], i) : args[3];
        const py_plan *const plan = (py_plan *)(many ? PyTuple_GET_ITEM(entry, 0) : entry);
        if (py_no_overlap(call, out, name, plan->mask, "the mask of a plan") < 0 ||
            py_no_overlap(call, out, name, plan->key_mask, "the key_mask of a plan") < 0) {
            return -1;
        }
    }
    return 0;
}

PyDoc_STRVAR(attend_doc, "attend(q, k, v, parts, problem, out, lse, /)\n--\n\n"
                         "Attention over plans into out and, unless None, lse; "
                         "see sparseattn.attention.");

static PyObject *
py_attend(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    py_attend_call in = {0};
    sa_view out, lse;

    if (py_call_begin(&call, module, "attend", nargs, 7) < 0 ||
        py_attend_inputs(&call, args, &in) < 0) {
        goto done;
    }
    const sa_problem *const p = &in.p;
    const int64_t size[] = {p->batch, p->heads, p->n_q, p->dim_v};
    if (read_outputs(&call, args[5], args[6], size, p->q.dtype, &out, &lse) < 0 ||
        py_output_apart(&call, args[5], "out", args, &in) < 0 ||
        py_output_apart(&call, args[6], "lse", args, &in) < 0) {
        goto done;
    }
    py_call_detach(&call);
    const sa_status status = sa_attend(call.ctx, out, lse, p, in.parts, in.n_parts);
    py_call_attach(&call);
    if (py_call_status(&call, status) == 0) {
        result = Py_NewRef(Py_None);
    }
done:
    sa_free(in.parts);
    py_call_end(&call);
    return result;
}

/* Views of n parts; the arrays of views are the caller's to free. */
static int
read_merge_parts(py_call *call, PyObject *outs, PyObject *lses, Py_ssize_t n, sa_view *views)
{
    for (Py_ssize_t a = 0; a < n; a++) {
        if (py_view(call, PyTuple_GET_ITEM(outs, a), "outs", 4, PY_STORED, 0, &views[a]) < 0 ||
            py_row_view(call, PyTuple_GET_ITEM(lses, a), "lse", PY_REAL, 0, &views[n + a]) < 0) {
            return -1;
        }
    }
    return 0;
}

PyDoc_STRVAR(merge_doc, "merge(outs, lses, out, lse, /)\n--\n\n"
                        "Join results over disjoint keys, tuples outs and lses, into out and, "
                        "unless None, lse.");

static PyObject *
py_merge(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[] = {"outs", "lses"};
    py_call call;
    PyObject *result = NULL;
    sa_view *views = NULL, out, lse;

    if (py_call_begin(&call, module, "merge", nargs, 4) < 0) {
        goto done;
    }
    const Py_ssize_t n = PyTuple_Check(args[0]) ? PyTuple_GET_SIZE(args[0]) : 0;
    if (n < 1 || n > INT32_MAX / 2 || !PyTuple_Check(args[1]) || PyTuple_GET_SIZE(args[1]) != n) {
        PyErr_SetString(call.state->argument,
                        "outs and lses must be tuples of one length, with at least one entry");
        goto done;
    }
    views = sa_malloc_array((size_t)n, 2 * sizeof(sa_view));
    if (!views) {
        py_call_status(&call, SA_ENOMEM);
        goto done;
    }
    if (read_merge_parts(&call, args[0], args[1], n, views) < 0 ||
        read_outputs(&call, args[2], args[3], views[0].size, views[0].dtype, &out, &lse) < 0) {
        goto done;
    }
    for (Py_ssize_t a = 0; a < n; a++) {
        PyObject *const inputs[] = {PyTuple_GET_ITEM(args[0], a), PyTuple_GET_ITEM(args[1], a)};
        if (outputs_apart(&call, args[2], args[3], inputs, names, 2) < 0) {
            goto done;
        }
    }
    py_call_detach(&call);
    const sa_status status = sa_merge(call.ctx, out, lse, views, views + n, (int)n);
    py_call_attach(&call);
    if (py_call_status(&call, status) == 0) {
        result = Py_NewRef(Py_None);
    }
done:
    sa_free(views);
    py_call_end(&call);
    return result;
}

enum { SCORE_ROWS = 64 }; /* between two looks at the stop flag */

static sa_status
score_chunks(sa_ctx *ctx, const sa_problem *p, const int64_t at[4], char *out)
{
    const int64_t rows = SA_MIN(SCORE_ROWS, at[3] - at[2]);
    const size_t row_bytes = (size_t)p->n_k * sa_real_size(p->q.dtype);
    sa_status status = sa_scratch_reserve(ctx, sa_score_rows_scratch(p, rows));

    for (int64_t i = at[2]; i < at[3] && status == SA_OK; i += rows) {
        const int64_t end = SA_MIN(i + rows, at[3]);
        status = sa_stop_asked(ctx, 0)
                     ? SA_ESTOP
                     : sa_score_rows(ctx, 0, p, at[0], at[1], i, end, 0, p->n_k,
                                     out + (size_t)(i - at[2]) * row_bytes, p->n_k);
    }
    return status;
}

PyDoc_STRVAR(score_rows_doc, "score_rows(q, k, problem, b, h, i0, i1, /)\n--\n\n"
                             "Scores of query rows i0 to i1 of one head, (i1 - i0, n_k): soft-cap, "
                             "bias and masks, not causality.");

static PyObject *
py_score_rows(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    sa_problem p = {0};
    py_problem_arrays given;
    int64_t at[4];

    if (py_call_begin(&call, module, "score_rows", nargs, 7) < 0 ||
        py_view(&call, args[0], "q", 4, PY_STORED, 0, &p.q) < 0 ||
        py_view(&call, args[1], "k", 4, PY_STORED, 0, &p.k) < 0 ||
        py_problem(&call, args[2], &p, &given) < 0 ||
        py_int(&call, args[3], "b", 0, p.batch - 1, &at[0]) < 0 ||
        py_int(&call, args[4], "h", 0, p.heads - 1, &at[1]) < 0 ||
        py_int(&call, args[5], "i0", 0, p.n_q, &at[2]) < 0 ||
        py_int(&call, args[6], "i1", at[2], p.n_q, &at[3]) < 0) {
        goto done;
    }
    npy_intp shape[] = {at[3] - at[2], p.n_k};
    result = PyArray_SimpleNew(2, shape, p.q.dtype == SA_F64 ? NPY_DOUBLE : NPY_FLOAT);
    if (!result) {
        goto done;
    }
    char *const out = PyArray_DATA((PyArrayObject *)result);
    py_call_detach(&call);
    const sa_status status = score_chunks(call.ctx, &p, at, out);
    py_call_attach(&call);
    if (py_call_status(&call, status) < 0) {
        Py_CLEAR(result);
    }
done:
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(select_largest_doc,
             "select_largest(s, count, /)\n--\n\n"
             "int32 indices of the count largest of s, ascending; ties to the lower index.");

static PyObject *
py_select_largest(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    void *scratch = NULL;
    int32_t *index = NULL;
    int64_t count;
    sa_view s;

    if (py_call_begin(&call, module, "select_largest", nargs, 2) < 0 ||
        py_view(&call, args[0], "s", 1, PY_REAL, 0, &s) < 0 ||
        py_int(&call, args[1], "count", 0, SA_MAX_KEYS, &count) < 0) {
        goto done;
    }
    if (s.size[3] > SA_MAX_KEYS) {
        PyErr_Format(call.state->argument, "s must have at most %lld entries, got %lld",
                     (long long)SA_MAX_KEYS, (long long)s.size[3]);
        goto done;
    }
    count = SA_MIN(count, s.size[3]);
    scratch = sa_malloc(sa_select_scratch(s.size[3], count));
    index = sa_malloc_array((size_t)count, sizeof(*index));
    if (!scratch || !index) {
        py_call_status(&call, SA_ENOMEM);
        goto done;
    }
    py_call_detach(&call);
    npy_intp found = s.dtype == SA_F64
                         ? sa_select_largest_f64(s.data, s.size[3], count, index, scratch)
                         : sa_select_largest_f32(s.data, s.size[3], count, index, scratch);
    py_call_attach(&call);
    result = PyArray_SimpleNew(1, &found, NPY_INT32);
    if (result) {
        memcpy(PyArray_DATA((PyArrayObject *)result), index, (size_t)found * sizeof(*index));
    }
done:
    sa_free(index);
    sa_free(scratch);
    py_call_end(&call);
    return result;
}

PyMethodDef py_call_methods[] = {
    {"attend", PY_FAST(py_attend), attend_doc},
    {"merge", PY_FAST(py_merge), merge_doc},
    {"score_rows", PY_FAST(py_score_rows), score_rows_doc},
    {"select_largest", PY_FAST(py_select_largest), select_largest_doc},
    {NULL, NULL, 0, NULL},
};
