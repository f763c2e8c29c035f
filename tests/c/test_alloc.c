/* test_alloc.c - counted memory, checked sizes, red zones, arenas, contexts, failing allocations.
 */
#include <string.h>

#include "base/ctx.h"
#include "base/threads.h"
#include "check.h"

static void
check_blocks(void)
{
    static const size_t sizes[] = {0, 1, 63, 64, 65, 4096, 100001, 5u << 20};
    enum { N = sizeof sizes / sizeof *sizes };
    unsigned char *blocks[N];
    size_t sum = 0;

    check_case("blocks are aligned, filled and counted");
    const int64_t before = sa_live_bytes();
    sa_peak_reset();
    for (int i = 0; i < N; i++) {
        blocks[i] = sa_malloc(sizes[i]);
        CHECK(blocks[i] != NULL && (uintptr_t)blocks[i] % SA_ALIGN == 0, "%zu bytes", sizes[i]);
        for (size_t b = 0; b < sizes[i]; b++) {
            if (!CHECK(blocks[i][b] == 0xFF, "byte %zu of %zu is not poisoned", b, sizes[i])) {
                break;
            }
        }
        memset(blocks[i], i, sizes[i]);
        sum += sizes[i];
    }
    CHECK(sa_live_bytes() - before == (int64_t)sum, "live");
    for (int i = 0; i < N; i++) {
        CHECK(sizes[i] == 0 || blocks[i][sizes[i] - 1] == i, "blocks overlap");
        sa_free(blocks[i]);
    }
    sa_free(NULL);
    CHECK(sa_live_bytes() == before, "live after sa_free");
    CHECK(sa_peak_bytes() - before == (int64_t)sum, "peak");
    sa_peak_reset();
    CHECK(sa_peak_bytes() == before, "peak after reset");
}

static void
check_sizes(void)
{
    check_case("sizes that do not fit are refused");
    size_t x = 0;
    CHECK(sa_mul(1u << 16, 1u << 15, &x) && x == (size_t)1 << 31, "2^31");
    CHECK(sa_mul(SIZE_MAX, 1, &x) && x == SIZE_MAX, "SIZE_MAX * 1");
    CHECK(!sa_mul(SIZE_MAX / 2 + 1, 2, &x), "2^64");
    CHECK(!sa_mul(SIZE_MAX, SIZE_MAX, &x), "SIZE_MAX^2");
    CHECK(sa_add(SIZE_MAX - 1, 1, &x) && x == SIZE_MAX, "SIZE_MAX - 1 + 1");
    CHECK(!sa_add(SIZE_MAX, 1, &x), "SIZE_MAX + 1");
    CHECK(sa_malloc_array(SIZE_MAX / 8, 16) == NULL, "a product that wraps");
    CHECK(sa_malloc(SIZE_MAX) == NULL, "SIZE_MAX bytes");
    CHECK(sa_malloc(SIZE_MAX - 127) == NULL, "a size that wraps with its header");
    void *array = sa_malloc_array(3, 5);
    CHECK(array != NULL, "an array");
    sa_free(array);
}

static void
check_failures(void)
{
    check_case("the n-th allocation fails, once");
    for (int nth = 1; nth <= 3; nth++) {
        sa_fail_set(nth);
        for (int i = 1; i <= 4; i++) {
            void *memory = sa_malloc(8);
            CHECK((memory == NULL) == (i == nth), "allocation %d with %d", i, nth);
            sa_free(memory);
        }
    }
    sa_fail_set(1);
    sa_fail_set(0);
    void *memory = sa_malloc(8);
    CHECK(memory != NULL, "switched off");
    sa_free(memory);
}

static void
check_arena(void)
{
    check_case("pieces of an arena");
    sa_arena arena = {0};
    CHECK(sa_arena_take(&arena, 1) == NULL, "an arena without a block");
    CHECK(sa_arena_reserve(&arena, 1000), "reserve");
    unsigned char *a = sa_arena_take(&arena, 500);
    const size_t mark = arena.used;
    unsigned char *b = sa_arena_take(&arena, 500);
    CHECK(a && b && (uintptr_t)a % SA_ALIGN == 0 && (uintptr_t)b % SA_ALIGN == 0, "two halves");
    CHECK(a && b && b - a >= 500 && a[0] == 0xFF && b[499] == 0xFF, "apart and filled");
    CHECK(sa_arena_take(&arena, 16000) == NULL, "more than was reserved");
    CHECK(sa_arena_take(&arena, SIZE_MAX) == NULL, "SIZE_MAX");
    memset(a, 1, 500);
    memset(b, 2, 500);
    sa_arena_back(&arena, mark);
    unsigned char *again = sa_arena_take(&arena, 400);
    CHECK(again == b && again[0] == 0xFF && a[499] == 1, "given back and taken again");
    arena.used = mark; /* the short way to give back */
    CHECK(sa_arena_take(&arena, 300) == b, "given back by hand");
    sa_arena_reset(&arena);
    CHECK(sa_arena_take(&arena, 1000) == a, "the whole after a reset");
    const int64_t held = sa_live_bytes();
    CHECK(sa_arena_reserve(&arena, 10) && sa_live_bytes() == held,
          "a smaller wish keeps the block");
    CHECK(!sa_arena_reserve(&arena, SIZE_MAX - 100), "a size that wraps");
    sa_fail_set(1);
    CHECK(!sa_arena_reserve(&arena, 1 << 20), "no memory");
    sa_fail_set(0);
    CHECK(sa_arena_take(&arena, 1 << 20) == NULL, "nothing to take then");
    sa_arena_free(&arena);

    check_case("64 odd pieces fit into what was asked for");
    CHECK(sa_arena_reserve(&arena, 64 * 3), "reserve");
    for (int i = 0; i < 64; i++) {
        CHECK(sa_arena_take(&arena, 3) != NULL, "piece %d", i);
    }
    sa_arena_free(&arena);
    CHECK(sa_breaches() == 0, "%lld", (long long)sa_breaches());
}

/* In a child, because breaches are counted for good. Returns the step that failed, or 0. */
static int
break_zones(void *arg)
{
    (void)arg;
    const int64_t seen = sa_breaches();
    unsigned char *block = sa_malloc(100);
    block[100] = 7;
    sa_free(block);
    if (sa_breaches() != seen + 1) {
        return 1;
    }
    block = sa_malloc(128);
    block[128 + 63] = 7; /* the last byte of its red zone */
    sa_free(block);
    if (sa_breaches() != seen + 2) {
        return 2;
    }
    sa_arena arena = {0};
    sa_arena_reserve(&arena, 1000);
    unsigned char *piece = sa_arena_take(&arena, 64);
    sa_arena_take(&arena, 64);
    piece[64] = 7;
    sa_arena_reset(&arena);
    if (sa_breaches() != seen + 3) {
        return 3;
    }
    piece = sa_arena_take(&arena, 64);
    memset(piece, 0, 64); /* all of it, and not more */
    sa_arena_free(&arena);
    return sa_breaches() == seen + 3 ? 0 : 4;
}

static void
check_contexts(void)
{
    check_case("contexts come clean and keep their scratch");
    sa_num_threads_set(2);
    sa_ctx *ctx = sa_ctx_acquire();
    CHECK(sa_scratch_reserve(ctx, 1000) == SA_OK, "reserve");
    CHECK(sa_arena_take(sa_scratch(ctx, 1), 1000) != NULL, "slot 1");
    CHECK(sa_arena_take(sa_scratch(ctx, 2), 1) == NULL, "slot 2 has none");
    CHECK(sa_fail(ctx, SA_EINVAL, "first %d", 1) == SA_EINVAL, "sa_fail returns its code");
    CHECK(sa_fail(ctx, SA_ETYPE, "second") == SA_ETYPE, "also when not the first");
    CHECK(ctx->code == SA_EINVAL && strcmp(ctx->message, "first 1") == 0, "%s", ctx->message);
    atomic_store(&ctx->stop, 1);
    const int64_t held = sa_live_bytes();
    sa_ctx_release(ctx);
    sa_ctx *next = sa_ctx_acquire();
    CHECK(next == ctx && sa_live_bytes() == held, "the same one again");
    CHECK(!sa_stopped(next) && next->code == SA_OK && next->message[0] == '\0' && !next->poll,
          "clean");
    sa_ctx *other = sa_ctx_acquire();
    CHECK(other != NULL && other != next, "two at once");
    sa_ctx_release(other);
    sa_ctx_release(next);
    sa_ctx_release(NULL);

    check_case("a hundred contexts at once");
    sa_ctx *many[100];
    for (int i = 0; i < 100; i++) {
        many[i] = sa_ctx_acquire();
        CHECK(many[i] != NULL, "context %d", i);
    }
    for (int i = 0; i < 100; i++) {
        sa_ctx_release(many[i]);
    }
    sa_scratch_trim();
    CHECK(sa_live_bytes() == 0, "%lld bytes are still held", (long long)sa_live_bytes());

    check_case("contexts without memory");
    sa_fail_set(1);
    CHECK(sa_ctx_acquire() == NULL, "acquire");
    sa_fail_set(0);
    ctx = sa_ctx_acquire();
    for (int nth = 1; nth <= 2; nth++) {
        sa_fail_set(nth);
        CHECK(sa_scratch_reserve(ctx, 1 << 20) == SA_ENOMEM, "allocation %d", nth);
        sa_fail_set(0);
    }
    CHECK(strstr(ctx->message, "1048576 bytes") != NULL, "%s", ctx->message);
    CHECK(sa_scratch_reserve(ctx, 1 << 20) == SA_OK, "afterwards");
    sa_ctx_release(ctx);
}

void
sa_selftest_alloc(void)
{
    check_blocks();
    check_sizes();
    check_failures();
    check_arena();
    check_contexts();
    if (!CHECK_ASAN) { /* which ends the program at such a write */
        check_case("a write past the end is seen");
        const int step = check_child(break_zones, NULL);
        CHECK(step == 0, "step %d", step);
    }
}
