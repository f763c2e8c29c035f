/* trial.h - random attention problems, the naive answer to them, and option structs by field name.
 */
#ifndef SA_TRIAL_H
#define SA_TRIAL_H

#include "engine/attend.h"
#include "variants/variant.h"

/* What to make; zero is plain. */
typedef struct {
    sa_dtype dtype;
    int64_t batch, heads, kv_heads, n_q, n_k, dim, dim_v;
    sa_causal causal;
    double scale, softcap;
    bool mask, bias, key_mask;
    bool strided; /* rows of q, k, v apart, heads inside rows; mask without head axis */
} trial_shape;

typedef struct {
    trial_shape shape;
    sa_problem p;
    void
        *memory[6]; /* of q, k, v, mask, bias, key_mask: each exactly as long as its view reaches */
} trial;

trial_shape trial_random_shape(void);
trial trial_make(sa_ctx *ctx, const trial_shape *shape);
void trial_free(trial *t);
const char *trial_name(const trial_shape *shape);

double trial_get(sa_view v, int64_t a, int64_t b, int64_t c, int64_t d);
void trial_put(sa_view v, int64_t a, int64_t b, int64_t c, int64_t d, double x);

/* Whether causality, mask and padding let row i of (b, h) see key j. */
bool trial_visible(const trial *t, int64_t b, int64_t h, int64_t i, int64_t j);
bool trial_mask(const trial *t, int64_t b, int64_t h, int64_t i, int64_t j); /* the mask alone */

/* A contiguous array of the problem's outputs: out (dim_v columns) or lse (1 column). */
sa_view trial_output(const trial *t, int64_t columns);

/* softcap(scale q_i.k_j) + bias in double. */
double trial_score(const trial *t, int64_t b, int64_t h, int64_t i, int64_t j);

/* Two loops in double: out[dim_v] and lse of row i over the keys with seen[j] != 0. */
void trial_naive(const trial *t, int64_t b, int64_t h, int64_t i, const unsigned char *seen,
                 double *out, double *lse);

/* Zeroed options of a planner, and one of its fields. */
typedef union {
    unsigned char bytes[4096];
    double align;
} trial_opts;
trial_opts opts_of(const sa_planner *planner);
void *opts_field(const sa_planner *planner, trial_opts *opts, const char *name);

#endif
