/* test_pool.c - regions: every task once, slots, failures, stops, nesting, concurrent callers. */
#define _GNU_SOURCE /* sched_getaffinity */
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/ctx.h"
#include "base/threads.h"
#include "check.h"

enum { TASKS = 1000 };

static const int counts[] = {1, 2, 3, 5, 8, 64};
enum { N_COUNTS = sizeof counts / sizeof *counts };

static void
sleep_ms(int ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L}, NULL);
}

static double
seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- every task once ---- */

typedef struct {
    atomic_int runs[TASKS];
    int64_t last[SA_MAX_THREADS]; /* task that each worker ran last */
    atomic_int inside[SA_MAX_THREADS], disorder, workers;
} tally;

static sa_status
count_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    tally *t = arg;
    (void)ctx;
    if (atomic_fetch_add(&t->inside[worker], 1) != 0 || task <= t->last[worker]) {
        atomic_fetch_add(&t->disorder, 1);
    }
    if (t->last[worker] < 0) {
        atomic_fetch_add(&t->workers, 1);
    }
    t->last[worker] = task;
    atomic_fetch_add(&t->runs[task], 1);
    atomic_fetch_sub(&t->inside[worker], 1);
    return SA_OK;
}

static void
tally_reset(tally *t)
{
    memset(t, 0, sizeof *t);
    for (int w = 0; w < SA_MAX_THREADS; w++) {
        t->last[w] = -1;
    }
}

static void
check_tally(const tally *t, int64_t n_tasks)
{
    for (int64_t i = 0; i < TASKS; i++) {
        const int runs = atomic_load(&t->runs[i]);
        CHECK(runs == (i < n_tasks), "task %lld of %lld ran %d times", (long long)i,
              (long long)n_tasks, runs);
    }
    CHECK(atomic_load(&t->disorder) == 0, "a worker ran two tasks at once, or backwards");
}

static void
check_once(void)
{
    static const int64_t sizes[] = {0, 1, 2, 3, 7, 64, TASKS};
    tally t;
    for (int c = 0; c < N_COUNTS; c++) {
        check_case("every task once, %d threads", counts[c]);
        sa_num_threads_set(counts[c]);
        CHECK(sa_num_threads() == counts[c], "%d", sa_num_threads());
        sa_ctx *ctx = sa_ctx_acquire();
        for (int round = 0; round < 20; round++) {
            for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
                tally_reset(&t);
                CHECK(sa_parallel(ctx, sizes[s], count_task, &t) == SA_OK, "status");
                check_tally(&t, sizes[s]);
                CHECK(atomic_load(&t.workers) <= counts[c], "%d workers", atomic_load(&t.workers));
            }
        }
        sa_ctx_release(ctx);
    }
    check_case("thread counts are kept in range");
    sa_num_threads_set(0);
    CHECK(sa_num_threads() == 1, "0 gave %d", sa_num_threads());
    sa_num_threads_set(100000);
    CHECK(sa_num_threads() == SA_MAX_THREADS, "100000 gave %d", sa_num_threads());
    CHECK(sa_workers_max() == SA_MAX_THREADS, "slots");
}

/* ---- slots ---- */

/* Waits until `arg` tasks run at once: proof that so many threads take part. */
static sa_status
meet(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    atomic_int *missing = arg;
    (void)task;
    (void)worker;
    atomic_fetch_sub(missing, 1);
    while (atomic_load(missing) > 0 && !sa_stopped(ctx)) {
        sched_yield();
    }
    return SA_OK;
}

static void
check_all_take_part(void)
{
    sa_ctx *ctx = sa_ctx_acquire();
    for (int c = 0; c < N_COUNTS; c++) {
        check_case("%d threads run at once, again after a pause", counts[c]);
        sa_num_threads_set(counts[c]);
        for (int round = 0; round < 4; round++) {
            atomic_int missing = counts[c];
            CHECK(sa_parallel(ctx, counts[c], meet, &missing) == SA_OK, "status");
            CHECK(atomic_load(&missing) == 0, "%d are missing", atomic_load(&missing));
            sleep_ms(round * 2);
        }
    }
    sa_ctx_release(ctx);
}

static sa_status
take_scratch(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    (void)arg;
    sa_arena *arena = sa_scratch(ctx, worker);
    sa_arena_reset(arena);
    int64_t *piece = sa_arena_take(arena, 4096);
    if (piece == NULL) {
        return sa_fail(ctx, SA_ENOMEM, "slot %d has no scratch", worker);
    }
    for (int i = 0; i < 512; i++) {
        piece[i] = task;
    }
    for (int i = 0; i < 512; i++) {
        if (piece[i] != task) {
            return sa_fail(ctx, SA_EINTERNAL, "slot %d is shared", worker);
        }
    }
    return SA_OK;
}

static void
check_slots(void)
{
    check_case("only slots with scratch run, though threads are added");
    sa_num_threads_set(2);
    sa_ctx *ctx = sa_ctx_acquire();
    CHECK(sa_scratch_reserve(ctx, 4096) == SA_OK, "reserve");
    sa_num_threads_set(8);
    for (int round = 0; round < 50; round++) {
        CHECK(sa_parallel(ctx, 100, take_scratch, NULL) == SA_OK, "%s", ctx->message);
    }
    sa_num_threads_set(1);
    CHECK(sa_parallel(ctx, 100, take_scratch, NULL) == SA_OK, "%s", ctx->message);
    sa_ctx_release(ctx);
}

static sa_status
do_nothing(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    (void)ctx;
    (void)arg;
    (void)task;
    (void)worker;
    return SA_OK;
}

/* A worker that is late for a wide region may find a narrow one open, where it has no scratch. */
static void
check_late_workers(void)
{
    check_case("a worker late for one region leaves the next alone");
    sa_num_threads_set(2);
    sa_ctx *narrow = sa_ctx_acquire(), *wide = sa_ctx_acquire();
    CHECK(sa_scratch_reserve(narrow, 4096) == SA_OK, "reserve");
    sa_num_threads_set(16);
    for (int round = 0; round < 300; round++) {
        CHECK(sa_parallel(wide, 16, do_nothing, NULL) == SA_OK, "status");
        CHECK(sa_parallel(narrow, 200, take_scratch, NULL) == SA_OK, "%s", narrow->message);
    }
    sa_ctx_release(narrow);
    sa_ctx_release(wide);
}

/* ---- failures ---- */

static atomic_int ran;

static sa_status
fail_at_ten(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    (void)arg;
    (void)worker;
    atomic_fetch_add(&ran, 1);
    if (task == 10) {
        return sa_fail(ctx, SA_ENOMEM, "task %lld failed", (long long)task);
    }
    return sa_stopped(ctx) ? SA_ESTOP : SA_OK; /* as kernels do */
}

static void
check_failure(void)
{
    for (int c = 0; c < N_COUNTS; c++) {
        check_case("a failed task ends the region, %d threads", counts[c]);
        sa_num_threads_set(counts[c]);
        sa_ctx *ctx = sa_ctx_acquire();
        atomic_store(&ran, 0);
        CHECK(sa_parallel(ctx, 10000000, fail_at_ten, NULL) == SA_ENOMEM, "status");
        CHECK(atomic_load(&ran) < 10000000, "all tasks ran");
        CHECK(ctx->code == SA_ENOMEM && strcmp(ctx->message, "task 10 failed") == 0, "%s",
              ctx->message);
        CHECK(!sa_stopped(ctx), "the flag is taken back");
        tally t;
        tally_reset(&t);
        CHECK(sa_parallel(ctx, TASKS, count_task, &t) == SA_OK, "the next region");
        check_tally(&t, TASKS);
        sa_ctx_release(ctx);
    }
}

/* ---- stops ---- */

static pthread_t caller;
static atomic_int polls, strangers, inside;

static int
poll_third(void *arg)
{
    (void)arg;
    atomic_fetch_add(&strangers, !pthread_equal(pthread_self(), caller));
    return atomic_fetch_add(&polls, 1) >= 2;
}

static sa_status
last_a_millisecond(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    (void)ctx;
    (void)arg;
    (void)task;
    (void)worker;
    atomic_fetch_add(&inside, 1);
    sleep_ms(1);
    atomic_fetch_sub(&inside, 1);
    return SA_OK;
}

/* Task 0 ends when another has begun; all others wait for the flag. So the caller waits, or has
 * such a task itself, and then must poll in it. */
static sa_status
wait_for_stop(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    (void)arg;
    (void)task;
    atomic_fetch_add(&inside, 1);
    while (!sa_stop_asked(ctx, worker) && (worker != 0 || atomic_load(&inside) < 2)) {
        sched_yield();
    }
    if (worker != 0) {
        atomic_fetch_sub(&inside, 1);
    }
    return SA_OK;
}

static void
check_stop_with(sa_task_fn fn, int64_t n_tasks, int threads)
{
    sa_num_threads_set(threads);
    sa_ctx *ctx = sa_ctx_acquire();
    ctx->poll = poll_third;
    caller = pthread_self();
    atomic_store(&polls, 0);
    atomic_store(&strangers, 0);
    atomic_store(&inside, 0);
    const double start = seconds();
    CHECK(sa_parallel(ctx, n_tasks, fn, NULL) == SA_ESTOP, "status");
    CHECK(seconds() - start < 5, "%g s", seconds() - start);
    CHECK(atomic_load(&polls) == 3, "%d polls", atomic_load(&polls));
    CHECK(atomic_load(&strangers) == 0, "another thread polled");
    CHECK(fn != last_a_millisecond || atomic_load(&inside) == 0, "somebody is still inside");
    atomic_store(&ran, 0);
    CHECK(sa_parallel(ctx, 100, fail_at_ten, NULL) == SA_ESTOP, "the stop is for the whole call");
    CHECK(atomic_load(&ran) == 0, "%d tasks ran after it", atomic_load(&ran));
    sa_ctx_release(ctx);
}

static void
check_stop(void)
{
    for (int c = 0; c < N_COUNTS; c++) {
        check_case("poll stops a region between tasks, %d threads", counts[c]);
        check_stop_with(last_a_millisecond, 100000, counts[c]);
    }
    check_case("poll stops a region while the caller waits");
    check_stop_with(wait_for_stop, 2, 2);
    check_case("poll stops a region inside a long task");
    check_stop_with(wait_for_stop, 1, 2);
}

/* ---- nesting ---- */

typedef struct {
    int outer;
    sa_ctx *own;
    atomic_int wrong, count;
} nest;

static sa_status
inner_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    nest *n = arg;
    (void)task;
    atomic_fetch_add(&n->wrong, worker != (ctx == n->own ? 0 : n->outer));
    atomic_fetch_add(&n->count, 1);
    return SA_OK;
}

static sa_status
outer_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    atomic_int *total = arg;
    nest n = {.outer = worker, .own = sa_ctx_acquire()};
    sa_status status = sa_parallel(ctx, 5, inner_task, &n);
    if (status == SA_OK) {
        status = sa_parallel(n.own, 5, inner_task, &n);
    }
    sa_ctx_release(n.own);
    atomic_fetch_add(total, atomic_load(&n.count));
    if (status == SA_OK && atomic_load(&n.wrong) > 0) {
        status = sa_fail(ctx, SA_EINTERNAL, "task %lld ran in a wrong slot", (long long)task);
    }
    return status;
}

static sa_status
outer_failing(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    (void)task;
    (void)worker;
    return sa_parallel(ctx, 100, fail_at_ten, arg);
}

static void
check_nesting(void)
{
    for (int c = 0; c < N_COUNTS; c++) {
        check_case("calls from inside a task run inline, %d threads", counts[c]);
        sa_num_threads_set(counts[c]);
        sa_ctx *ctx = sa_ctx_acquire();
        atomic_int total = 0;
        CHECK(sa_parallel(ctx, 200, outer_task, &total) == SA_OK, "%s", ctx->message);
        CHECK(atomic_load(&total) == 2000, "%d inner tasks", atomic_load(&total));
        CHECK(sa_parallel(ctx, 200, outer_failing, NULL) == SA_ENOMEM, "an inner failure");
        sa_ctx_release(ctx);
    }
}

/* ---- concurrent callers ---- */

static atomic_int bad_calls;
static atomic_bool done;

static void *
call_often(void *arg)
{
    (void)arg;
    tally *t = malloc(sizeof *t);
    for (int i = 0; i < 200; i++) {
        sa_ctx *ctx = sa_ctx_acquire();
        tally_reset(t);
        bool ok = sa_scratch_reserve(ctx, 4096) == SA_OK;
        ok = ok && sa_parallel(ctx, TASKS, count_task, t) == SA_OK;
        for (int k = 0; k < TASKS; k++) {
            ok = ok && atomic_load(&t->runs[k]) == 1;
        }
        ok = ok && sa_parallel(ctx, 20, take_scratch, NULL) == SA_OK;
        ok = ok && sa_parallel(ctx, 100, fail_at_ten, NULL) == SA_ENOMEM;
        atomic_fetch_add(&bad_calls, !ok || atomic_load(&t->disorder) != 0);
        sa_ctx_release(ctx);
    }
    free(t);
    return NULL;
}

static void *
change_count(void *arg)
{
    (void)arg;
    for (int i = 0; !atomic_load(&done); i++) {
        sa_num_threads_set(1 + i % 9);
        sched_yield();
    }
    return NULL;
}

static void
check_callers(void)
{
    enum { CALLERS = 6 };
    pthread_t threads[CALLERS], changer;
    check_case("%d callers at once, while the thread count changes", CALLERS);
    atomic_store(&bad_calls, 0);
    atomic_store(&done, false);
    pthread_create(&changer, NULL, change_count, NULL);
    for (int i = 0; i < CALLERS; i++) {
        pthread_create(&threads[i], NULL, call_often, NULL);
    }
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(threads[i], NULL);
    }
    atomic_store(&done, true);
    pthread_join(changer, NULL);
    CHECK(atomic_load(&bad_calls) == 0, "%d calls went wrong", atomic_load(&bad_calls));
}

/* ---- placement ---- */

#ifdef __linux__
/* Threads of this process that may use fewer CPUs than this one. */
static int
bound_threads(void)
{
    cpu_set_t own, other;
    int bound = 0;
    sched_getaffinity(0, sizeof own, &own);
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *entry; tasks != NULL && (entry = readdir(tasks)) != NULL;) {
        const int tid = atoi(entry->d_name);
        if (tid > 0 && sched_getaffinity(tid, sizeof other, &other) == 0) {
            bound += !CPU_EQUAL(&own, &other);
        }
    }
    if (tasks != NULL) {
        closedir(tasks);
    }
    return bound;
}

static void
check_affinity(void)
{
    check_case("workers may use every CPU again after a region");
    sa_num_threads_set(sa_cpus_affine());
    sa_ctx *ctx = sa_ctx_acquire();
    for (int round = 0; round < 20; round++) {
        sleep_ms(3); /* asleep, so that the next region places them */
        sa_parallel(ctx, 8, last_a_millisecond, NULL);
    }
    int bound = -1;
    for (int wait = 0; wait < 2000 && (bound = bound_threads()) != 0; wait++) {
        sleep_ms(1);
    }
    CHECK(bound == 0, "%d threads are still bound", bound);
    sa_ctx_release(ctx);
}
#endif

void
sa_selftest_pool(void)
{
    check_once();
    check_all_take_part();
    check_slots();
    check_late_workers();
    check_failure();
    check_stop();
    check_nesting();
    check_callers();
#ifdef __linux__
    check_affinity();
#endif
}
