/* ctx.c - contexts are kept between calls, with their scratch, in a fixed row of places. Taking one
 * is an atomic exchange: no lock that a fork could leave held. */
#include "base/ctx.h"

#include <stddef.h>

#include "base/threads.h"
#include "base/view.h"

enum { KEPT = 32 };

typedef struct {
    sa_ctx ctx;
    sa_arena scratch[SA_MAX_THREADS];
} room;

static _Atomic(sa_ctx *) kept[KEPT];

static sa_ctx *
take_kept(void)
{
    for (int i = 0; i < KEPT; i++) {
        sa_ctx *ctx = atomic_exchange(&kept[i], NULL);
        if (ctx != NULL) {
            return ctx;
        }
    }
    return NULL;
}

static void
destroy(sa_ctx *ctx)
{
    for (int i = 0; i < SA_MAX_THREADS; i++) {
        sa_arena_free(&ctx->scratch[i]);
    }
    sa_free(ctx);
}

static sa_ctx *
create(void)
{
    room *made = sa_malloc(sizeof *made);
    if (made == NULL) {
        return NULL;
    }
    *made = (room){.ctx = {.scratch = NULL}};
    made->ctx.scratch = made->scratch;
    return &made->ctx;
}

sa_ctx *
sa_ctx_acquire(void)
{
    sa_ctx *ctx = take_kept();
    if (ctx == NULL && (ctx = create()) == NULL) {
        return NULL;
    }
    atomic_store(&ctx->stop, 0);
    atomic_store(&ctx->failed, 0);
    ctx->poll = NULL;
    ctx->poll_arg = NULL;
    ctx->poll_at = 0;
    ctx->slots = 0;
    ctx->code = SA_OK;
    ctx->message[0] = '\0';
    return ctx;
}

void
sa_ctx_release(sa_ctx *ctx)
{
    if (ctx == NULL) {
        return;
    }
    for (int i = 0; i < SA_MAX_THREADS; i++) {
        sa_arena_reset(&ctx->scratch[i]);
    }
    for (int i = 0; i < KEPT; i++) {
        sa_ctx *vacant = NULL;
        if (atomic_compare_exchange_strong(&kept[i], &vacant, ctx)) {
            return;
        }
    }
    destroy(ctx);
}

sa_status
sa_scratch_reserve(sa_ctx *ctx, size_t bytes)
{
    const int slots = SA_MIN(sa_num_threads(), SA_MAX_THREADS);
    for (int i = 0; i < slots; i++) {
        if (!sa_arena_reserve(&ctx->scratch[i], bytes)) {
            return sa_fail(
                ctx, SA_ENOMEM,
                "no memory for %zu bytes of scratch on each of %d threads; use fewer threads or "
                "smaller inputs",
                bytes, slots);
        }
    }
    ctx->slots = slots;
    return SA_OK;
}

sa_status
sa_scratch_reserve_array(sa_ctx *ctx, size_t count, size_t size)
{
    size_t bytes;
    return sa_scratch_reserve(ctx, sa_mul(count, size, &bytes) ? bytes : SIZE_MAX);
}

void
sa_scratch_trim(void)
{
    for (int i = 0; i < KEPT; i++) {
        sa_ctx *ctx = atomic_exchange(&kept[i], NULL);
        if (ctx != NULL) {
            destroy(ctx);
        }
    }
}
