/* tile_grad.h - the backward of a strip: its weights again, from the log-sum-exp, their gradients,
 * and the sums over queries that keys and values receive.
 */

/* What both products of a strip with key or value rows do to their results. */
typedef struct {
    real *to;           /* [keys][w]                                             */
    const real *cols;   /* Q^T or dO^T                                           */
    const real *minus;  /* [w] subtracted from the products: lse, or delta       */
    const real *weight; /* NULL: to = exp(x - minus), else to = weight (x - minus) */
    const sa_clip *clip;
    int w;
} grad_strip;

/* Keys j .. j + n_keys of a strip, for compile-time n_keys, vecs and kinds; 0 where unseen. Rows of
 * keys from real_keys on, which only fill the register tile, are not written. */
SA_INLINE void
grad_keys(const grad_strip *g, const int n_keys, const int vecs, const bool exponent,
          const bool clipped, int j, int real_keys, const void *const *row, int dim)
{
    vreal acc[KEYS][VECS];
    score_tile(acc, n_keys, vecs, g->cols, g->w, row, dim);
#pragma GCC unroll 4
    for (int v = 0; v < vecs; v++) {
        const vreal minus = vload(g->minus + v * LANES);
        vint lo = {0}, hi = {0};
        if (clipped) {
            lo = load_ints(g->clip->lo + v * LANES);
            hi = load_ints(g->clip->hi + v * LANES);
        }
#pragma GCC unroll 16
        for (int i = 0; i < n_keys; i++) {
            const int64_t at = (int64_t)(j + i) * g->w + v * LANES;
            const vreal x = acc[i][v] - minus;
            vreal y = exponent ? vexp(x) : vload(g->weight + at) * x;
            if (clipped) {
                const vint key = vset_int((sint)(g->clip->first + j + i));
                y = vselect((key >= lo) & (key < hi), y, vset(0));
            }
            if (i < real_keys) {
                vstore(g->to + at, y);
            }
        }
    }
}

/* The last keys fill a register tile by repeating the last one, as in scores_wide. */
SA_INLINE void
grad_wide(const grad_strip *g, const int vecs, const bool exponent, const bool clipped,
          const void *const *row, int n_keys, int dim)
{
    const void *last[KEYS];
    int j = 0;
    for (; j + KEYS_FOR(vecs) <= n_keys; j += KEYS_FOR(vecs)) {
        grad_keys(g, KEYS_FOR(vecs), vecs, exponent, clipped, j, KEYS, row + j, dim);
    }
    const int rest = n_keys - j;
    if (rest == 0) {
        return;
    }
    for (int i = 0; i < KEYS_FOR(vecs); i++) {
        last[i] = row[j + SA_MIN(i, rest - 1)];
    }
    if (rest <= 4) {
        grad_keys(g, 4, vecs, exponent, clipped, j, rest, last, dim);
    } else if (rest <= 8 && KEYS_FOR(vecs) >= 8) {
        grad_keys(g, 8, vecs, exponent, clipped, j, rest, last, dim);
    } else {
        grad_keys(g, KEYS_FOR(vecs), vecs, exponent, clipped, j, rest, last, dim);
    }
}

SA_INLINE void
grad_any(const grad_strip *g, const bool exponent, const bool clipped, int wide,
         const void *const *row, int n_keys, int dim)
{
    switch (wide / LANES) {
    case 1:
        grad_wide(g, 1, exponent, clipped, row, n_keys, dim);
        break;
    case 2:
        grad_wide(g, 2, exponent, clipped, row, n_keys, dim);
        break;
#if VECS > 2
    default:
        grad_wide(g, 3, exponent, clipped, row, n_keys, dim);
#endif
    }
}

static void
strip_weights(void *p, const void *qt, int w, int wide, const void *const *k_row, int n_keys,
              int dim, const void *lse, const sa_clip *clip)
{
    const grad_strip g = {p, qt, lse, NULL, clip, w};
    if (clip != NULL) {
        grad_any(&g, true, true, wide, k_row, n_keys, dim);
    } else {
        grad_any(&g, true, false, wide, k_row, n_keys, dim);
    }
}

static void
strip_grads(void *ds, const void *p, const void *dot, int w, int wide, const void *const *v_row,
            int n_keys, int dim_v, const void *delta, const sa_clip *clip)
{
    const grad_strip g = {ds, dot, delta, p, clip, w};
    if (clip != NULL) {
        grad_any(&g, false, true, wide, v_row, n_keys, dim_v);
    } else {
        grad_any(&g, false, false, wide, v_row, n_keys, dim_v);
    }
}

/* One element's worth of backward: fwd: p = exp(s - lse), out += p keep v, s = cap tanh(x / cap) +
 * bias. A score of -inf is one that the row does not see, whatever dp holds there. */
static void
weights_grad(void *s, void *dp, const void *capped, const void *keep, int w, int wide, int n_keys,
             const void *lse, const void *delta, double cap)
{
    const vreal none = vset(-INFINITY), zero = vset(0);
    for (int j = 0; j < n_keys; j++) {
        for (int r = 0; r < wide; r += LANES) {
            const int64_t at = (int64_t)j * w + r;
            real *const score = (real *)s + at, *const grad = (real *)dp + at;
            const vreal times = keep ? vload((const real *)keep + at) : vset(1);
            const vint hidden = vload(score) == none;
            const vreal p =
                vselect(hidden, zero, vexp(vload(score) - vload((const real *)lse + r)));
            vreal ds = p * (vload(grad) * times - vload((const real *)delta + r));
            if (capped) {
                const vreal y = vload((const real *)capped + at) * vset((real)(1 / cap));
                ds = ds * (vset(1) - y * y);
            }
            vstore(grad, vselect(hidden, zero, ds));
            vstore(score, p * times);
        }
    }
}

/* row[i][c ..] += acc[i], or = where nobody has added to the rows yet. Not whole: the last vector
 * has fewer channels than lanes. */
SA_INLINE void
sum_store(real *const *row, const sa_strip_sums *s, vreal (*acc)[SUM_VECS], const int n_keys,
          const int vecs, const bool whole, const bool fresh, int c)
{
#pragma GCC unroll 16
    for (int i = 0; i < n_keys; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            real *const to = row[i] + c + v * LANES;
            if (whole || v < vecs - 1) {
                vstore(to, fresh ? acc[i][v] : vload(to) + acc[i][v]);
                continue;
            }
            for (int x = 0; x < LANES && c + v * LANES + x < s->dim; x++) {
                to[x] = fresh ? acc[i][v][x] : to[x] + acc[i][v][x];
            }
        }
    }
}

/* keys x (vecs LANES) of the gradients: row[i][c ..] += sum over the queries of all strips. Sums
 * stay in registers for a whole block of queries. With select, queries where `seen` is -inf count
 * as 0. */
SA_INLINE void
sum_tile(real *const *row, const sa_strip_sums *s, const int n_keys, const int vecs,
         const bool whole, const bool select, int j, int c)
{
    const vreal unseen = vset(-INFINITY);
    vreal acc[KEYS][SUM_VECS];
#pragma GCC unroll 16
    for (int i = 0; i < n_keys; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            acc[i][v] = vset(0);
        }
    }
    const int begin = s->begin ? s->begin[j] : 0;
    const int end = s->begin ? s->end[j + n_keys - 1] : s->n_rows;
    for (int first = begin / s->w * s->w; first < end; first += s->w) {
        const int64_t strip = first / s->w * s->step + (int64_t)j * s->w;
        const real *const p = (const real *)s->p + strip;
        const real *const seen = select ? (const real *)s->seen + strip : NULL;
        const int from = SA_MAX(begin - first, 0), rows = SA_MIN(s->w, end - first);
        const real *b = (const real *)s->b + (first + from) * s->ldb + c;
        for (int r = from; r < rows; r++, b += s->ldb) {
            vreal x[SUM_VECS];
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) {
                x[v] = vload(b + v * LANES);
            }
#pragma GCC unroll 16
            for (int i = 0; i < n_keys; i++) {
                const vreal weight = vset(p[i * s->w + r]);
                /* As in value_tile; a branch would cost Clang the FMA, and so the bits. */
                const vint hidden = select ? vset(seen[i * s->w + r]) == unseen : (vint){0};
#pragma GCC unroll 4
                for (int v = 0; v < vecs; v++) {
                    acc[i][v] += weight * (select ? vselect(hidden, vset(0), x[v]) : x[v]);
                }
            }
        }
    }
    if (s->fresh) {
        sum_store(row + j, s, acc, n_keys, vecs, whole, true, c);
    } else {
        sum_store(row + j, s, acc, n_keys, vecs, whole, false, c);
    }
}

SA_INLINE void
sum_keys(real *const *row, const sa_strip_sums *s, const int vecs, const bool whole,
         const bool select, int c)
{
    const int step = vecs == SUM_VECS ? SUM_KEYS : KEYS_FOR(vecs);
    int j = 0;
    for (; j + step <= s->n_keys; j += step) {
        sum_tile(row, s, step, vecs, whole, select, j, c);
    }
    for (; j + 4 <= s->n_keys; j += 4) {
        sum_tile(row, s, 4, vecs, whole, select, j, c);
    }
    for (; j + 2 <= s->n_keys; j += 2) {
        sum_tile(row, s, 2, vecs, whole, select, j, c);
    }
    if (j < s->n_keys) {
        sum_tile(row, s, 1, vecs, whole, select, j, c);
    }
}

/* Whole vectors of channels, as many at a time as there are registers for, then what is left. */
SA_INLINE void
sums_any(real *const *row, const sa_strip_sums *s, const bool select)
{
    int c = 0;
    for (; !select && c + SUM_VECS * LANES <= s->dim; c += SUM_VECS * LANES) {
        sum_keys(row, s, SUM_VECS, true, false, c);
    }
    for (; !select && c + 2 * LANES <= s->dim; c += 2 * LANES) {
        sum_keys(row, s, 2, true, false, c);
    }
    if (!select && c + LANES < s->dim) {
        sum_keys(row, s, 2, false, false, c);
        return;
    }
    for (; c + LANES <= s->dim; c += LANES) {
        sum_keys(row, s, 1, true, select, c);
    }
    if (c < s->dim) {
        sum_keys(row, s, 1, false, select, c);
    }
}

static void
sums(void *const *row, const sa_strip_sums *s)
{
    real *const *const to = (real *const *)(const void *)row;
    if (s->seen != NULL) {
        sums_any(to, s, true);
    } else {
        sums_any(to, s, false);
    }
}

/* Eight sums, whatever the width of the table: products of floats are exact in double, so that
 * every table gives the same bits. */
static double
inner(const void *a, const void *b, int64_t n)
{
    typedef double sums8 __attribute__((vector_size(64)));
    typedef real reals8
        __attribute__((vector_size(8 * sizeof(real)), aligned(sizeof(real)), may_alias));
    const real *const x = a, *const y = b;
    sums8 sum = {0};
    int64_t c = 0;
    for (; c + 8 <= n; c += 8) {
        sum += __builtin_convertvector(*(const reals8 *)(x + c), sums8) *
               __builtin_convertvector(*(const reals8 *)(y + c), sums8);
    }
    for (; c < n; c++) {
        sum[c % 8] += (double)x[c] * y[c];
    }
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}
