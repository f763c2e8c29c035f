/* fuzz_problem.c - views of any size and stride: what sa_problem_check lets pass has addresses that
 * are numbers of bytes, and a small one runs inside the memory that its strides reach. */
#include "base/threads.h"
#include "bytes.h"
#include "engine/attend.h"
#include "variants/variant.h"

typedef __int128 wide;

enum { ROOM = 1 << 18, VIEWS = 7 };

/* A view with the bytes' numbers; sizes follow `like` most of the time, so that some fit. */
static sa_view
view_of(bytes *b, const int64_t like[4])
{
    sa_view v = {.dtype = (sa_dtype)take_below(b, SA_I64)};
    const int loose = take(b);
    for (int a = 0; a < 4; a++) {
        v.size[a] = loose & 1 << a ? take_number(b) : like[a];
        v.size[a] = v.size[a] < 0 ? 0 : v.size[a]; /* arrays have no other */
        v.stride[a] = loose & 16 << a ? take_number(b) : 0;
    }
    v.stride[3] = loose & 128 ? v.stride[3] : 1;
    return v;
}

static bool
is_empty(const sa_view *v)
{
    return v->size[0] == 0 || v->size[1] == 0 || v->size[2] == 0 || v->size[3] == 0;
}

/* Elements before and after the first one that the view reaches. */
static void
reach_of(const sa_view *v, wide *below, wide *above)
{
    *below = *above = 0;
    for (int a = 0; a < 4 && !is_empty(v); a++) {
        const wide reach = (wide)(v->size[a] - 1) * v->stride[a];
        *(reach < 0 ? below : above) += reach < 0 ? -reach : reach;
    }
}

/* Gives the view memory of exactly its reach; false where that is more than ROOM. */
static bool
fill(sa_view *v, void **memory)
{
    wide below, above;
    reach_of(v, &below, &above);
    const wide size = (below + above + 1) * (wide)sa_dtype_size(v->dtype);
    if (size > ROOM) {
        return false;
    }
    *memory = calloc(1, (size_t)size);
    EXPECT(*memory != NULL);
    v->data = (char *)*memory + (size_t)below * sa_dtype_size(v->dtype);
    return true;
}

/* The promise: counts and byte distances that stay inside int64. */
static void
expect_sane(const sa_problem *p)
{
    const sa_view views[] = {p->q, p->k, p->v, p->mask, p->bias, p->key_mask};
    for (int x = 0; x < 6; x++) {
        wide below, above;
        if (views[x].data != NULL) {
            reach_of(&views[x], &below, &above);
            EXPECT((below + above + 1) * (wide)sa_dtype_size(views[x].dtype) <= INT64_MAX);
        }
    }
    EXPECT((wide)p->batch * p->heads * p->n_q * p->n_k <= INT64_MAX);
    EXPECT((wide)p->batch * p->heads * p->n_q * SA_MAX(p->dim, p->dim_v) <= INT64_MAX);
    EXPECT(p->kv_heads >= 1 && p->heads % p->kv_heads == 0);
    EXPECT(p->k.size[2] == p->n_k && p->k.size[3] == p->dim);
}

static sa_view
contiguous(const sa_problem *p, sa_dtype dtype, int64_t columns)
{
    const int64_t rows = p->heads * p->n_q;
    sa_view v = {.dtype = dtype,
                 .size = {p->batch, p->heads, p->n_q, columns},
                 .stride = {rows * columns, p->n_q * columns, columns, 1}};
    v.data = calloc((size_t)SA_MAX(p->batch * rows * columns, 1), sa_dtype_size(dtype));
    EXPECT(v.data != NULL);
    return v;
}

/* Attends densely in the very memory that the views reach. */
static void
run(sa_ctx *ctx, sa_problem *p)
{
    const wide cells = (wide)SA_MAX(p->batch, 1) * p->heads * (p->n_q + 1) * (p->n_k + 1);
    if (cells * (p->dim + p->dim_v + 1) > 1 << 16) {
        return;
    }
    sa_view *const views[] = {&p->q, &p->k, &p->v, &p->mask, &p->bias, &p->key_mask, &p->sink};
    void *memory[VIEWS] = {NULL};
    bool fits = true;
    for (int x = 0; x < VIEWS && fits; x++) {
        fits = views[x]->data == NULL || fill(views[x], &memory[x]);
    }
    if (fits) {
        sa_plan *plan = NULL;
        sa_view out = contiguous(p, p->q.dtype, p->dim_v);
        EXPECT(sa_plan_build(ctx, p, sa_planner_find("dense"), NULL, &plan) == SA_OK);
        EXPECT(sa_plan_validate(ctx, plan) == SA_OK);
        const sa_part part = {plan, 0, p->heads};
        EXPECT(sa_attend(ctx, out, (sa_view){0}, p, &part, 1) == SA_OK);
        sa_plan_free(plan);
        free(out.data);
    }
    for (int x = 0; x < VIEWS; x++) {
        free(memory[x]);
    }
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static double somewhere; /* never read: the checks look at numbers alone */
    bytes b = {data, size};
    sa_num_threads_set(1);
    const int there = take(&b);
    const int64_t batch = take_below(&b, 3), kv_heads = 1 + take_below(&b, 2),
                  heads = kv_heads * (1 + take_below(&b, 2)), n_q = take_below(&b, 20),
                  n_k = take_below(&b, 20), dim = 1 + take_below(&b, 16);
    const int64_t likes[VIEWS][4] = {
        {batch, heads, n_q, dim}, {batch, kv_heads, n_k, dim}, {batch, kv_heads, n_k, dim},
        {batch, heads, n_q, n_k}, {batch, heads, n_q, n_k},    {batch, 1, 1, n_k},
        {1, heads, 1, 1}};
    sa_problem p = {.causal = (sa_causal)take_below(&b, 3), .scale = 0.5};
    sa_view *const views[] = {&p.q, &p.k, &p.v, &p.mask, &p.bias, &p.key_mask, &p.sink};
    for (int x = 0; x < VIEWS; x++) {
        if (x < 3 || there & 1 << x) {
            *views[x] = view_of(&b, likes[x]);
            views[x]->data = &somewhere;
        }
    }
    sa_ctx *const ctx = sa_ctx_acquire();
    EXPECT(ctx != NULL);
    const sa_status status = sa_problem_check(ctx, &p);
    EXPECT(status == SA_OK || ctx->message[0] != '\0');
    if (status == SA_OK) {
        expect_sane(&p);
        run(ctx, &p);
    }
    sa_ctx_release(ctx);
    return 0;
}
