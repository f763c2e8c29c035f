/* fields.h - options of a variant read from the attributes of any object. */
#ifndef SA_PY_FIELDS_H
#define SA_PY_FIELDS_H

#include "python/module.h"

#include "engine/planner.h"

/* Fills opts (planner->opts_size bytes, zeroed) from the attributes of spec and, for arrays, from
 * the mapping params (or None). -1 with an exception that names class, field, range and value. */
int py_fields_read(py_call *call, const sa_planner *planner, PyObject *spec, PyObject *params,
                   void *opts);

/* List of (field, type, min, max, words); None where a limit or the words do not apply. */
PyObject *py_fields_describe(const sa_field *fields);

#endif
