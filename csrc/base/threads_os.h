/* threads_os.h - what the pool asks of the system: Linux, else POSIX; threads_windows.h is the
 * other one. For threads.c alone. */
#ifndef SA_THREADS_OS_H
#define SA_THREADS_OS_H

#define _GNU_SOURCE /* sched_getcpu, CPU_SET, syscall, madvise */
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#endif

/* ---- threads ---- */

typedef void *thread_end;

/* Detached. Signals are for threads that run Python; faults stay where they happen. */
static bool
start_thread(thread_end (*run)(void *), void *arg, size_t stack_bytes)
{
    pthread_attr_t attr;
    pthread_t thread;
    sigset_t block, before;

    if (pthread_attr_init(&attr) != 0) {
        return false;
    }
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, stack_bytes);
    sigfillset(&block);
    const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        sigdelset(&block, faults[i]);
    }
    pthread_sigmask(SIG_SETMASK, &block, &before);
    const bool made = pthread_create(&thread, &attr, run, arg) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return made;
}

static void
yield(void)
{
    sched_yield();
}

/* ---- arithmetic: the same in every thread ---- */

typedef int arithmetic;

static arithmetic
arithmetic_begin(void)
{
    return 0;
}

static void
arithmetic_end(arithmetic before)
{
    (void)before;
}

/* ---- sleeping and waking ---- */

#if defined(__linux__) && !defined(SA_NO_FUTEX)

/* Sleeps while *word == seen, at most ns (0: without limit). May return early. */
static void
park(atomic_uint *word, unsigned seen, int64_t ns)
{
    const struct timespec limit = {.tv_sec = 0, .tv_nsec = (long)ns};
    (void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, ns > 0 ? &limit : NULL, NULL, 0);
}

static void
unpark(atomic_uint *word)
{
    (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static void
park_reset(void)
{
}

#else

static pthread_mutex_t park_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t park_signal = PTHREAD_COND_INITIALIZER;

static void
park(atomic_uint *word, unsigned seen, int64_t ns)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += (long)ns;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&park_mutex);
    if (atomic_load(word) == seen) {
        if (ns > 0) {
            (void)pthread_cond_timedwait(&park_signal, &park_mutex, &until);
        } else {
            (void)pthread_cond_wait(&park_signal, &park_mutex);
        }
    }
    pthread_mutex_unlock(&park_mutex);
}

static void
unpark(atomic_uint *word)
{
    (void)word; /* one signal serves all: whoever wakes looks at its own word */
    pthread_mutex_lock(&park_mutex);
    pthread_cond_broadcast(&park_signal);
    pthread_mutex_unlock(&park_mutex);
}

/* In a forked child: whoever held the mutex is gone. */
static void
park_reset(void)
{
    park_mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    park_signal = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
}

#endif

static void
relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* ---- where threads run ---- */

#ifdef __linux__

typedef struct {
    pid_t tid;
    bool placed;       /* kept off one CPU, until place_free */
    cpu_set_t allowed; /* what the thread may use otherwise  */
} placement;

static void
place_self(placement *p)
{
    p->tid = (pid_t)syscall(SYS_gettid);
}

/* A thread often wakes on the CPU of the one that woke it, and then waits there for milliseconds.
 * So the caller forbids the sleeper that CPU first; moving a running thread costs some 50 us. */
static void
place_elsewhere(placement *p)
{
    const int cpu = sched_getcpu();
    if (cpu < 0 || cpu >= CPU_SETSIZE ||
        (!p->placed && sched_getaffinity(p->tid, sizeof p->allowed, &p->allowed) != 0)) {
        return;
    }
    cpu_set_t others = p->allowed;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(p->tid, sizeof others, &others) == 0) {
        p->placed = true;
    }
}

/* The thread itself, once it is awake in its place. */
static void
place_free(placement *p)
{
    if (p->placed) {
        (void)sched_setaffinity(0, sizeof p->allowed, &p->allowed);
        p->placed = false;
    }
}

#else
#include "base/threads_unplaced.h"
#endif

/* ---- is this process a forked copy? ----
 *
 * A bare clone() skips the handlers of pthread_atfork. A page that the kernel empties in a child
 * tells, for the price of a load; elsewhere the process id does, for a system call.
 */

static _Atomic(atomic_int *) mark;
static atomic_int mark_pid;

static void
mark_process(void)
{
    atomic_int *page = atomic_load(&mark);
    if (page != NULL) {
        atomic_store(page, 1);
    }
    atomic_store(&mark_pid, (int)getpid());
}

/* Marks this process, and has in_child called in its forked children. */
static void
watch_forks(void (*in_child)(void))
{
#ifdef MADV_WIPEONFORK
    const size_t bytes = (size_t)sysconf(_SC_PAGESIZE);
    void *page = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    /* User-mode emulators grant every advice and follow none: who grants -1 is not believed. */
    if (page != MAP_FAILED && madvise(page, bytes, -1) != 0 &&
        madvise(page, bytes, MADV_WIPEONFORK) == 0) {
        atomic_store((atomic_int *)page, 1);
        atomic_store(&mark, (atomic_int *)page);
    }
#endif
    mark_process();
    pthread_atfork(NULL, NULL, in_child);
}

static bool
is_copy(void)
{
    atomic_int *page = atomic_load_explicit(&mark, memory_order_relaxed);
    if (page != NULL) {
        return atomic_load_explicit(page, memory_order_relaxed) == 0;
    }
    const int marked = atomic_load(&mark_pid);
    return marked != 0 && marked != (int)getpid();
}

#endif
