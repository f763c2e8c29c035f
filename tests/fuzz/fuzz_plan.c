/* fuzz_plan.c - plans from outside: any scalars and arrays, as python/plan_arrays.c copies them.
 * What sa_plan_validate lets pass runs, shows no key twice and none that a row may not see. */
#include "base/threads.h"
#include "bytes.h"
#include "engine/attend.h"

enum { MOST = 4096, DIM = 2 };

/* Numbers as many as a plan of these scalars needs, or NULL where that is more than MOST. */
static void *
numbers(bytes *b, int64_t rows, int64_t columns, int64_t more, size_t size)
{
    size_t count;
    if (rows < 0 || columns < 0 || !sa_mul((size_t)rows, (size_t)columns, &count) ||
        !sa_add(count, (size_t)more, &count) || count > MOST) {
        return NULL;
    }
    char *const made = sa_malloc_array(count, size);
    EXPECT(made != NULL);
    for (size_t x = 0; x < count; x++) {
        const int64_t number = take_number(b);
        const int32_t narrow = (int32_t)(uint32_t)(uint64_t)number;
        memcpy(made + x * size, size == sizeof number ? (const void *)&number : &narrow, size);
    }
    return made;
}

/* The plan that the bytes say, NULL where no arrays fit its scalars. */
static sa_plan *
plan_of(bytes *b)
{
    sa_plan *const p = sa_malloc(sizeof *p);
    EXPECT(p != NULL);
    memset(p, 0, sizeof *p);
    const int flags = take(b);
    p->per_batch = flags & 1;
    p->n_q = take_number(b);
    p->n_k = take_number(b);
    p->batch = take_number(b);
    p->heads = take_number(b);
    p->heads_per_map = (int32_t)(uint32_t)(uint64_t)take_number(b);
    p->rows_per_block = (int32_t)(uint32_t)(uint64_t)take_number(b);
    p->n_blocks = take_number(b);
    p->n_maps = take_number(b);
    p->n_spans = take_number(b);
    p->see_maps = take_number(b);
    p->band_maps = take_number(b);
    p->span_len = (int32_t)(uint32_t)(uint64_t)take_number(b);
    p->row_start = numbers(b, 1, p->n_blocks, 0, sizeof(int32_t));
    p->row_ptr = numbers(b, p->n_maps, p->n_blocks, 1, sizeof(int64_t));
    p->see_ptr = numbers(b, p->n_maps, p->n_blocks, 0, sizeof(int64_t));
    p->band_ptr = numbers(b, p->n_maps, p->n_blocks, 0, sizeof(int64_t));
    p->start = numbers(b, 1, p->n_spans, 0, sizeof(int32_t));
    p->len = flags & 2 ? numbers(b, 1, p->n_spans, 0, sizeof(int32_t)) : NULL;
    p->see_lo = numbers(b, p->see_maps, p->n_q, 0, sizeof(int32_t));
    p->see_hi = numbers(b, p->see_maps, p->n_q, 0, sizeof(int32_t));
    if (flags & 4) {
        p->band_lo = numbers(b, p->band_maps, p->n_q, 0, sizeof(int32_t));
        p->band_hi = numbers(b, p->band_maps, p->n_q, 0, sizeof(int32_t));
    }
    if (!p->row_start || !p->row_ptr || !p->see_ptr || !p->band_ptr || !p->start || !p->see_lo ||
        !p->see_hi) {
        sa_plan_free(p);
        return NULL;
    }
    return p;
}

static sa_view
ones(int64_t batch, int64_t heads, int64_t rows, int64_t dim)
{
    const int64_t count = batch * heads * rows * dim;
    sa_view v = {.dtype = SA_F32,
                 .size = {batch, heads, rows, dim},
                 .stride = {heads * rows * dim, rows * dim, dim, 1}};
    v.data = sa_malloc_array((size_t)SA_MAX(count, 1), sizeof(float));
    EXPECT(v.data != NULL);
    for (int64_t x = 0; x < count; x++) {
        ((float *)v.data)[x] = 1.0f;
    }
    return v;
}

/* Rows attend over keys of equal score and value 1: 1 where a row sees any key, else 0. */
static void
attend(sa_ctx *ctx, const sa_plan *plan, const sa_problem *sizes, const unsigned char *mask)
{
    sa_problem p = *sizes;
    sa_view out = ones(p.batch, p.heads, p.n_q, DIM);
    p.q = ones(p.batch, p.heads, p.n_q, DIM);
    p.k = ones(p.batch, p.heads, p.n_k, DIM);
    p.v = ones(p.batch, p.heads, p.n_k, DIM);
    p.scale = 0.5;
    const sa_part part = {plan, 0, p.heads};
    EXPECT(sa_problem_check(ctx, &p) == SA_OK);
    EXPECT(sa_attend(ctx, out, (sa_view){0}, &p, &part, 1) == SA_OK);
    for (int64_t row = 0; row < p.batch * p.heads * p.n_q; row++) {
        bool any = false;
        for (int64_t j = 0; j < p.n_k; j++) {
            any = any || mask[row * p.n_k + j];
        }
        const float got = ((float *)out.data)[row * DIM];
        EXPECT(any ? got > 0.999f && got < 1.001f : got == 0.0f);
    }
    sa_free(out.data);
    sa_free(p.q.data);
    sa_free(p.k.data);
    sa_free(p.v.data);
}

/* A plan that passed, on a problem of its sizes. */
static void
run(sa_ctx *ctx, const sa_plan *plan)
{
    sa_problem p = {.batch = plan->batch,
                    .heads = plan->heads,
                    .kv_heads = plan->heads,
                    .n_q = plan->n_q,
                    .n_k = plan->n_k,
                    .dim = DIM,
                    .dim_v = DIM};
    size_t cells = (size_t)SA_MAX(p.batch, 1);
    if (!sa_mul(cells, (size_t)p.heads, &cells) || !sa_mul(cells, (size_t)p.n_q + 1, &cells) ||
        !sa_mul(cells, (size_t)p.n_k + 1, &cells) || cells > 1 << 16) {
        return;
    }
    sa_plan_counts counts;
    int64_t shown = 0;
    EXPECT(sa_plan_count(ctx, plan, &p, &counts) == SA_OK);
    unsigned char *const mask = sa_malloc(cells);
    EXPECT(mask != NULL);
    for (int64_t row = 0; row < p.batch * p.heads; row++) {
        unsigned char *const here = mask + row * p.n_q * p.n_k;
        const int64_t b = row / p.heads, see = plan->see_maps > 1 ? b * p.n_q : 0;
        EXPECT(sa_plan_to_mask(ctx, plan, &p, b, row % p.heads, here) == SA_OK);
        for (int64_t x = 0; x < p.n_q * p.n_k; x++) {
            const int64_t i = x / p.n_k, j = x % p.n_k;
            shown += here[x];
            EXPECT(!here[x] || (plan->see_lo[see + i] <= j && j < plan->see_hi[see + i]));
        }
    }
    EXPECT(shown == counts.kept && counts.kept <= counts.visible);
    attend(ctx, plan, &p, mask);
    sa_free(mask);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    bytes b = {data, size};
    sa_num_threads_set(1);
    sa_plan *const plan = plan_of(&b);
    if (plan != NULL) {
        sa_ctx *const ctx = sa_ctx_acquire();
        EXPECT(ctx != NULL);
        const sa_status status = sa_plan_validate(ctx, plan);
        EXPECT(status == SA_OK || (status == SA_EINVAL && ctx->message[0] != '\0'));
        if (status == SA_OK) {
            run(ctx, plan);
        }
        sa_ctx_release(ctx);
        sa_plan_free(plan);
    }
    return 0;
}
