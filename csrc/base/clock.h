/* clock.h - a clock that only runs forward. Whoever includes it asks for POSIX first. */
#ifndef SA_CLOCK_H
#define SA_CLOCK_H

#include <stdint.h>

#ifdef _WIN32
#include "base/windows_lean.h"

static inline int64_t
sa_clock_ns(void)
{
    LARGE_INTEGER count, rate;
    QueryPerformanceCounter(&count);
    QueryPerformanceFrequency(&rate); /* a constant that the system keeps in a page of ours */
    const int64_t whole = count.QuadPart / rate.QuadPart, rest = count.QuadPart % rate.QuadPart;
    return whole * 1000000000 + rest * 1000000000 / rate.QuadPart;
}

static inline int64_t
sa_clock_coarse_ns(void)
{
    return sa_clock_ns();
}

#else
#include <time.h>

static inline int64_t
sa_clock_read(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline int64_t
sa_clock_ns(void)
{
    return sa_clock_read(CLOCK_MONOTONIC);
}

/* A tenth of the price where there is such a clock, at 4 ms. */
static inline int64_t
sa_clock_coarse_ns(void)
{
#ifdef CLOCK_MONOTONIC_COARSE
    return sa_clock_read(CLOCK_MONOTONIC_COARSE);
#else
    return sa_clock_ns();
#endif
}

#endif
#endif
