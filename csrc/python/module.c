/* module.c - the module itself: exceptions, types, tables, and the life of one crossing. */
#define SA_IMPORT_NUMPY
#include "python/arrays.h"

#include <math.h>
#include <string.h>

#include "engine/gemm.h"

#ifndef SA_VERSION
#define SA_VERSION "0"
#endif
#ifndef SA_BLAS_LIBRARY
#define SA_BLAS_LIBRARY ""
#endif

static int
finalizing(void)
{
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing();
#else
    return _Py_IsFinalizing();
#endif
}

/* The poll of every context: nonzero when a signal handler raised. The caller is detached. */
static int
poll_signals(void *arg)
{
    py_call *call = arg;

    if (finalizing()) {
        return 1; /* taking the GIL would end this thread inside the pool */
    }
    py_call_attach(call);
    const int raised = PyErr_CheckSignals();
    py_call_detach(call);
    return raised;
}

int
py_call_begin(py_call *call, PyObject *module, const char *name, Py_ssize_t nargs,
              Py_ssize_t wanted)
{
    memset(call, 0, sizeof(*call));
    call->state = py_state_of(module);
    if (nargs != wanted) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd positional arguments but %zd were given",
                     name, wanted, nargs);
        return -1;
    }
    call->ctx = sa_ctx_acquire();
    if (!call->ctx) {
        PyErr_Format(call->state->memory, "there is no memory for the context of %s", name);
        return -1;
    }
    call->ctx->poll = poll_signals;
    call->ctx->poll_arg = call;
    return 0;
}

int
py_call_hold(py_call *call, PyObject *object)
{
    if (!call->held) {
        call->held = PyList_New(0);
    }
    return call->held ? PyList_Append(call->held, object) : -1;
}

void
py_call_detach(py_call *call)
{
    call->thread = PyEval_SaveThread();
}

void
py_call_attach(py_call *call)
{
    PyEval_RestoreThread(call->thread);
}

int
py_call_status(py_call *call, sa_status status)
{
    const py_state *state = call->state;
    PyObject *const kinds[] = {
        [SA_OK] = NULL,
        [SA_EINVAL] = state->argument,
        [SA_ETYPE] = state->dtype,
        [SA_ENOMEM] = state->memory,
        [SA_ESTOP] = state->internal,
        [SA_EINTERNAL] = state->internal,
    };

    if (PyErr_Occurred()) {
        return -1; /* a signal handler raised, perhaps in the last task of all */
    }
    if (status == SA_OK) {
        return 0;
    }
    const char *words = call->ctx->message[0] ? call->ctx->message
                        : status == SA_ENOMEM ? "out of memory"
                                              : "stopped without a reason";
    PyErr_SetString(kinds[status], words);
    return -1;
}

void
py_call_end(py_call *call)
{
    if (call->ctx) {
        call->ctx->poll = NULL;
        sa_ctx_release(call->ctx);
    }
    Py_CLEAR(call->held);
}

int
py_int(py_call *call, PyObject *object, const char *arg, int64_t min, int64_t max, int64_t *value)
{
    int overflow = 0;
    PyObject *index = PyNumber_Index(object);

    if (!index) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Format(call->state->dtype, "%s must be an integer, got %R", arg, object);
        }
        return -1;
    }
    *value = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (overflow || *value < min || *value > max) {
        PyErr_Format(call->state->argument, "%s must be in [%lld, %lld], got %R", arg,
                     (long long)min, (long long)max, object);
        return -1;
    }
    return 0;
}

int
py_real(py_call *call, PyObject *object, const char *arg, double min, double max, double *value)
{
    *value = PyFloat_AsDouble(object);
    if (PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Format(call->state->dtype, "%s must be a number, got %R", arg, object);
        }
        return -1;
    }
    const bool any = isinf(min) && isinf(max);
    if (!any && !(*value >= min && *value <= max)) {
        PyObject *range = Py_BuildValue("[dd]", min, max);
        if (range) {
            PyErr_Format(call->state->argument, "%s must be in %R, got %R", arg, range, object);
        }
        Py_XDECREF(range);
        return -1;
    }
    return 0;
}

/* Adds sparseattn.errors.<name>(SparseAttnError, builtin) and keeps it in *slot. */
static int
add_error(PyObject *module, PyObject **slot, const char *name, const char *doc, PyObject *root,
          PyObject *builtin)
{
    char full[64];
    PyObject *bases = root ? PyTuple_Pack(2, root, builtin) : PyTuple_Pack(1, builtin);

    if (!bases) {
        return -1;
    }
    PyOS_snprintf(full, sizeof(full), "sparseattn.errors.%s", name);
    *slot = PyErr_NewExceptionWithDoc(full, doc, bases, NULL);
    Py_DECREF(bases);
    return *slot ? PyModule_AddObjectRef(module, name, *slot) : -1;
}

static int
add_errors(PyObject *module, py_state *s)
{
    if (add_error(module, &s->error, "SparseAttnError", "Root of all errors of sparseattn.", NULL,
                  PyExc_Exception) < 0 ||
        add_error(module, &s->argument, "ArgumentError", "A value or a shape is wrong.", s->error,
                  PyExc_ValueError) < 0 ||
        add_error(module, &s->dtype, "DtypeError", "A type or a dtype is wrong.", s->error,
                  PyExc_TypeError) < 0 ||
        add_error(module, &s->memory, "OutOfMemory", "There was no memory; no output was written.",
                  s->error, PyExc_MemoryError) < 0) {
        return -1;
    }
    return add_error(module, &s->internal, "InternalError", "A fault of sparseattn itself.",
                     s->error, PyExc_RuntimeError);
}

#ifdef _WIN32
#define SLASHES "/\\"
#else
#define SLASHES "/"
#endif

static Py_ssize_t
folder_length(const char *path)
{
    const char *name = path;

    for (const char *at; (at = strpbrk(name, SLASHES)); name = at + 1) {
    }
    return name - path;
}

/* Tells the core where OpenBLAS lies: a relative name with a slash counts from the module. */
static int
find_blas(PyObject *module)
{
    const char *name = SA_BLAS_LIBRARY;

    if (name[0] == '\0') {
        return 0;
    }
    if (name[0] == '/' || name[1] == ':' || !strchr(name, '/')) {
        sa_blas_path_set(name);
        return 0;
    }
    PyObject *file = PyObject_GetAttrString(module, "__file__"), *path = NULL;
    if (!file) {
        PyErr_Clear(); /* loaded by hand: tiles serve until set_blas_path is called */
        return 0;
    }
    if (PyUnicode_FSConverter(file, &path)) {
        if (_PyBytes_Resize(&path, folder_length(PyBytes_AS_STRING(path))) == 0) {
            PyBytes_ConcatAndDel(&path, PyBytes_FromString(name));
        }
    }
    if (path) {
        sa_blas_path_set(PyBytes_AS_STRING(path));
    }
    Py_DECREF(file);
    Py_XDECREF(path);
    return PyErr_Occurred() ? -1 : 0;
}

static int
module_exec(PyObject *module)
{
    py_state *state = py_state_of(module);

    import_array1(-1);
    if (add_errors(module, state) < 0) {
        return -1;
    }
    state->plan_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &py_plan_spec, NULL);
    if (!state->plan_type || PyModule_AddType(module, state->plan_type) < 0 ||
        PyModule_AddFunctions(module, py_call_methods) < 0 ||
        PyModule_AddFunctions(module, py_plan_methods) < 0 ||
        PyModule_AddFunctions(module, py_runtime_methods) < 0 ||
        PyModule_AddFunctions(module, py_bench_methods) < 0 ||
        PyModule_AddFunctions(module, py_grad_methods) < 0 ||
        PyModule_AddFunctions(module, py_merge_methods) < 0 ||
        PyModule_AddFunctions(module, py_weight_methods) < 0 ||
        PyModule_AddFunctions(module, sa_ops_methods) < 0 ||
        PyModule_AddStringConstant(module, "__version__", SA_VERSION) < 0) {
        return -1;
    }
    return find_blas(module);
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    py_state *state = py_state_of(module);

    Py_VISIT(state->error);
    Py_VISIT(state->argument);
    Py_VISIT(state->dtype);
    Py_VISIT(state->memory);
    Py_VISIT(state->internal);
    Py_VISIT(state->plan_type);
    return 0;
}

static int
module_clear(PyObject *module)
{
    py_state *state = py_state_of(module);

    Py_CLEAR(state->error);
    Py_CLEAR(state->argument);
    Py_CLEAR(state->dtype);
    Py_CLEAR(state->memory);
    Py_CLEAR(state->internal);
    Py_CLEAR(state->plan_type);
    return 0;
}

static void
module_free(void *module)
{
    module_clear((PyObject *)module);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED}, /* no state is shared but the core's own; not tested yet */
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "sparseattn._core",
    .m_doc = "The C core of sparseattn: plans, attention over plans, operators of models.",
    .m_size = sizeof(py_state),
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC
PyInit__core(void)
{
    return PyModuleDef_Init(&module_def);
}
