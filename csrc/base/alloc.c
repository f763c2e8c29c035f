/* alloc.c - one line before each block remembers its size; everything else follows from that. */
#include "base/pages_os.h" /* first: it asks the system for more than C11 */

#include <assert.h>
#include <stdatomic.h>
#include <string.h>

#include "base/alloc.h"

#if defined(__SANITIZE_ADDRESS__)
#define ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ASAN 1
#endif
#endif
#ifdef ASAN
#include <sanitizer/asan_interface.h>
#define HIDE(address, bytes) ASAN_POISON_MEMORY_REGION(address, bytes)
#define SHOW(address, bytes) ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#else
#define ASAN 0
#define HIDE(address, bytes) ((void)(address), (void)(bytes))
#define SHOW(address, bytes) ((void)(address), (void)(bytes))
#endif

enum { FILL = 0xFF, FENCE = 0xFB, PIECES = 64, SITES = 512 };

#define MAX_BYTES ((size_t)1 << (sizeof(size_t) == 8 ? 47 : 30)) /* no address space holds more */

typedef struct {
    size_t bytes;
    bool fenced; /* a red zone of SA_ALIGN bytes follows the block */
} block;

_Static_assert(sizeof(block) <= SA_ALIGN, "a header fits into one line");

static atomic_int_fast64_t live, peak, fail_in, breaches;
static atomic_bool poison;
static _Atomic(const char *) failed[SITES]; /* those that are there come first */

static bool
intact(const unsigned char *zone, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        if (zone[i] != FENCE) {
            return false;
        }
    }
    return true;
}

static void
count_breach(void)
{
    atomic_fetch_add_explicit(&breaches, 1, memory_order_relaxed);
}

static void
note_failure(const char *site)
{
    for (int i = 0; i < SITES; i++) {
        const char *there = NULL;
        if (atomic_compare_exchange_strong(&failed[i], &there, site) || strcmp(there, site) == 0) {
            return;
        }
    }
}

/* Counts down to the allocation that a test wants to fail. */
static bool
fails_now(const char *site)
{
    if (atomic_load_explicit(&fail_in, memory_order_relaxed) > 0 &&
        atomic_fetch_sub(&fail_in, 1) == 1) {
        note_failure(site);
        return true;
    }
    return false;
}

static void
count_live(int64_t bytes)
{
    const int64_t now = atomic_fetch_add_explicit(&live, bytes, memory_order_relaxed) + bytes;
    int_fast64_t top = atomic_load_explicit(&peak, memory_order_relaxed);
    while (now > top && !atomic_compare_exchange_weak_explicit(
                            &peak, &top, now, memory_order_relaxed, memory_order_relaxed)) {
    }
}

void *
sa_malloc_at(size_t bytes, const char *site)
{
    if (bytes > MAX_BYTES || fails_now(site)) {
        return NULL;
    }
    const bool fenced = atomic_load_explicit(&poison, memory_order_relaxed);
    const size_t body = (bytes + SA_ALIGN - 1) / SA_ALIGN * SA_ALIGN;
    unsigned char *memory = take_pages(SA_ALIGN, SA_ALIGN + body + (fenced ? SA_ALIGN : 0));
    if (memory == NULL) {
        return NULL;
    }
    *(block *)memory = (block){.bytes = bytes, .fenced = fenced};
    count_live((int64_t)bytes);
    if (fenced) {
        memset(memory + SA_ALIGN, FILL, bytes);
        memset(memory + SA_ALIGN + bytes, FENCE, body - bytes + SA_ALIGN);
    }
    HIDE(memory + SA_ALIGN + bytes, body - bytes);
    return memory + SA_ALIGN;
}

void
sa_free(void *memory)
{
    if (memory == NULL) {
        return;
    }
    block *head = (block *)((unsigned char *)memory - SA_ALIGN);
    const size_t bytes = head->bytes, body = (bytes + SA_ALIGN - 1) / SA_ALIGN * SA_ALIGN;
    unsigned char *end = (unsigned char *)memory + bytes;
    SHOW(memory, body); /* an arena may have hidden parts of its block */
    if (head->fenced && !intact(end, body - bytes + SA_ALIGN)) {
        count_breach();
    }
    if (atomic_load_explicit(&poison, memory_order_relaxed)) {
        memset(memory, FILL, bytes);
    }
    atomic_fetch_sub_explicit(&live, (int64_t)bytes, memory_order_relaxed);
    give_pages(head);
}

bool
sa_mul(size_t a, size_t b, size_t *product)
{
    return !__builtin_mul_overflow(a, b, product);
}

bool
sa_add(size_t a, size_t b, size_t *sum)
{
    return !__builtin_add_overflow(a, b, sum);
}

void *
sa_malloc_array_at(size_t count, size_t size, const char *site)
{
    size_t bytes;
    return sa_mul(count, size, &bytes) ? sa_malloc_at(bytes, site) : NULL;
}

int64_t
sa_live_bytes(void)
{
    return atomic_load(&live);
}

int64_t
sa_peak_bytes(void)
{
    return atomic_load(&peak);
}

void
sa_peak_reset(void)
{
    atomic_store(&peak, atomic_load(&live));
}

void
sa_poison_set(bool on)
{
    atomic_store(&poison, on);
}

int64_t
sa_breaches(void)
{
    return atomic_load(&breaches);
}

void
sa_fail_set(int64_t nth)
{
    atomic_store(&fail_in, nth);
}

const char *
sa_failed_site(int n)
{
    return n >= 0 && n < SITES ? atomic_load(&failed[n]) : NULL;
}

/* A red zone is SA_ALIGN bytes: FENCE bytes, then where the red zone before it ends. */
enum { ZONE = SA_ALIGN, ZONE_FENCE = SA_ALIGN - (int)sizeof(size_t) };

static void
put_zone(sa_arena *arena)
{
    unsigned char *zone = arena->base + arena->used;
    memset(zone, FENCE, ZONE_FENCE);
    memcpy(zone + ZONE_FENCE, &arena->fence, sizeof arena->fence);
    HIDE(zone, ZONE);
    arena->used += ZONE;
    arena->fence = arena->used;
}

/* Checks and forgets the red zones that lie beyond `used`. */
static void
drop_zones(sa_arena *arena)
{
    while (arena->fence > arena->used) {
        unsigned char *zone = arena->base + arena->fence - ZONE;
        size_t before;
        SHOW(zone, ZONE);
        memcpy(&before, zone + ZONE_FENCE, sizeof before);
        if (!intact(zone, ZONE_FENCE) || before >= arena->fence) {
            count_breach(); /* the chain cannot be trusted any further */
            before = 0;
        }
        arena->fence = before;
    }
}

static void
hide_rest(const sa_arena *arena)
{
    if (arena->base != NULL) {
        HIDE(arena->base + arena->used, arena->size - arena->used);
    }
}

bool
sa_arena_reserve(sa_arena *arena, size_t bytes)
{
    sa_arena_reset(arena);
    arena->fenced = ASAN || atomic_load_explicit(&poison, memory_order_relaxed);
    size_t size;
    if (!sa_add(bytes, PIECES * (SA_ALIGN + (arena->fenced ? ZONE : 0)), &size)) {
        return false;
    }
    if (size > arena->size) {
        sa_free(arena->base); /* first, so that old and new are never held together */
        arena->base = sa_malloc(size);
        arena->size = arena->base != NULL ? size : 0;
        hide_rest(arena);
    }
    return size <= arena->size;
}

void *
sa_arena_take(sa_arena *arena, size_t bytes)
{
    drop_zones(arena); /* whoever gave pieces back may have done so by setting `used` */
    const size_t room = arena->size - arena->used, zone = arena->fenced ? ZONE : 0;
    size_t body;
    if (!sa_add(bytes, SA_ALIGN - 1, &body) || (body = body / SA_ALIGN * SA_ALIGN) > room ||
        room - body < zone) {
        return NULL;
    }
    unsigned char *piece = arena->base + arena->used;
    assert((uintptr_t)piece % SA_ALIGN == 0);
    arena->used += body;
    if (arena->fenced) {
        SHOW(piece, body + ZONE);
        memset(piece, FILL, body);
        put_zone(arena);
        HIDE(piece + bytes, body - bytes);
    }
    return piece;
}

void *
sa_arena_take_array(sa_arena *arena, size_t count, size_t size)
{
    size_t bytes;
    return sa_mul(count, size, &bytes) ? sa_arena_take(arena, bytes) : NULL;
}

void
sa_arena_back(sa_arena *arena, size_t used)
{
    assert(used <= arena->used);
    arena->used = used;
    drop_zones(arena);
    hide_rest(arena);
}

void
sa_arena_reset(sa_arena *arena)
{
    sa_arena_back(arena, 0);
}

void
sa_arena_free(sa_arena *arena)
{
    sa_arena_reset(arena);
    sa_free(arena->base);
    *arena = (sa_arena){0};
}
