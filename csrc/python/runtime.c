/* runtime.c - what runs: threads, instruction set, BLAS, memory. */
#include "python/module.h"

#include <string.h>

#include "base/alloc.h"
#include "base/cpu.h"
#include "base/threads.h"
#include "engine/gemm.h"

PyDoc_STRVAR(num_threads_doc,
             "num_threads()\n--\n\nThreads that kernels use, the caller included.");

static PyObject *
py_num_threads(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromLong(sa_num_threads());
}

PyDoc_STRVAR(set_num_threads_doc,
             "set_num_threads(n, /)\n--\n\nUse n threads from the next kernel on.");

static PyObject *
py_set_num_threads(PyObject *module, PyObject *object)
{
    py_call call = {.state = py_state_of(module)};
    int64_t count;

    if (py_int(&call, object, "n", 1, SA_MAX_THREADS, &count) < 0) {
        return NULL;
    }
    sa_num_threads_set((int)count);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(isa_doc, "isa()\n--\n\nThe instruction set in force.");

static PyObject *
py_isa(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyUnicode_FromString(sa_isa_name(sa_isa_now()));
}

PyDoc_STRVAR(isas_doc, "isas()\n--\n\nThe instruction sets of this machine that can be set.");

static PyObject *
py_isas(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    PyObject *list = PyList_New(0);

    for (int i = 0; list && i < SA_ISA_COUNT; i++) {
        if (sa_isa_has((sa_isa)i)) {
            PyObject *name = PyUnicode_FromString(sa_isa_name((sa_isa)i));
            if (!name || PyList_Append(list, name) < 0) {
                Py_CLEAR(list);
            }
            Py_XDECREF(name);
        }
    }
    return list;
}

PyDoc_STRVAR(set_isa_doc, "set_isa(name, /)\n--\n\nRun on another instruction set; for tests.");

static PyObject *
py_set_isa(PyObject *module, PyObject *object)
{
    const char *name = PyUnicode_Check(object) ? PyUnicode_AsUTF8(object) : "";

    if (!name) {
        return NULL;
    }
    for (int i = 0; i < SA_ISA_COUNT; i++) {
        if (strcmp(name, sa_isa_name((sa_isa)i)) == 0 && sa_isa_set((sa_isa)i)) {
            Py_RETURN_NONE;
        }
    }
    PyObject *names = py_isas(module, NULL);
    if (names) {
        PyErr_Format(py_state_of(module)->argument, "set_isa: name must be one of %R, got %R",
                     names, object);
        Py_DECREF(names);
    }
    return NULL;
}

PyDoc_STRVAR(
    isa_refused_doc,
    "isa_refused()\n--\n\nThe word in SPARSEATTN_ISA that could not be followed, or None.");

static PyObject *
py_isa_refused(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    const char *word = sa_isa_refused();

    if (!word) {
        Py_RETURN_NONE;
    }
    return PyUnicode_DecodeFSDefault(word);
}

PyDoc_STRVAR(blas_config_doc,
             "blas_config()\n--\n\nWhat makes large products: OpenBLAS's own words, or 'tiles'.");

static PyObject *
py_blas_config(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyUnicode_DecodeFSDefault(sa_blas_config());
}

PyDoc_STRVAR(
    set_blas_path_doc,
    "set_blas_path(path, /)\n--\n\nThe OpenBLAS library to open at first use; None: none.");

static PyObject *
py_set_blas_path(PyObject *Py_UNUSED(module), PyObject *object)
{
    PyObject *path = NULL;

    if (object == Py_None) {
        sa_blas_path_set(NULL);
        Py_RETURN_NONE;
    }
    if (!PyUnicode_FSConverter(object, &path)) {
        return NULL;
    }
    sa_blas_path_set(PyBytes_AS_STRING(path));
    Py_DECREF(path);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(live_bytes_doc, "live_bytes()\n--\n\nBytes that the core holds now.");

static PyObject *
py_live_bytes(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromLongLong(sa_live_bytes());
}

PyDoc_STRVAR(peak_bytes_doc, "peak_bytes()\n--\n\nThe most the core held since peak_reset().");

static PyObject *
py_peak_bytes(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromLongLong(sa_peak_bytes());
}

PyDoc_STRVAR(peak_reset_doc, "peak_reset()\n--\n\nBegin a new peak at what is held now.");

static PyObject *
py_peak_reset(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    sa_peak_reset();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(poison_doc,
             "poison(on, /)\n--\n\nFill new and freed memory with a pattern; for tests.");

static PyObject *
py_poison(PyObject *Py_UNUSED(module), PyObject *object)
{
    const int on = PyObject_IsTrue(object);

    if (on < 0) {
        return NULL;
    }
    sa_poison_set(on != 0);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(fail_set_doc,
             "fail_set(n, /)\n--\n\nLet the n-th next allocation fail; 0 lets none. For tests.");

static PyObject *
py_fail_set(PyObject *module, PyObject *object)
{
    py_call call = {.state = py_state_of(module)};
    int64_t nth;

    if (py_int(&call, object, "n", 0, INT64_MAX, &nth) < 0) {
        return NULL;
    }
    sa_fail_set(nth);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(failed_sites_doc,
             "failed_sites()\n--\n\nPlaces in the sources that fail_set has let fail, ever.");

static PyObject *
py_failed_sites(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    PyObject *list = PyList_New(0);

    for (int i = 0; list && sa_failed_site(i); i++) {
        PyObject *site = PyUnicode_FromString(sa_failed_site(i));
        if (!site || PyList_Append(list, site) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(site);
    }
    return list;
}

PyDoc_STRVAR(breaches_doc, "breaches()\n--\n\n"
                           "Writes past the end of memory, seen since poison was on; for tests.");

static PyObject *
py_breaches(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromLongLong(sa_breaches());
}

PyDoc_STRVAR(trim_doc, "trim()\n--\n\nFree the scratch memory kept between calls.");

static PyObject *
py_trim(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    sa_scratch_trim();
    Py_RETURN_NONE;
}

PyMethodDef py_runtime_methods[] = {
    {"num_threads", py_num_threads, METH_NOARGS, num_threads_doc},
    {"set_num_threads", py_set_num_threads, METH_O, set_num_threads_doc},
    {"isa", py_isa, METH_NOARGS, isa_doc},
    {"isas", py_isas, METH_NOARGS, isas_doc},
    {"set_isa", py_set_isa, METH_O, set_isa_doc},
    {"isa_refused", py_isa_refused, METH_NOARGS, isa_refused_doc},
    {"blas_config", py_blas_config, METH_NOARGS, blas_config_doc},
    {"set_blas_path", py_set_blas_path, METH_O, set_blas_path_doc},
    {"live_bytes", py_live_bytes, METH_NOARGS, live_bytes_doc},
    {"peak_bytes", py_peak_bytes, METH_NOARGS, peak_bytes_doc},
    {"peak_reset", py_peak_reset, METH_NOARGS, peak_reset_doc},
    {"poison", py_poison, METH_O, poison_doc},
    {"fail_set", py_fail_set, METH_O, fail_set_doc},
    {"failed_sites", py_failed_sites, METH_NOARGS, failed_sites_doc},
    {"breaches", py_breaches, METH_NOARGS, breaches_doc},
    {"trim", py_trim, METH_NOARGS, trim_doc},
    {NULL, NULL, 0, NULL},
};
