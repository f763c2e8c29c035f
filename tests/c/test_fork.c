/* test_fork.c - the pool in forked children, and at the end of a process: all that Windows has. */
#define _GNU_SOURCE /* syscall */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/syscall.h>
#endif
#ifndef _WIN32
#include <sys/wait.h>
#endif

#include "base/ctx.h"
#include "base/threads.h"
#include "check.h"

static sa_status
meet(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    atomic_int *missing = arg;
    (void)ctx;
    (void)task;
    (void)worker;
    atomic_fetch_sub(missing, 1);
    while (atomic_load(missing) > 0) {
        sched_yield();
    }
    return SA_OK;
}

/* 0 when a region of three threads works; it would hang where workers are believed to live. */
static int
use_pool(void *arg)
{
    (void)arg;
    sa_num_threads_set(3);
    sa_ctx *ctx = sa_ctx_acquire();
    for (int round = 0; round < 20; round++) {
        atomic_int missing = 3;
        if (sa_parallel(ctx, 3, meet, &missing) != SA_OK || atomic_load(&missing) != 0) {
            return 1;
        }
    }
    sa_ctx_release(ctx);
    return 0;
}

static atomic_bool quit, running;

static sa_status
run_until_quit(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    (void)ctx;
    (void)arg;
    (void)task;
    (void)worker;
    atomic_store(&running, true);
    while (!atomic_load(&quit)) {
        sched_yield();
    }
    return SA_OK;
}

static void *
stay_inside(void *arg)
{
    sa_ctx *ctx = sa_ctx_acquire();
    sa_parallel(ctx, 3, run_until_quit, arg);
    sa_ctx_release(ctx);
    return NULL;
}

#ifndef _WIN32
static int
use_pool_and_fork(void *arg)
{
    return use_pool(arg) + check_child(use_pool, arg);
}

static void
check_forks(void)
{
    check_case("the pool works in a child, and in its child");
    CHECK(use_pool(NULL) == 0, "in the parent");
    for (int round = 0; round < 20; round++) {
        CHECK(check_child(use_pool, NULL) == 0, "child %d", round);
    }
    CHECK(check_child(use_pool_and_fork, NULL) == 0, "grandchild");
    CHECK(use_pool(NULL) == 0, "in the parent afterwards");

    check_case("the pool works in a child forked while a region runs");
    pthread_t thread;
    atomic_store(&quit, false);
    atomic_store(&running, false);
    pthread_create(&thread, NULL, stay_inside, NULL);
    while (!atomic_load(&running)) {
        sched_yield();
    }
    for (int round = 0; round < 20; round++) {
        CHECK(check_child(use_pool, NULL) == 0, "child %d", round);
    }
    atomic_store(&quit, true);
    pthread_join(thread, NULL);
    CHECK(use_pool(NULL) == 0, "in the parent afterwards");
}

#ifdef __linux__
/* A fork that runs no handler of pthread_atfork. */
static void
check_bare_clone(void)
{
    check_case("the pool works in a child made by a bare clone");
    CHECK(use_pool(NULL) == 0, "in the parent");
    const long child = syscall(SYS_clone, (long)SIGCHLD, 0L, 0L, 0L, 0L);
    if (child == 0) {
        alarm(20);
        _exit(use_pool(NULL));
    }
    int status = -1;
    waitpid((pid_t)child, &status, 0);
    CHECK(status == 0, "status %d", status);
}
#endif

static int
fork_in_poll(void *arg)
{
    int *forked = arg;
    if (*forked < 0) {
        *forked = fork();
    }
    return 0;
}

static sa_status
last_five_milliseconds(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    (void)ctx;
    (void)arg;
    (void)task;
    (void)worker;
    nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    return SA_OK;
}

/* As a signal handler of Python may do it. The child has lost tasks, and must hear so. */
static int
fork_inside(void *arg)
{
    (void)arg;
    int forked = -1, status = -1;
    sa_num_threads_set(2);
    sa_ctx *ctx = sa_ctx_acquire();
    ctx->poll = fork_in_poll;
    ctx->poll_arg = &forked;
    const sa_status result = sa_parallel(ctx, 40, last_five_milliseconds, NULL);
    sa_ctx_release(ctx);
    if (forked == 0) {
        _exit(result == SA_EINTERNAL ? use_pool(NULL) : 7);
    }
    waitpid(forked, &status, 0);
    return result == SA_OK && status == 0 ? 0 : 1;
}
#endif

/* main() returns while a detached thread is inside a region. */
static int
exit_inside(void *arg)
{
    pthread_t thread;
    atomic_store(&quit, false);
    atomic_store(&running, false);
    sa_num_threads_set(3);
    pthread_create(&thread, NULL, stay_inside, arg);
    pthread_detach(thread);
    while (!atomic_load(&running)) {
        sched_yield();
    }
    exit(42);
}

void
sa_selftest_fork(void)
{
#ifndef _WIN32
    check_forks();
#endif
#ifdef __linux__
    if (!CHECK_TSAN) { /* which takes parent and child for one process */
        check_bare_clone();
    }
#endif
#ifndef _WIN32
    check_case("a fork from inside a region is reported in the child");
    CHECK(check_child(fork_inside, NULL) == 0, "lost tasks went unnoticed");
#endif
    check_case("the pool works in a process of its own");
    CHECK(check_child(use_pool, NULL) == 0, "in a child");
    if (!CHECK_ASAN) { /* whose leak check would wait for the parent's threads */
        check_case("a process ends while a region runs");
        const int code = check_child(exit_inside, NULL);
        CHECK(code == 42, "exit code %d", code);
    }
}
