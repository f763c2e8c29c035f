/* bench.c - what only the benchmarks call. */
#include "python/module.h"

#include <stdatomic.h>

#include "base/clock.h"
#include "base/threads.h"
#include "engine/problem.h"
#include "engine/select.h"
#include "python/arrays.h"
#include "tile/tile.h"

enum { READ_PIECE = 4096, READ_FEW = 8 }; /* how attend cuts the keys of a decode */

static double
seconds(void)
{
    return 1e-9 * (double)sa_clock_ns();
}

/* Tasks that do nothing, but wait for each other: without that the caller would be through before
 * any worker looked up, and the figure would not be that of a fork and a join. */
typedef struct {
    int64_t n_tasks;
    atomic_llong met;
} meeting;

static sa_status
meet_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    meeting *const m = arg;
    const long long here = atomic_fetch_add(&m->met, 1),
                    all = here - here % m->n_tasks + m->n_tasks;

    (void)ctx, (void)task, (void)worker;
    for (int patience = 1 << 16; patience > 0 && atomic_load(&m->met) < all; patience--) {
    }
    return SA_OK;
}

PyDoc_STRVAR(bench_dispatch_doc,
             "bench_dispatch(rounds, n_tasks, /)\n--\n\n"
             "Seconds of one parallel region of n_tasks tasks that only wait for each other.\n\n"
             "With n_tasks equal to the number of threads every thread takes part.");

static PyObject *
py_bench_dispatch(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    meeting m = {0};
    int64_t rounds;

    if (py_call_begin(&call, module, "bench_dispatch", nargs, 2) < 0 ||
        py_int(&call, args[0], "rounds", 1, INT32_MAX, &rounds) < 0 ||
        py_int(&call, args[1], "n_tasks", 1, SA_MAX_THREADS, &m.n_tasks) < 0) {
        goto done;
    }
    py_call_detach(&call);
    sa_status status = SA_OK;
    const double begin = seconds();
    for (int64_t r = 0; r < rounds && status == SA_OK; r++) {
        status = sa_parallel(call.ctx, m.n_tasks, meet_task, &m);
    }
    const double taken = seconds() - begin;
    py_call_attach(&call);
    if (py_call_status(&call, status) == 0) {
        result = PyFloat_FromDouble(taken / (double)rounds);
    }
done:
    py_call_end(&call);
    return result;
}

typedef struct {
    int64_t rounds;
    double flops[SA_MAX_THREADS];
} fma_work;

static sa_status
fma_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    fma_work *work = arg;

    (void)ctx, (void)worker;
    work->flops[task] = sa_tile_for(false)->fma_peak(work->rounds);
    return SA_OK;
}

PyDoc_STRVAR(bench_fma_doc,
             "bench_fma(rounds, threads, /)\n--\n\n"
             "Float32 flops per second of a register-only multiply-add loop on that many threads.");

static PyObject *
py_bench_fma(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    fma_work work = {0};
    int64_t threads;

    if (py_call_begin(&call, module, "bench_fma", nargs, 2) < 0 ||
        py_int(&call, args[0], "rounds", 1, INT64_MAX, &work.rounds) < 0 ||
        py_int(&call, args[1], "threads", 1, SA_MAX_THREADS, &threads) < 0) {
        goto done;
    }
    py_call_detach(&call);
    const int before = sa_num_threads();
    double flops = 0;
    sa_num_threads_set((int)threads);
    const double begin = seconds();
    const sa_status status = sa_parallel(call.ctx, threads, fma_task, &work);
    const double taken = seconds() - begin;
    sa_num_threads_set(before);
    for (int64_t t = 0; t < threads; t++) {
        flops += work.flops[t];
    }
    py_call_attach(&call);
    if (py_call_status(&call, status) == 0) {
        result = PyFloat_FromDouble(flops / taken);
    }
done:
    py_call_end(&call);
    return result;
}

/* All of k and v, of which batch and heads make `heads` contiguous runs of rows. */
typedef struct {
    sa_view k, v;
    int64_t heads, pieces, piece;
} reading;

static double
read_rows(const sa_view *a, int64_t head, int64_t begin, int64_t end)
{
    const char *row = sa_view_row(*a, head / a->size[1], head % a->size[1], begin);
    const int64_t bytes = (end - begin) * a->size[3] * (int64_t)sa_dtype_size(a->dtype);
    return sa_tile_for(false)->read_sum(row, bytes / (int64_t)sizeof(float));
}

static sa_status
read_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const reading *r = arg;
    const int64_t head = task / r->pieces, begin = task % r->pieces * r->piece;
    const int64_t end = SA_MIN(begin + r->piece, r->k.size[2]);
    volatile double sum = 0; /* keeps the loops */

    (void)ctx, (void)worker;
    sum = read_rows(&r->k, head, begin, end);
    sum = sum + read_rows(&r->v, head, begin, end);
    return SA_OK;
}

static bool
lies_whole(const sa_view *a, int axis)
{
    return a->size[axis] <= 1 || a->stride[axis] == a->stride[axis + 1] * a->size[axis + 1];
}

PyDoc_STRVAR(bench_read_doc,
             "bench_read(k, v, threads, /)\n--\n\n"
             "Seconds that a plain sum over all of k and v takes on that many threads.\n\n"
             "Both are contiguous (batch, kv_heads, n_k, width); their bytes are read as float32,\n"
             "cut into tasks as attention cuts the keys of one query row.");

static PyObject *
py_bench_read(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    reading r = {.pieces = 1};
    int64_t threads;

    if (py_call_begin(&call, module, "bench_read", nargs, 3) < 0 ||
        py_view(&call, args[0], "k", 4, PY_STORED, 0, &r.k) < 0 ||
        py_view(&call, args[1], "v", 4, PY_STORED, 0, &r.v) < 0 ||
        py_int(&call, args[2], "threads", 1, SA_MAX_THREADS, &threads) < 0) {
        goto done;
    }
    for (int axis = 0; axis < 3; axis++) {
        if (r.k.size[axis] != r.v.size[axis] || !lies_whole(&r.k, axis) ||
            !lies_whole(&r.v, axis)) {
            PyErr_SetString(call.state->argument,
                            "k and v must be contiguous arrays of the same number of rows");
            goto done;
        }
    }
    r.heads = r.k.size[0] * r.k.size[1];
    r.piece = r.k.size[2];
    if (r.heads < READ_FEW && r.piece > READ_PIECE) {
        r.pieces = (r.piece + READ_PIECE - 1) / READ_PIECE;
        r.piece = READ_PIECE;
    }
    py_call_detach(&call);
    const int before = sa_num_threads();
    sa_num_threads_set((int)threads);
    const double begin = seconds();
    const sa_status status = sa_parallel(call.ctx, r.heads * r.pieces, read_task, &r);
    const double taken = seconds() - begin;
    sa_num_threads_set(before);
    py_call_attach(&call);
    if (py_call_status(&call, status) == 0) {
        result = PyFloat_FromDouble(taken);
    }
done:
    py_call_end(&call);
    return result;
}

PyDoc_STRVAR(bench_select_doc,
             "bench_select(rows, count, quick, /)\n--\n\n"
             "Seconds a row takes to give its count largest; quick: by quickselect on a copy.\n\n"
             "rows is a contiguous float32 array of shape (rows, n).");

static PyObject *
py_bench_select(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    py_call call;
    PyObject *result = NULL;
    void *scratch = NULL;
    int32_t *index = NULL;
    sa_view s;
    int64_t count, quick;

    if (py_call_begin(&call, module, "bench_select", nargs, 3) < 0 ||
        py_view(&call, args[0], "rows", 2, PY_REAL, 0, &s) < 0 ||
        py_int(&call, args[1], "count", 1, SA_MAX_KEYS, &count) < 0 ||
        py_int(&call, args[2], "quick", 0, 1, &quick) < 0) {
        goto done;
    }
    if (s.dtype != SA_F32 || s.size[2] < 1 || count > s.size[3] || s.size[3] > SA_MAX_KEYS) {
        PyErr_SetString(call.state->argument,
                        "rows must be a float32 array of rows of at least count entries");
        goto done;
    }
    scratch = sa_malloc(sa_select_scratch(s.size[3], count));
    index = sa_malloc_array((size_t)count, sizeof(*index));
    if (!scratch || !index) {
        py_call_status(&call, SA_ENOMEM);
        goto done;
    }
    py_call_detach(&call);
    const double begin = seconds();
    for (int64_t r = 0; r < s.size[2]; r++) {
        const float *row = sa_view_row(s, 0, 0, r);
        (quick ? sa_select_quick_f32 : sa_select_largest_f32)(row, s.size[3], count, index,
                                                              scratch);
    }
    const double taken = seconds() - begin;
    py_call_attach(&call);
    result = PyFloat_FromDouble(taken / (double)s.size[2]);
done:
    sa_free(index);
    sa_free(scratch);
    py_call_end(&call);
    return result;
}

PyMethodDef py_bench_methods[] = {
    {"bench_dispatch", PY_FAST(py_bench_dispatch), bench_dispatch_doc},
    {"bench_fma", PY_FAST(py_bench_fma), bench_fma_doc},
    {"bench_read", PY_FAST(py_bench_read), bench_read_doc},
    {"bench_select", PY_FAST(py_bench_select), bench_select_doc},
    {NULL, NULL, 0, NULL},
};
