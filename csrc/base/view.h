/* view.h - a strided 4-D array that somebody else owns. */
#ifndef SA_VIEW_H
#define SA_VIEW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum { SA_F32 = 0, SA_F64, SA_F16, SA_BF16, SA_BOOL, SA_I32, SA_I64 } sa_dtype;

/* Strides count elements and may be zero or negative. The last axis of q, k, v and outputs is
 * contiguous (stride[3] == 1, or size[3] <= 1); of masks and biases any stride is legal (0 where
 * broadcast). */
typedef struct {
    void *data; /* NULL: absent */
    sa_dtype dtype;
    int64_t size[4];
    int64_t stride[4];
} sa_view;

static inline size_t
sa_dtype_size(sa_dtype dtype)
{
    static const unsigned char bytes[] = {4, 8, 2, 2, 1, 4, 8};
    return bytes[dtype];
}

/* Address of element (a, b, c, 0). */
static inline void *
sa_view_row(sa_view v, int64_t a, int64_t b, int64_t c)
{
    const int64_t at = a * v.stride[0] + b * v.stride[1] + c * v.stride[2];
    return (char *)v.data + at * (int64_t)sa_dtype_size(v.dtype);
}

#define SA_MIN(a, b) ((a) < (b) ? (a) : (b))
#define SA_MAX(a, b) ((a) > (b) ? (a) : (b))

/* Greatest common divisor of counts. */
static inline int64_t
sa_common_divisor(int64_t a, int64_t b)
{
    while (b != 0) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

#endif
