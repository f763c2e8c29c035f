/* gemm_blas.c - opens OpenBLAS: our own copy, or a library given by name.
 *
 * It is opened at the first product and not linked, because loading it may start threads and import
 * must not. An OpenBLAS that cannot be held at one thread, or that counts in 64-bit integers, is
 * refused.
 */
#ifdef _WIN32
#include "engine/library_windows.h"
#else
#include "engine/library_os.h" /* first: it asks the system for more than C11 */
#endif

#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "engine/blas.h"
#include "engine/gemm.h"

enum { UNOPENED, OPENED, ABSENT };

static char blas_path[4096]; /* empty: no library */
static char blas_words[512] = "tiles";
static sa_blas blas_table;
static atomic_int state = UNOPENED;
static atomic_int opener; /* process id of who holds the lock: a lock held across a fork is stale */

static void
lock(void)
{
    const int self = process_id();
    int holder = 0;
    while (!atomic_compare_exchange_strong(&opener, &holder, self)) {
        if (holder != self && atomic_compare_exchange_strong(&opener, &holder, self)) {
            return; /* our parent held it when we were forked */
        }
        yield();
        holder = 0;
    }
}

static void
unlock(void)
{
    atomic_store(&opener, 0);
}

/* Sets the function pointer at `function` to the symbol as the scipy-openblas wheels spell it, or
 * as distributions do. Copied as bytes: C has no conversion from an object pointer. */
static bool
find(void *library, const char *name, void *function)
{
    char prefixed[64];
    snprintf(prefixed, sizeof prefixed, "scipy_%s", name);
    void *symbol = find_symbol(library, prefixed);
    if (symbol == NULL) {
        symbol = find_symbol(library, name);
    }
    memcpy(function, &symbol, sizeof symbol);
    return symbol != NULL;
}

static bool
open_library(void)
{
    void *const library = open_blas(blas_path, blas_words, sizeof blas_words);
    if (library == NULL) {
        return false;
    }
    void (*set_threads)(int);
    char *(*get_config)(void);
    if (!find(library, "openblas_set_num_threads", &set_threads) ||
        !find(library, "openblas_get_config", &get_config) ||
        !find(library, "cblas_sgemm", &blas_table.sgemm) ||
        !find(library, "cblas_dgemm", &blas_table.dgemm)) {
        snprintf(blas_words, sizeof blas_words, "tiles (%.400s is not OpenBLAS)", blas_path);
        return false;
    }
    const char *const words = get_config();
    if (strstr(words, "USE64BITINT") != NULL) {
        snprintf(blas_words, sizeof blas_words, "tiles (%.400s has 64-bit integers)", blas_path);
        return false;
    }
    set_threads(1);
    snprintf(blas_words, sizeof blas_words, "%.500s", words);
    return true;
}

const sa_blas *
sa_blas_get(void)
{
    int now = atomic_load_explicit(&state, memory_order_acquire);
    if (now == UNOPENED) {
        lock();
        now = atomic_load(&state);
        if (now == UNOPENED) {
            now = blas_path[0] != '\0' && open_library() ? OPENED : ABSENT;
            atomic_store_explicit(&state, now, memory_order_release);
        }
        unlock();
    }
    return now == OPENED ? &blas_table : NULL;
}

void
sa_blas_path_set(const char *path)
{
    lock();
    snprintf(blas_path, sizeof blas_path, "%s", path != NULL ? path : "");
    snprintf(blas_words, sizeof blas_words, "tiles");
    atomic_store_explicit(&state, UNOPENED, memory_order_release);
    unlock();
}

const char *
sa_blas_config(void)
{
    sa_blas_get();
    return blas_words;
}
