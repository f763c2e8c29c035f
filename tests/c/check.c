/* check.c - see check.h. */
#define _POSIX_C_SOURCE 200809L /* kill, nanosleep */
#include "check.h"

#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32
#include "base/windows_lean.h"
#else
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#endif

enum { SHOWN = 5 }; /* failures printed per case */

static int cases, passed;
static atomic_int failures; /* of the running case; checks may come from pool threads */
static char title[160];

static void
close_case(void)
{
    if (cases > 0) {
        passed += atomic_load(&failures) == 0;
    }
}

void
check_case(const char *format, ...)
{
    va_list args;
    close_case();
    cases++;
    atomic_store(&failures, 0);
    va_start(args, format);
    vsnprintf(title, sizeof title, format, args);
    va_end(args);
}

bool
check_that(bool ok, const char *file, int line, const char *format, ...)
{
    if (!ok && atomic_fetch_add(&failures, 1) < SHOWN) {
        va_list args;
        printf("FAILED %s (%s:%d): ", title, file, line);
        va_start(args, format);
        vprintf(format, args);
        va_end(args);
        printf("\n");
        fflush(stdout);
    }
    return ok;
}

int
check_end(void)
{
    close_case();
    printf("%d passed, %d failed\n", passed, cases - passed);
    return passed == cases && cases > 0 ? 0 : 1;
}

#ifdef _WIN32
/* No fork: the program is started again, and finds both where they lie in its image. */
static const char child_word[] = "--child";

int
check_child(int (*run)(void *arg), void *arg)
{
    const uintptr_t image = (uintptr_t)GetModuleHandleA(NULL);
    STARTUPINFOA how = {.cb = sizeof how};
    PROCESS_INFORMATION child;
    char path[MAX_PATH], line[128];
    DWORD code = STILL_ACTIVE;

    snprintf(line, sizeof line, "selftest %s %lld %lld", child_word,
             (long long)((uintptr_t)run - image),
             arg != NULL ? (long long)((uintptr_t)arg - image) : 0LL);
    fflush(stdout);
    GetModuleFileNameA(NULL, path, sizeof path);
    if (!CreateProcessA(path, line, NULL, NULL, FALSE, 0, NULL, NULL, &how, &child)) {
        return -1;
    }
    if (WaitForSingleObject(child.hProcess, 20000) == WAIT_OBJECT_0) {
        GetExitCodeProcess(child.hProcess, &code);
    } else {
        TerminateProcess(child.hProcess, 1);
    }
    CloseHandle(child.hThread);
    CloseHandle(child.hProcess);
    return code <= 100 ? (int)code : -1;
}

bool
check_is_child(int argc, char **argv, int *code)
{
    if (argc != 4 || strcmp(argv[1], child_word) != 0) {
        return false;
    }
    const uintptr_t image = (uintptr_t)GetModuleHandleA(NULL);
    const long long run = atoll(argv[2]), arg = atoll(argv[3]);
    *code = ((int (*)(void *))(image + (uintptr_t)run))(arg != 0 ? (void *)(image + (uintptr_t)arg)
                                                                 : NULL);
    return true;
}

#else
int
check_child(int (*run)(void *arg), void *arg)
{
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        _exit(run(arg));
    }
    for (int ms = 0; ms < 20000; ms++) {
        int status;
        if (waitpid(child, &status, WNOHANG) == child) {
            return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
        }
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    return -1;
}

bool
check_is_child(int argc, char **argv, int *code)
{
    (void)argc, (void)argv, (void)code;
    return false;
}
#endif

bool
check_near(double got, double want, double bound)
{
    if (isnan(want) || isnan(got)) {
        return isnan(want) && isnan(got);
    }
    return got == want || fabs(got - want) <= bound;
}

static uint64_t state = 1;

void
numbers_seed(uint64_t seed)
{
    state = seed * UINT64_C(0x9E3779B97F4A7C15) + 1;
}

/* splitmix64: not the generator under test */
uint64_t
numbers_next(void)
{
    uint64_t z = state += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

double
numbers_real(void)
{
    return (double)(numbers_next() >> 11) * 0x1p-52 - 1.0;
}

int64_t
numbers_below(int64_t limit)
{
    return (int64_t)(numbers_next() % (uint64_t)limit);
}
