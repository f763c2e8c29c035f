/* trial.c - see trial.h. */
#include "trial.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "check.h"

trial_shape
trial_random_shape(void)
{
    static const int64_t lengths[] = {1, 2, 3, 17, 63, 64, 65, 100, 130};
    static const int64_t widths[] = {1, 3, 8, 16, 20, 40, 64};
    static const int64_t heads[][2] = {{1, 1}, {2, 1}, {3, 3}, {6, 2}, {4, 1}};
    const int64_t *pair = heads[numbers_below(5)];
    trial_shape s = {
        .dtype = numbers_below(2) ? SA_F32 : SA_F64,
        .batch = 1 + numbers_below(2),
        .heads = pair[0],
        .kv_heads = pair[1],
        .n_q = lengths[numbers_below(9)],
        .n_k = lengths[numbers_below(9)],
        .dim = widths[numbers_below(7)],
        .dim_v = widths[numbers_below(7)],
        .causal = (sa_causal)numbers_below(3),
        .mask = numbers_below(4) == 0,
        .bias = numbers_below(4) == 0,
        .key_mask = numbers_below(4) == 0,
        .softcap = numbers_below(4) == 0 ? 3 : 0,
        .strided = numbers_below(2),
    };
    s.n_k = numbers_below(3) ? s.n_k : s.n_q;
    s.scale = (numbers_below(3) ? 1 : 6) / sqrt((double)s.dim); /* the second gives hot rows */
    return s;
}

const char *
trial_name(const trial_shape *s)
{
    static char name[200];
    snprintf(name, sizeof name, "%s batch %d heads %d/%d n %d x %d dim %d/%d causal %d%s%s%s%s%s",
             s->dtype == SA_F64 ? "f64" : "f32", (int)s->batch, (int)s->heads, (int)s->kv_heads,
             (int)s->n_q, (int)s->n_k, (int)s->dim, (int)s->dim_v, (int)s->causal,
             s->mask ? " mask" : "", s->bias ? " bias" : "", s->key_mask ? " key_mask" : "",
             s->softcap > 0 ? " softcap" : "", s->strided ? " strided" : "");
    return name;
}

double
trial_get(sa_view v, int64_t a, int64_t b, int64_t c, int64_t d)
{
    const char *at =
        (const char *)sa_view_row(v, a, b, c) + d * v.stride[3] * (int64_t)sa_dtype_size(v.dtype);
    return v.dtype == SA_F64 ? *(const double *)at : (double)*(const float *)at;
}

void
trial_put(sa_view v, int64_t a, int64_t b, int64_t c, int64_t d, double x)
{
    char *at = (char *)sa_view_row(v, a, b, c) + d * v.stride[3] * (int64_t)sa_dtype_size(v.dtype);
    if (v.dtype == SA_F64) {
        *(double *)at = x;
    } else {
        *(float *)at = (float)x;
    }
}

/* A view of fresh memory that ends with its last element. Strided: heads inside rows, rows 3
 * elements further apart than they are long; what lies between stays poison. */
static sa_view
make_view(sa_dtype dtype, int64_t a, int64_t b, int64_t c, int64_t d, bool strided, void **memory)
{
    sa_view v = {.dtype = dtype, .size = {a, b, c, d}, .stride = {b * c * d, c * d, d, 1}};
    if (strided) {
        v.stride[1] = d + 3;
        v.stride[2] = b * (d + 3);
        v.stride[0] = c * b * (d + 3);
    }
    size_t reach = 1;
    for (int x = 0; x < 4; x++) {
        reach += (size_t)((v.size[x] - 1) * v.stride[x]);
    }
    v.data = *memory = sa_malloc_array(reach, sa_dtype_size(dtype));
    return v;
}

static sa_view
make_reals(sa_dtype dtype, int64_t a, int64_t b, int64_t c, int64_t d, bool strided, void **memory)
{
    const sa_view v = make_view(dtype, a, b, c, d, strided, memory);
    for (int64_t at = 0; at < a * b * c * d; at++) {
        trial_put(v, at / (b * c * d), at / (c * d) % b, at / d % c, at % d, numbers_real());
    }
    return v;
}

static sa_view
make_bools(int64_t a, int64_t b, int64_t c, int64_t d, int percent, void **memory)
{
    sa_view v = make_view(SA_BOOL, a, b, c, d, false, memory);
    for (int64_t at = 0; at < a * b * c * d; at++) {
        ((unsigned char *)v.data)[at] = numbers_below(100) < percent;
    }
    return v;
}

trial
trial_make(sa_ctx *ctx, const trial_shape *shape)
{
    const trial_shape s = *shape;
    trial t = {.shape = s, .p = {.causal = s.causal, .scale = s.scale, .softcap = s.softcap}};
    t.p.q = make_reals(s.dtype, s.batch, s.heads, s.n_q, s.dim, s.strided, &t.memory[0]);
    t.p.k = make_reals(s.dtype, s.batch, s.kv_heads, s.n_k, s.dim, s.strided, &t.memory[1]);
    t.p.v = make_reals(s.dtype, s.batch, s.kv_heads, s.n_k, s.dim_v, s.strided, &t.memory[2]);
    if (s.mask) {
        t.p.mask = make_bools(s.batch, s.strided ? 1 : s.heads, s.n_q, s.n_k, 60, &t.memory[3]);
        if (s.strided) {
            t.p.mask.size[1] = s.heads;
            t.p.mask.stride[1] = 0;
        }
    }
    if (s.bias) {
        t.p.bias = make_reals(s.dtype, 1, s.heads, s.n_q, s.n_k, false, &t.memory[4]);
        t.p.bias.size[0] = s.batch;
        t.p.bias.stride[0] = 0;
    }
    if (s.key_mask) {
        t.p.key_mask = make_bools(s.batch, 1, 1, s.n_k, 80, &t.memory[5]);
    }
    const sa_status status = sa_problem_check(ctx, &t.p);
    CHECK(status == SA_OK, "%s: %s", trial_name(&s), ctx->message);
    return t;
}

void
trial_free(trial *t)
{
    for (int i = 0; i < 6; i++) {
        sa_free(t->memory[i]);
    }
}

static bool
bit_of(sa_view v, int64_t b, int64_t h, int64_t i, int64_t j)
{
    return v.data == NULL || ((const unsigned char *)sa_view_row(v, b, h, i))[j * v.stride[3]] != 0;
}

bool
trial_mask(const trial *t, int64_t b, int64_t h, int64_t i, int64_t j)
{
    return bit_of(t->p.mask, b, h, i, j);
}

bool
trial_visible(const trial *t, int64_t b, int64_t h, int64_t i, int64_t j)
{
    const int64_t last = t->p.causal == SA_CAUSAL_NONE       ? t->p.n_k
                         : t->p.causal == SA_CAUSAL_TOP_LEFT ? i
                                                             : i + t->p.n_k - t->p.n_q;
    return j <= last && trial_mask(t, b, h, i, j) && bit_of(t->p.key_mask, b, 0, 0, j);
}

sa_view
trial_output(const trial *t, int64_t columns)
{
    void *memory;
    return make_view(t->p.q.dtype, t->p.batch, t->p.heads, t->p.n_q, columns, false, &memory);
}

double
trial_score(const trial *t, int64_t b, int64_t h, int64_t i, int64_t j)
{
    const sa_problem *p = &t->p;
    const int64_t g = h * p->kv_heads / p->heads;
    double s = 0;
    for (int64_t c = 0; c < p->dim; c++) {
        s += trial_get(p->q, b, h, i, c) * trial_get(p->k, b, g, j, c);
    }
    s *= p->scale;
    s = p->softcap > 0 ? p->softcap * tanh(s / p->softcap) : s;
    return s + (p->bias.data != NULL ? trial_get(p->bias, b, h, i, j) : 0);
}

void
trial_naive(const trial *t, int64_t b, int64_t h, int64_t i, const unsigned char *seen, double *out,
            double *lse)
{
    const sa_problem *p = &t->p;
    const int64_t g = h * p->kv_heads / p->heads;
    double *s = sa_malloc_array((size_t)p->n_k, sizeof *s), top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < p->n_k; j++) {
        if (seen[j]) {
            s[j] = trial_score(t, b, h, i, j);
            top = fmax(top, s[j]);
        }
    }
    for (int64_t c = 0; c < p->dim_v; c++) {
        out[c] = 0;
    }
    for (int64_t j = 0; j < p->n_k; j++) {
        if (seen[j]) {
            const double e = exp(s[j] - top);
            sum += e;
            for (int64_t c = 0; c < p->dim_v; c++) {
                out[c] += e * trial_get(p->v, b, g, j, c);
            }
        }
    }
    for (int64_t c = 0; sum > 0 && c < p->dim_v; c++) {
        out[c] /= sum;
    }
    *lse = sum > 0 ? top + log(sum) : -INFINITY;
    sa_free(s);
}

trial_opts
opts_of(const sa_planner *planner)
{
    trial_opts opts;
    CHECK(planner->opts_size <= sizeof opts, "%s has large options", planner->name);
    memset(&opts, 0, sizeof opts);
    return opts;
}

void *
opts_field(const sa_planner *planner, trial_opts *opts, const char *name)
{
    for (const sa_field *f = planner->fields; f->name != NULL; f++) {
        if (strcmp(f->name, name) == 0) {
            return opts->bytes + f->offset;
        }
    }
    CHECK(false, "%s has no field %s", planner->name, name);
    return opts->bytes;
}
