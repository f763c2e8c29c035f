/* library_os.h - opening a shared library, on POSIX systems; library_windows.h is the other one.
 * For gemm_blas.c alone, first. */
#ifndef SA_LIBRARY_OS_H
#define SA_LIBRARY_OS_H

#if defined(__linux__)
#define _GNU_SOURCE /* environ */
#endif
#include <dlfcn.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int
process_id(void)
{
    return (int)getpid();
}

static void
yield(void)
{
    sched_yield();
}

#if defined(__linux__)
/* OpenBLAS takes the size of its thread server from the environment while it loads, and starts it
 * at once: a thread a core, which openblas_set_num_threads(1) does not end. So meanwhile `environ`
 * points to a copy that asks for one thread, which starts none. setenv would move entries under a
 * thread that reads them; here readers see one whole array or the other, and the copy is never
 * freed. */
#define MAX_ENTRIES 4096
static char *entries[MAX_ENTRIES];

static char **
lend_environ(void)
{
    static char one_thread[] = "OPENBLAS_NUM_THREADS=1";
    char **const kept = environ;
    int n = 0;
    for (char **entry = kept; entry != NULL && *entry != NULL; entry++) {
        if (n + 2 >= MAX_ENTRIES) {
            return kept;
        }
        if (strncmp(*entry, one_thread, sizeof "OPENBLAS_NUM_THREADS") != 0) {
            entries[n++] = *entry;
        }
    }
    entries[n++] = one_thread;
    entries[n] = NULL;
    environ = entries;
    return kept;
}

static void
return_environ(char **kept)
{
    if (environ == entries) {
        environ = kept;
    }
}
#else
static char **
lend_environ(void)
{
    return NULL;
}

static void
return_environ(char **kept)
{
    (void)kept;
}
#endif

/* OpenBLAS at this path, told to start no threads. NULL: `words` says why. */
static void *
open_blas(const char *path, char *words, size_t room)
{
    char **const kept = lend_environ();
    void *const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    return_environ(kept);
    if (library == NULL) {
        snprintf(words, room, "tiles (%.400s)", dlerror());
    }
    return library;
}

static void *
find_symbol(void *library, const char *name)
{
    return dlsym(library, name);
}

#endif
