/* fields.h - field tables that describe option structs, so that the boundary needs no code per
 * variant. */
#ifndef SA_FIELDS_H
#define SA_FIELDS_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    SA_FIELD_I64,  /* int64_t in [min, max]                                         */
    SA_FIELD_F64,  /* double in [min, max]                                          */
    SA_FIELD_BOOL, /* int32_t 0 or 1                                                */
    SA_FIELD_ENUM, /* int32_t index into words (NULL-terminated list)               */
    SA_FIELD_I64S, /* sa_ints: a short tuple, each in [min, max]                    */
    SA_FIELD_ARRAY /* sa_view of a bool array given through params, axes padded in front */
} sa_field_type;

#define SA_INTS_MAX 64
typedef struct {
    int64_t count, value[SA_INTS_MAX];
} sa_ints;

typedef struct {
    const char *name; /* the dataclass field; NULL ends the table */
    sa_field_type type;
    size_t offset;
    double min, max;
    const char *const *words;
} sa_field;

#define SA_FIELD(type, name, kind, lo, hi) {#name, kind, offsetof(type, name), lo, hi, NULL}
#define SA_FIELD_WORDS(type, name, list) {#name, SA_FIELD_ENUM, offsetof(type, name), 0, 0, list}
#define SA_FIELD_END {NULL, SA_FIELD_I64, 0, 0, 0, NULL}

#endif
