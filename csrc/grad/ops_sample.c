/* ops_sample.c - the next token: drawn from rows of logits by one uniform number each, or the
 * largest.
 *
 *   p = softmax(x / temperature), cut to the top_k largest (and their equals), then to the fewest
 *   likeliest tokens whose mass reaches top_p of what is left
 *
 * in the order of Hugging Face's processors. A token is found in the order of the vocabulary, or
 * where some are cut off in falling order; equals go by their index. Sums are float64. */
#include <math.h>

#include "base/alloc.h"
#include "engine/select.h"
#include "grad/chunks.h"
#include "grad/ops.h"

typedef struct {
    int32_t *token;
    const float *logits;
    const double *u;
    int64_t vocab;
    sa_sampling how;
    const sa_rows *table;
} sample_job;

typedef struct {
    float x; /* (logit - largest) / temperature */
    int32_t token;
} candidate;

enum { CHUNK = 256 }; /* of the vocabulary, passed over by its sum */

static bool
cuts(const sample_job *j)
{
    return j->how.top_k < j->vocab || j->how.top_p < 1;
}

/* The token where the running sum of exp(x) passes u times the whole. */
static int32_t
draw_from_all(const sample_job *j, const float *x, double u)
{
    const double target = u * j->table->exp_sum(x, j->vocab, 0);
    double sum = 0;
    int32_t last = 0; /* of weight above 0: where rounding carries the target past the end */
    for (int64_t i = 0; i < j->vocab; i += CHUNK) {
        const int64_t end = SA_MIN(i + CHUNK, j->vocab);
        const double part = j->table->exp_sum(x + i, end - i, 0);
        if (sum + part <= target && end < j->vocab) {
            sum += part;
            continue;
        }
        for (int64_t v = i; v < end; v++) {
            const double weight = exp((double)x[v]);
            sum += weight;
            last = weight > 0 ? (int32_t)v : last;
            if (sum > target) {
                return last;
            }
        }
    }
    return last;
}

static bool
before(candidate a, candidate b)
{
    return a.x > b.x || (a.x == b.x && a.token < b.token);
}

/* Lets heap[at] sink to its place; the first of all is heap[0]. */
static void
sink(candidate *heap, int64_t count, int64_t at)
{
    const candidate one = heap[at];
    for (int64_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && before(heap[child + 1], heap[child])) {
            child++;
        }
        if (!before(heap[child], one)) {
            break;
        }
        heap[at] = heap[child];
    }
    heap[at] = one;
}

/* The least x that top_k lets stand: the k-th largest. */
static float
least_of_top(const sample_job *j, const float *x, int32_t *index, void *scratch)
{
    const int64_t n = sa_select_largest_f32(x, j->vocab, j->how.top_k, index, scratch);
    float least = INFINITY;
    for (int64_t i = 0; i < n; i++) {
        least = SA_MIN(least, x[index[i]]);
    }
    return least;
}

/* All that top_p may need. Tokens that each weigh less than (1 - top_p) / vocab of the whole weigh
 * less than 1 - top_p together: the others suffice. */
static float
least_of_mass(const sample_job *j, double total)
{
    const double tail = (1 - j->how.top_p) * total / (double)j->vocab;
    return (float)(log(tail) - 1e-3); /* and a margin for rounding */
}

static int64_t
collect(const sample_job *j, candidate *found, const float *x, float least)
{
    int64_t count = 0;
    for (int64_t v = 0; v < j->vocab; v++) {
        if (x[v] >= least && x[v] > -INFINITY) {
            found[count++] = (candidate){x[v], (int32_t)v};
        }
    }
    return count;
}

/* Takes candidates from the heap, which leaves them in falling order at the array's end, until
 * their mass suffices; then walks over those taken. */
static int32_t
draw_from_heap(candidate *heap, int64_t count, double enough, double u)
{
    double mass = 0, sum = 0;
    int64_t left = count;
    for (int64_t at = count / 2 - 1; at >= 0; at--) {
        sink(heap, count, at);
    }
    while (left > 0 && (left == count || mass < enough)) {
        const candidate best = heap[0];
        mass += exp((double)best.x);
        heap[0] = heap[--left];
        sink(heap, left, 0);
        heap[left] = best;
    }
    int64_t at = count;
    do {
        sum += exp((double)heap[--at].x);
    } while (at > left && sum <= u * mass);
    return heap[at].token;
}

/* -1 where there is nothing to draw from. */
static int32_t
draw_from_best(const sample_job *j, candidate *found, const float *x, double u, int32_t *index,
               void *scratch)
{
    double total = 0;
    int64_t count;
    if (j->how.top_k < j->vocab) {
        count = collect(j, found, x, least_of_top(j, x, index, scratch));
        for (int64_t i = 0; i < count; i++) {
            total += exp((double)found[i].x);
        }
    } else {
        total = j->table->exp_sum(x, j->vocab, 0);
        count = collect(j, found, x, least_of_mass(j, total));
    }
    return count > 0 ? draw_from_heap(found, count, j->how.top_p * total, u) : -1;
}

static size_t
scratch_of(const sample_job *j, size_t sizes[4])
{
    const size_t n = (size_t)j->vocab;
    const int64_t k = SA_MIN(j->how.top_k, j->vocab);
    const bool cut = cuts(j);
    sizes[0] = n * sizeof(float);
    sizes[1] = cut ? n * sizeof(candidate) : 0;
    sizes[2] = k < j->vocab ? (size_t)k * sizeof(int32_t) : 0;
    sizes[3] = k < j->vocab ? sa_select_scratch(j->vocab, k) : 0;
    return sizes[0] + sizes[1] + sizes[2] + sizes[3];
}

static sa_status
sample_row(sa_ctx *ctx, void *arg, int64_t row, int worker)
{
    const sample_job *const j = arg;
    const float *const logits = j->logits + row * j->vocab;
    int64_t at;
    const double top = j->table->peak(logits, j->vocab, &at);
    if (!isfinite(top)) {
        return sa_fail(ctx, SA_EINVAL,
                       "the largest logit of row %lld is %f, so no token can be chosen: the model "
                       "overflows, or its weights hold NaN",
                       (long long)row, top);
    }
    if (j->how.temperature == 0) {
        j->token[row] = (int32_t)at;
        return SA_OK;
    }
    size_t sizes[4];
    scratch_of(j, sizes);
    sa_arena *const scratch = sa_scratch(ctx, worker);
    sa_arena_reset(scratch);
    float *const x = sa_arena_take(scratch, sizes[0]);
    candidate *const found = sa_arena_take(scratch, sizes[1]);
    int32_t *const index = sa_arena_take(scratch, sizes[2]);
    void *const select = sa_arena_take(scratch, sizes[3]);
    for (int64_t v = 0; v < j->vocab; v++) {
        x[v] = (float)(((double)logits[v] - top) / j->how.temperature);
    }
    const int32_t token = cuts(j) ? draw_from_best(j, found, x, j->u[row], index, select)
                                  : draw_from_all(j, x, j->u[row]);
    /* none: another thread of the caller's has written over the logits */
    j->token[row] = token >= 0 ? token : (int32_t)at;
    return SA_OK;
}

sa_status
sa_op_sample(sa_ctx *ctx, int32_t *token, const float *logits, const double *u, int64_t rows,
             int64_t vocab, sa_sampling how)
{
    sample_job job = {.token = token, .logits = logits, .u = u, .vocab = vocab, .how = how};
    size_t sizes[4];
    job.table = sa_rows_for(false);
    const sa_status status = sa_scratch_reserve(ctx, scratch_of(&job, sizes));
    return status != SA_OK ? status : sa_chunk_run(ctx, rows, 1, sample_row, &job);
}
