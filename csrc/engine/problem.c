/* problem.c - every check of shapes, strides, dtypes and options of an attention call, in words. */
#include "engine/problem.h"

#include <math.h>

#define MAX_HEADS ((int64_t)1 << 20)
#define MAX_BATCH ((int64_t)1 << 31)
#define MAX_DIM ((int64_t)4096)

typedef long long ll;

/* Product of n sizes as int64, or false. */
static bool
fits(const int64_t *size, int n)
{
    size_t product = 1;
    for (int a = 0; a < n; a++) {
        if (!sa_mul(product, (size_t)size[a], &product)) {
            return false;
        }
    }
    return product <= INT64_MAX;
}

/* The span of addresses of a view is a number of bytes, so that index times stride never wraps. */
static bool
spans_memory(sa_view v)
{
    size_t reach = 1;
    for (int a = 0; a < 4; a++) {
        const int64_t s = v.stride[a];
        const size_t step = s < 0 ? 0 - (size_t)s : (size_t)s;
        size_t part;
        if (v.size[a] == 0) {
            return true;
        }
        if (!sa_mul((size_t)v.size[a] - 1, step, &part) || !sa_add(reach, part, &reach)) {
            return false;
        }
    }
    return sa_mul(reach, sa_dtype_size(v.dtype), &reach) && reach <= INT64_MAX;
}

static sa_status
check_range(sa_ctx *ctx, const char *what, int64_t value, int64_t min, int64_t max)
{
    if (value >= min && value <= max) {
        return SA_OK;
    }
    return sa_fail(ctx, SA_EINVAL, "%s must be in [%lld, %lld], got %lld", what, (ll)min, (ll)max,
                   (ll)value);
}

/* One of q, k, v: its dtype, its last axis, its reach in memory. */
static sa_status
check_tensor(sa_ctx *ctx, const sa_problem *p, const char *name, sa_view v)
{
    static const char *const names[] = {"float32", "float64", "float16", "bfloat16"};
    if (v.dtype > SA_BF16) {
        return sa_fail(ctx, SA_ETYPE,
                       "%s must be float32, float64, float16 or bfloat16; convert it first", name);
    }
    if (v.dtype != p->q.dtype && (v.dtype == SA_F64 || p->q.dtype == SA_F64)) {
        return sa_fail(ctx, SA_ETYPE,
                       "%s is %s but q is %s, and float64 goes with float64 alone; convert one of "
                       "them",
                       name, names[v.dtype], names[p->q.dtype]);
    }
    if (v.size[3] > 1 && v.stride[3] != 1) {
        return sa_fail(
            ctx, SA_EINVAL,
            "the last axis of %s must be contiguous, got a stride of %lld elements; copy it first",
            name, (ll)v.stride[3]);
    }
    if (!fits(v.size, 4) || !spans_memory(v)) {
        return sa_fail(ctx, SA_EINVAL,
                       "%s with shape (%lld, %lld, %lld, %lld) is larger than memory can be", name,
                       (ll)v.size[0], (ll)v.size[1], (ll)v.size[2], (ll)v.size[3]);
    }
    return SA_OK;
}

static sa_status
check_size(sa_ctx *ctx, const char *name, sa_view v, int axis, int64_t want, const char *meaning)
{
    if (v.size[axis] == want) {
        return SA_OK;
    }
    return sa_fail(
        ctx, SA_EINVAL, "%s has shape (%lld, %lld, %lld, %lld), but axis %d must be %lld, %s", name,
        (ll)v.size[0], (ll)v.size[1], (ll)v.size[2], (ll)v.size[3], axis, (ll)want, meaning);
}

sa_status
sa_problem_sizes_check(sa_ctx *ctx, const sa_problem *p)
{
    const struct {
        const char *what;
        int64_t value, min, max;
    } ranges[] = {
        {"the batch size", p->batch, 0, MAX_BATCH},
        {"the number of heads of q", p->heads, 1, MAX_HEADS},
        {"the number of heads of k", p->kv_heads, 1, MAX_HEADS},
        {"the length of q", p->n_q, 0, SA_MAX_KEYS},
        {"the length of k", p->n_k, 0, SA_MAX_KEYS},
    };
    for (size_t r = 0; r < sizeof ranges / sizeof *ranges; r++) {
        const sa_status status =
            check_range(ctx, ranges[r].what, ranges[r].value, ranges[r].min, ranges[r].max);
        if (status != SA_OK) {
            return status;
        }
    }
    if (p->heads % p->kv_heads != 0) {
        return sa_fail(
            ctx, SA_EINVAL,
            "k has %lld heads, which does not divide the %lld heads of q; repeat or drop heads",
            (ll)p->kv_heads, (ll)p->heads);
    }
    if (!fits((const int64_t[]){p->batch, p->heads, p->n_q, p->n_k}, 4)) {
        return sa_fail(ctx, SA_EINVAL,
                       "batch %lld, heads %lld and lengths %lld x %lld are too large together; "
                       "split the batch",
                       (ll)p->batch, (ll)p->heads, (ll)p->n_q, (ll)p->n_k);
    }
    return SA_OK;
}

static sa_status
check_q_and_k(sa_ctx *ctx, sa_problem *p)
{
    sa_status status = sa_problem_sizes_check(ctx, p);
    status = status ? status : check_range(ctx, "the width of q", p->dim, 1, MAX_DIM);
    status = status ? status : check_tensor(ctx, p, "q", p->q);
    status = status ? status : check_tensor(ctx, p, "k", p->k);
    status = status ? status : check_size(ctx, "k", p->k, 0, p->batch, "the batch size of q");
    return status ? status : check_size(ctx, "k", p->k, 3, p->dim, "the width of q");
}

static sa_status
check_v(sa_ctx *ctx, sa_problem *p)
{
    p->dim_v = 0;
    if (p->v.data == NULL) {
        return SA_OK;
    }
    p->dim_v = p->v.size[3];
    sa_status status = check_range(ctx, "the width of v", p->dim_v, 1, MAX_DIM);
    status = status ? status : check_tensor(ctx, p, "v", p->v);
    status = status ? status : check_size(ctx, "v", p->v, 0, p->batch, "the batch size of q");
    status =
        status ? status : check_size(ctx, "v", p->v, 1, p->kv_heads, "the number of heads of k");
    status = status ? status : check_size(ctx, "v", p->v, 2, p->n_k, "the length of k");
    if (status == SA_OK && !fits((const int64_t[]){p->batch, p->heads, p->n_q, p->dim_v}, 4)) {
        return sa_fail(ctx, SA_EINVAL,
                       "the output of batch %lld, heads %lld, length %lld and width %lld is too "
                       "large; split it",
                       (ll)p->batch, (ll)p->heads, (ll)p->n_q, (ll)p->dim_v);
    }
    return status;
}

/* The real type, and why it is that. */
static const char *
real_words(const sa_problem *p)
{
    return p->q.dtype == SA_F64   ? "float64 as q is"
           : p->q.dtype == SA_F32 ? "float32 as q is"
                                  : "float32, in which halves are computed";
}

/* mask, bias and key_mask: dtype and the shape that broadcasting must have given them. */
static sa_status
check_terms(sa_ctx *ctx, const sa_problem *p)
{
    const struct {
        const char *name, *type;
        sa_view view;
        sa_dtype dtype;
        bool keys_only;
    } terms[] = {
        {"mask", "bool (True = may attend)", p->mask, SA_BOOL, false},
        {"bias", real_words(p), p->bias, sa_real_of(p->q.dtype), false},
        {"key_mask", "bool (True = a real key)", p->key_mask, SA_BOOL, true},
    };
    for (size_t t = 0; t < sizeof terms / sizeof *terms; t++) {
        const sa_view v = terms[t].view;
        const char *const name = terms[t].name;
        const bool keys_only = terms[t].keys_only;
        if (v.data == NULL) {
            continue;
        }
        if (v.dtype != terms[t].dtype) {
            return sa_fail(ctx, SA_ETYPE, "%s must be %s; convert it first", name, terms[t].type);
        }
        sa_status status = check_size(ctx, name, v, 0, p->batch, "the batch size of q");
        status = status ? status
                        : check_size(ctx, name, v, 1, keys_only ? 1 : p->heads,
                                     "the number of heads of q");
        status = status ? status
                        : check_size(ctx, name, v, 2, keys_only ? 1 : p->n_q, "the length of q");
        status = status ? status : check_size(ctx, name, v, 3, p->n_k, "the length of k");
        if (status == SA_OK && !spans_memory(v)) {
            status =
                sa_fail(ctx, SA_EINVAL, "the strides of %s reach further than memory can", name);
        }
        if (status != SA_OK) {
            return status;
        }
    }
    return SA_OK;
}

static sa_status
check_sink(sa_ctx *ctx, const sa_problem *p)
{
    const sa_view v = p->sink;
    if (v.data == NULL) {
        return SA_OK;
    }
    if (v.dtype != sa_real_of(p->q.dtype)) {
        return sa_fail(ctx, SA_ETYPE, "sink must be %s; convert it first", real_words(p));
    }
    sa_status status = check_size(ctx, "sink", v, 0, 1, "as one serves all of the batch");
    status = status ? status : check_size(ctx, "sink", v, 1, p->heads, "the number of heads of q");
    status = status ? status : check_size(ctx, "sink", v, 2, 1, "as one serves all rows");
    status = status ? status : check_size(ctx, "sink", v, 3, 1, "as it is one number a head");
    if (status == SA_OK && !spans_memory(v)) {
        status = sa_fail(ctx, SA_EINVAL, "the strides of sink reach further than memory can");
    }
    return status;
}

static sa_status
check_options(sa_ctx *ctx, const sa_problem *p)
{
    if (!isfinite(p->scale)) {
        return sa_fail(ctx, SA_EINVAL,
                       "scale must be finite, got %g; None stands for 1 / sqrt(dim)", p->scale);
    }
    if (!isfinite(p->softcap) || p->softcap < 0) {
        return sa_fail(ctx, SA_EINVAL,
                       "softcap must be finite and positive, or None for no cap; got %g",
                       p->softcap);
    }
    if (!(p->dropout_p >= 0 && p->dropout_p < 1)) {
        return sa_fail(ctx, SA_EINVAL, "dropout_p must be in [0, 1), got %g", p->dropout_p);
    }
    if (p->causal < SA_CAUSAL_NONE || p->causal > SA_CAUSAL_TOP_LEFT) {
        return sa_fail(ctx, SA_EINVAL, "causal must be 0, 1 or 2, got %d", (int)p->causal);
    }
    return SA_OK;
}

/* Strides that are never taken may be any number: they become those of one row, so that stride
 * times itemsize is safe wherever there is more than one. */
static void
settle_strides(sa_view *v)
{
    const bool empty = v->size[0] == 0 || v->size[1] == 0 || v->size[2] == 0 || v->size[3] == 0;
    for (int a = 0; a < 4; a++) {
        if (empty || v->size[a] == 1) {
            v->stride[a] = a == 3;
        }
    }
}

sa_status
sa_problem_check(sa_ctx *ctx, sa_problem *p)
{
    sa_view *const views[] = {&p->q, &p->k, &p->v, &p->mask, &p->bias, &p->key_mask, &p->sink};
    for (size_t x = 0; x < sizeof views / sizeof *views; x++) {
        settle_strides(views[x]);
    }
    p->batch = p->q.size[0];
    p->heads = p->q.size[1];
    p->n_q = p->q.size[2];
    p->dim = p->q.size[3];
    p->kv_heads = p->k.size[1];
    p->n_k = p->k.size[2];
    sa_status status = check_q_and_k(ctx, p);
    status = status ? status : check_v(ctx, p);
    status = status ? status : check_terms(ctx, p);
    status = status ? status : check_sink(ctx, p);
    return status ? status : check_options(ctx, p);
}
