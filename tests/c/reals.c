/* reals.c - see reals.h. */
#include "reals.h"

#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "check.h"

void
each_table(void (*run)(const sa_tile *t))
{
    for (int isa = SA_ISA_COUNT - 1; isa >= 0; isa--) {
        if (sa_isa_set((sa_isa)isa)) {
            run(sa_tile_for(false));
            run(sa_tile_for(true));
        }
    }
    for (int isa = 0; isa < SA_ISA_COUNT; isa++) {
        sa_isa_set((sa_isa)isa);
    }
}

const char *
table_name(const sa_tile *t)
{
    static char name[40];
    snprintf(name, sizeof name, "%s %s", t->real_bytes == 8 ? "float64" : "float32",
             sa_isa_name(t->isa));
    return name;
}

double
real_eps(const sa_tile *t)
{
    return t->real_bytes == 8 ? 0x1p-52 : 0x1p-23;
}

double
real_get(const sa_tile *t, const void *p, int64_t i)
{
    return t->real_bytes == 8 ? ((const double *)p)[i] : (double)((const float *)p)[i];
}

void
real_put(const sa_tile *t, void *p, int64_t i, double x)
{
    if (t->real_bytes == 8) {
        ((double *)p)[i] = x;
    } else {
        ((float *)p)[i] = (float)x;
    }
}

double
real_round(const sa_tile *t, double x)
{
    return t->real_bytes == 8 ? x : (double)(float)x;
}

void *
real_array(const sa_tile *t, int64_t n)
{
    return sa_malloc_array((size_t)n, (size_t)t->real_bytes);
}

void *
real_random(const sa_tile *t, int64_t n, double scale)
{
    void *p = real_array(t, n);
    for (int64_t i = 0; i < n; i++) {
        real_put(t, p, i, scale * numbers_real());
    }
    return p;
}

void *
real_copy(const sa_tile *t, const void *p, int64_t n)
{
    void *copy = real_array(t, n);
    memcpy(copy, p, (size_t)n * (size_t)t->real_bytes);
    return copy;
}

bool
real_untouched(const sa_tile *t, const void *p, int64_t i)
{
    static const unsigned char poison[8] = {255, 255, 255, 255, 255, 255, 255, 255};
    return memcmp((const char *)p + i * t->real_bytes, poison, (size_t)t->real_bytes) == 0;
}

bool
real_same(const sa_tile *t, const void *p, const void *q, int64_t i)
{
    const int64_t at = i * t->real_bytes;
    return memcmp((const char *)p + at, (const char *)q + at, (size_t)t->real_bytes) == 0;
}

real_rows
rows_random(const sa_tile *t, int n, int dim, double scale)
{
    real_rows rows = {.n = n};
    for (int i = 0; i < n; i++) {
        rows.row[i] = real_random(t, dim, scale);
    }
    return rows;
}

void
rows_free(real_rows *rows)
{
    for (int i = 0; i < rows->n; i++) {
        sa_free(rows->row[i]);
    }
}
