/* threads.c - the pool: one region at a time, workers that spin shortly and then sleep.
 *
 * A region is a counter of tasks behind a gate. The caller opens the gate, calls the workers, takes
 * tasks itself, closes the gate when the counter has run out, and waits for those inside. A worker
 * that comes too late finds the gate closed and goes back to waiting: a region too short to be
 * worth a wake-up never waits for one.
 */
#ifdef _WIN32
#include "base/threads_windows.h"
#else
#include "base/threads_os.h" /* first: it asks the system for more than C11 */
#endif

#include "base/clock.h"
#include "base/threads.h"
#include "base/view.h"

#define SPIN_NS 40000         /* how long a worker without a call spins before it sleeps   */
#define CALLER_SPIN_NS 150000 /* how long a caller spins for workers that are still inside */
#define CROWDED_SPIN_NS 1000  /* either, with more threads than CPUs                       */
#define POLL_NS 20000000      /* between two polls, so the longest sleep of a caller, too  */
#define STACK_BYTES ((size_t)2 << 20)

#define OPEN 0x80000000u /* gate: workers may enter; the lower bits count those inside */

/* Bits of ctx->stop; the second is taken back after the region. */
enum { STOP_ASKED = 1, STOP_FAILED = 2 };

/* CALLED: the caller has it in hand, between ASLEEP and AWAKE. */
enum { AWAKE = 0, ASLEEP, CALLED };

typedef struct {
    _Alignas(SA_ALIGN) atomic_uint call; /* raised once for each region */
    atomic_int state;
    int slot;
    placement where; /* the caller's while CALLED, else the worker's */
} worker;

/* Written by the caller before the gate opens, read by workers while they are inside. */
typedef struct {
    sa_ctx *ctx;
    sa_task_fn fn;
    void *arg;
    int64_t n_tasks;
    int threads; /* slots that may run */
} region;

static struct {
    _Alignas(SA_ALIGN) atomic_uint gate;
    atomic_bool caller_asleep;
    atomic_int status; /* first failure of the region */
    _Alignas(SA_ALIGN) atomic_int_fast64_t next;
    _Alignas(SA_ALIGN) region now;
    atomic_bool crowded; /* more threads than CPUs                */
    int started;         /* workers 1 .. started exist            */
    int cpus;            /* that this process may run on          */
    atomic_uint forks;   /* above 0 in a forked copy of a process */
    atomic_bool busy;    /* a region runs                         */
    bool prepared;
    worker workers[SA_MAX_THREADS];
} pool;

/* The task that this thread runs, if any. */
static _Thread_local struct {
    sa_ctx *ctx;
    int worker;
} here;

static int64_t
spin_ns(int64_t alone)
{
    return atomic_load_explicit(&pool.crowded, memory_order_relaxed) ? CROWDED_SPIN_NS : alone;
}

/* Spins while *word == seen, but not much longer than ns. Returns the last value read. */
static unsigned
spin(atomic_uint *word, unsigned seen, int64_t ns)
{
    const int64_t end = sa_clock_ns() + ns;
    unsigned value;
    do {
        for (int i = 0; i < 16; i++) {
            value = atomic_load_explicit(word, memory_order_acquire);
            if (value != seen) {
                return value;
            }
            relax();
        }
    } while (sa_clock_ns() < end);
    return value;
}

/* ---- tasks ---- */

static bool
poll_stops(sa_ctx *ctx)
{
    if (ctx->poll == NULL) {
        return false;
    }
    const int64_t now = sa_clock_coarse_ns(); /* 4 ms are fine enough */
    if (ctx->poll_at == 0) {
        ctx->poll_at = now + POLL_NS; /* Python has looked at its signals just before the call */
    }
    if (now < ctx->poll_at) {
        return false;
    }
    const bool stop = ctx->poll(ctx->poll_arg) != 0;
    ctx->poll_at = sa_clock_coarse_ns() + POLL_NS;
    if (stop) {
        atomic_fetch_or(&ctx->stop, STOP_ASKED);
    }
    return stop;
}

bool
sa_stop_asked(sa_ctx *ctx, int worker)
{
    return sa_stopped(ctx) || (worker == 0 && poll_stops(ctx));
}

/* Takes tasks of the open region until there are none, or a reason to stop. */
static void
work(int slot)
{
    const region *r = &pool.now;
    here.ctx = r->ctx;
    here.worker = slot;
    while (!sa_stop_asked(r->ctx, slot)) {
        const int64_t task = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed);
        if (task >= r->n_tasks) {
            break;
        }
        const sa_status status = r->fn(r->ctx, r->arg, task, slot);
        if (status != SA_OK) {
            int none = SA_OK;
            atomic_compare_exchange_strong(&pool.status, &none, (int)status);
            atomic_fetch_or(&r->ctx->stop, STOP_FAILED);
        }
    }
    here.ctx = NULL;
}

/* All tasks on this thread: the pool is taken, or this is a call from inside a task. */
static sa_status
run_inline(sa_ctx *ctx, int64_t n_tasks, sa_task_fn fn, void *arg)
{
    const int outer_worker = here.worker;
    sa_ctx *const outer = here.ctx;
    const int slot = outer == ctx ? outer_worker : 0;
    sa_status status = SA_OK;
    here.ctx = ctx;
    here.worker = slot;
    for (int64_t task = 0; task < n_tasks && status == SA_OK; task++) {
        status = sa_stop_asked(ctx, slot) ? SA_ESTOP : fn(ctx, arg, task, slot);
    }
    here.ctx = outer;
    here.worker = outer_worker;
    return (atomic_load(&ctx->stop) & ~STOP_FAILED) ? SA_ESTOP : status;
}

/* ---- workers ---- */

static bool
enter(void)
{
    unsigned gate = atomic_load(&pool.gate);
    while (gate & OPEN) {
        if (atomic_compare_exchange_weak(&pool.gate, &gate, gate + 1)) {
            return true;
        }
    }
    return false;
}

static void
leave(void)
{
    if (atomic_fetch_sub(&pool.gate, 1) == 1 && atomic_load(&pool.caller_asleep)) {
        unpark(&pool.gate);
    }
}

/* Waits for a call beyond the `seen`-th. */
static unsigned
await_call(worker *me, unsigned seen)
{
    unsigned call = spin(&me->call, seen, spin_ns(SPIN_NS));
    while (call == seen) {
        atomic_store(&me->state, ASLEEP);
        /* After setting state: now either we see the call, or the caller sees us asleep. */
        if (atomic_load(&me->call) == seen) {
            park(&me->call, seen, 0);
        }
        int asleep = ASLEEP;
        if (!atomic_compare_exchange_strong(&me->state, &asleep, AWAKE)) {
            while (atomic_load(&me->state) != AWAKE) {
                yield();
            }
        }
        call = atomic_load(&me->call);
    }
    return call;
}

static thread_end
serve(void *arg)
{
    worker *me = arg;
    unsigned seen = 0;
    place_self(&me->where);
    (void)arithmetic_begin();
    for (;;) {
        seen = await_call(me, seen);
        place_free(&me->where);
        if (enter()) {
            if (me->slot < pool.now.threads) {
                work(me->slot);
            }
            leave();
        }
    }
    return 0;
}

static void
call_worker(worker *w)
{
    atomic_fetch_add(&w->call, 1);
    int asleep = ASLEEP;
    if (atomic_load(&w->state) == ASLEEP &&
        atomic_compare_exchange_strong(&w->state, &asleep, CALLED)) {
        if (!atomic_load(&pool.crowded)) {
            place_elsewhere(&w->where);
        }
        atomic_store(&w->state, AWAKE);
        unpark(&w->call);
    }
}

static bool
start_worker(int slot)
{
    worker *me = &pool.workers[slot];
    me->slot = slot;
    return start_thread(serve, me, STACK_BYTES);
}

/* ---- fork ---- */

/* In the child no worker lives, and the region of another thread never ends. */
static void
forget_workers(void)
{
    atomic_store(&pool.gate, 0);
    atomic_store(&pool.caller_asleep, false);
    pool.started = 0;
    for (int i = 0; i < SA_MAX_THREADS; i++) {
        worker *w = &pool.workers[i];
        atomic_store(&w->call, 0);
        atomic_store(&w->state, AWAKE);
        w->where.placed = false;
    }
    park_reset();
    atomic_fetch_add(&pool.forks, 1);
    mark_process();
    atomic_store(&pool.busy, false);
}

/* ---- regions ---- */

static void
prepare(void)
{
    pool.cpus = sa_cpus_affine();
    watch_forks(forget_workers);
    pool.prepared = true;
}

/* Starts what is missing; how many threads the region can have. */
static int
gather(int threads)
{
    if (!pool.prepared) {
        prepare();
    }
    while (pool.started + 1 < threads && start_worker(pool.started + 1)) {
        pool.started++;
    }
    return SA_MIN(threads, pool.started + 1);
}

/* Closes the gate and waits for those inside. */
static void
wait_workers(sa_ctx *ctx)
{
    unsigned gate = atomic_fetch_and(&pool.gate, ~OPEN) & ~OPEN;
    const int64_t end = gate != 0 ? sa_clock_ns() + spin_ns(CALLER_SPIN_NS) : 0;
    while (gate != 0 && sa_clock_ns() < end) {
        gate = spin(&pool.gate, gate, CROWDED_SPIN_NS);
    }
    while (gate != 0) {
        atomic_store(&pool.caller_asleep, true);
        gate = atomic_load(&pool.gate); /* after caller_asleep, as in await_call */
        if (gate != 0) {
            park(&pool.gate, gate, POLL_NS);
        }
        atomic_store(&pool.caller_asleep, false);
        (void)poll_stops(ctx);
        gate = atomic_load(&pool.gate);
    }
}

static sa_status
run_region(sa_ctx *ctx, int threads)
{
    const unsigned forks = atomic_load(&pool.forks);
    atomic_store(&pool.status, SA_OK);
    atomic_store(&pool.next, 0);
    atomic_store(&pool.gate, OPEN);
    for (int i = 1; i < threads; i++) {
        call_worker(&pool.workers[i]);
    }
    work(0);
    wait_workers(ctx);
    if (atomic_load(&pool.forks) != forks) {
        return sa_fail(ctx, SA_EINTERNAL,
                       "the process was forked inside this call and its other tasks are lost in "
                       "the child; do not fork in a signal handler");
    }
    const int stop = atomic_fetch_and(&ctx->stop, ~STOP_FAILED);
    return (stop & ~STOP_FAILED) ? SA_ESTOP : (sa_status)atomic_load(&pool.status);
}

static sa_status
run(sa_ctx *ctx, int64_t n_tasks, sa_task_fn fn, void *arg)
{
    int threads = (int)SA_MIN((int64_t)sa_num_threads(), n_tasks);
    if (ctx->slots > 0) {
        threads = SA_MIN(threads, ctx->slots);
    }
    if (threads < 2 || here.ctx != NULL) { /* the second: a call from inside a task */
        return run_inline(ctx, n_tasks, fn, arg);
    }
    if (is_copy()) {
        forget_workers();
    }
    if (atomic_exchange(&pool.busy, true)) {
        return run_inline(ctx, n_tasks, fn, arg);
    }
    threads = gather(threads);
    pool.now = (region){ctx, fn, arg, n_tasks, threads};
    atomic_store_explicit(&pool.crowded, threads > pool.cpus, memory_order_relaxed);
    const sa_status status = run_region(ctx, threads);
    atomic_store(&pool.busy, false);
    return status;
}

sa_status
sa_parallel(sa_ctx *ctx, int64_t n_tasks, sa_task_fn fn, void *arg)
{
    const arithmetic before = arithmetic_begin();
    const sa_status status = run(ctx, n_tasks, fn, arg);
    arithmetic_end(before);
    return status;
}

int
sa_workers_max(void)
{
    return SA_MAX_THREADS;
}
