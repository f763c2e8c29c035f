/* check.h - what the C self-tests share: cases, checks, numbers to test with. */
#ifndef SA_CHECK_H
#define SA_CHECK_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

/* What programs under a sanitizer may not do is left out there. */
#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define CHECK_ASAN 1
#elif __has_feature(thread_sanitizer)
#define CHECK_TSAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define CHECK_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define CHECK_TSAN 1
#endif
#ifndef CHECK_ASAN
#define CHECK_ASAN 0
#endif
#ifndef CHECK_TSAN
#define CHECK_TSAN 0
#endif

/* Begins a case and closes the one before; a case passes when no CHECK in it failed. */
void check_case(const char *format, ...) __attribute__((format(SA_PRINTF, 1, 2)));

/* Returns ok; when false the sentence is printed and the case has failed. */
bool check_that(bool ok, const char *file, int line, const char *format, ...)
    __attribute__((format(SA_PRINTF, 4, 5)));

#define CHECK(ok, ...) check_that((ok), __FILE__, __LINE__, __VA_ARGS__)

/* Closes the last case, prints the closing line, returns the exit code. */
int check_end(void);

/* Runs it in a forked child: what it returned (0 .. 100), or -1 when it was killed or took longer
 * than 20 seconds. Windows has no fork: there arg is static (or NULL), and as it was initialised.
 */
int check_child(int (*run)(void *arg), void *arg);

/* For main: whether this is such a child of Windows; then it has run, and this is its code. */
bool check_is_child(int argc, char **argv, int *code);

/* Whether the error of `got` against `want` is at most `bound`; NaN equals NaN, infinities must
 * agree. */
bool check_near(double got, double want, double bound);

/* A stream of numbers that is the same in every run. */
void numbers_seed(uint64_t seed);
uint64_t numbers_next(void);
double numbers_real(void);            /* in (-1, 1)             */
int64_t numbers_below(int64_t limit); /* integer in [0, limit)  */

/* One function a file, listed in selftest.c. */
void sa_selftest_environment(void); /* first: must see the process before any other use */
void sa_selftest_alloc(void);
void sa_selftest_half(void);
void sa_selftest_philox(void);
void sa_selftest_pool(void);
void sa_selftest_fork(void);
void sa_selftest_tile_pack(void);
void sa_selftest_tile_strip(void);
void sa_selftest_tile_row(void);
void sa_selftest_tile_run(void);
void sa_selftest_tile_grad(void);
void sa_selftest_select(void);
void sa_selftest_plan(void);
void sa_selftest_pack(void);
void sa_selftest_attend(void);
void sa_selftest_attend_rows(void);
void sa_selftest_grad(void);
void sa_selftest_received(void);
void sa_selftest_gemm(void);
void sa_selftest_ops(void);
void sa_selftest_faults(void); /* last: it counts what has failed in all of them */

#endif
