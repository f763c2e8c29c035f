/* ctx.h - what every call carries: scratch, stop flag, error text. One call leases one sa_ctx. */
#ifndef SA_CTX_H
#define SA_CTX_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/alloc.h"
#include "base/status.h"

typedef struct sa_ctx {
    atomic_int stop; /* nonzero: leave as soon as possible; workers look between spans */
    /* Called by the calling thread only, every 20 ms, between its tasks and while it waits; nonzero
     * asks to stop (Ctrl-C). It must return. NULL: never. */
    int (*poll)(void *arg);
    void *poll_arg;
    int64_t poll_at;   /* threads.c: time of the next poll, 0: not set yet          */
    sa_arena *scratch; /* one per worker slot, sa_workers_max() of them             */
    int slots;         /* those with scratch: a region uses no others; 0: any       */
    atomic_int failed; /* a message has been recorded                               */
    sa_status code;    /* of the recorded message                                   */
    char message[512];
} sa_ctx;

/* Leases a context with clean error state and empty scratch (memory kept from earlier calls).
 * NULL: no memory. Any number may be leased at once, by any threads. */
sa_ctx *sa_ctx_acquire(void);
void sa_ctx_release(sa_ctx *ctx);

/* Gives every worker slot that this call may use `bytes` of empty scratch; what was taken before is
 * gone, so never from inside a task. SA_ENOMEM. Slot 0 is the calling thread's, slot w the w-th
 * pool thread's. A call that runs inline uses slot 0; nested in a task of the same ctx it uses that
 * task's slot, and may take from it. */
sa_status sa_scratch_reserve(sa_ctx *ctx, size_t bytes);
sa_status sa_scratch_reserve_array(sa_ctx *ctx, size_t count, size_t size);
void sa_scratch_trim(void); /* frees kept scratch of unleased contexts */

static inline sa_arena *
sa_scratch(sa_ctx *ctx, int worker)
{
    return &ctx->scratch[worker];
}

static inline bool
sa_stopped(sa_ctx *ctx)
{
    return atomic_load_explicit(&ctx->stop, memory_order_relaxed) != 0;
}

#endif
