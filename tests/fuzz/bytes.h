/* bytes.h - what a fuzzer's bytes stand for: small numbers mostly, and those at the edges of types.
 */
#ifndef SA_FUZZ_BYTES_H
#define SA_FUZZ_BYTES_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Holds in optimised builds too: a broken promise is a crash that the fuzzer reports. */
#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

typedef struct {
    const uint8_t *at;
    size_t left;
} bytes;

/* The next byte; 0 past the end. */
static inline int
take(bytes *b)
{
    if (b->left == 0) {
        return 0;
    }
    b->left--;
    return *b->at++;
}

/* 0 to 199 as they are, -20 to 19, then limits of the integer types and any eight bytes. */
static inline int64_t
take_number(bytes *b)
{
    static const int64_t far[] = {INT32_MAX,
                                  INT32_MIN,
                                  INT64_MAX,
                                  INT64_MIN,
                                  INT64_MAX / 2,
                                  (int64_t)1 << 30,
                                  ((int64_t)1 << 30) + 1,
                                  (int64_t)1 << 31,
                                  (int64_t)1 << 32,
                                  ((int64_t)1 << 32) + 1,
                                  (int64_t)1 << 53,
                                  (int64_t)1 << 62,
                                  -((int64_t)1 << 62),
                                  UINT32_MAX,
                                  3037000500}; /* its square is past INT64_MAX */
    const int tag = take(b);
    if (tag < 200) {
        return tag;
    }
    if (tag < 240) {
        return tag - 220;
    }
    if (tag < 255) {
        return far[tag - 240];
    }
    uint64_t raw = 0;
    for (int x = 0; x < 8; x++) {
        raw = raw << 8 | (uint64_t)take(b);
    }
    int64_t number;
    memcpy(&number, &raw, sizeof number);
    return number;
}

/* A number in [0, most], whatever the byte. */
static inline int64_t
take_below(bytes *b, int64_t most)
{
    return take(b) % (most + 1);
}

#endif
