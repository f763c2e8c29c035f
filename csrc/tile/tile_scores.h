/* tile_scores.h - scores of a strip of queries against key rows, and their softmax.
 *
 * Register tile: KEYS key rows x VECS vectors of queries. Each step loads VECS vectors of Q^T and
 * broadcasts one element of each key row; keys are read where they lie.
 */

/* acc[j][v] = sum_c qt[c w + v LANES ..] row[j][c], for compile-time n_keys and vecs. */
SA_INLINE void
score_tile(vreal (*acc)[VECS], const int n_keys, const int vecs, const real *qt, int64_t w,
           const void *const *k_row, int dim)
{
    const real *row[KEYS];
#pragma GCC unroll 16
    for (int j = 0; j < n_keys; j++) {
        row[j] = k_row[j];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            acc[j][v] = vset(0);
        }
    }
    for (int64_t c = 0; c < dim; c++) {
        vreal query[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            query[v] = vload(qt + v * LANES);
        }
        qt += w;
#pragma GCC unroll 16
        for (int j = 0; j < n_keys; j++) {
            const vreal key = vset(row[j][c]);
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) {
                acc[j][v] += key * query[v];
            }
        }
    }
}

/* Raw scores of n_keys keys (compile time). */
SA_INLINE void
score_raw(real *s, const int n_keys, const int vecs, const real *qt, int w,
          const void *const *k_row, int dim)
{
    vreal acc[KEYS][VECS];
    score_tile(acc, n_keys, vecs, qt, w, k_row, dim);
#pragma GCC unroll 16
    for (int j = 0; j < n_keys; j++) {
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            vstore(s + (int64_t)j * w + v * LANES, acc[j][v]);
        }
    }
}

SA_INLINE vint
load_ints(const int32_t *p)
{
#if defined(SA_REAL_IS_DOUBLE)
    vint x = {0};
    for (int i = 0; i < LANES; i++) {
        x[i] = p[i];
    }
    return x;
#else
    return *(const vint_u *)p;
#endif
}

/* Scores and exponentials against the stale maximum; over[v] collects lanes that exceed it. Keys
 * from `real_keys` on only fill the register tile: they repeat the last key and are left out of the
 * sums. */
SA_INLINE void
score_fused(real *p, const int n_keys, const int vecs, const real *qt, int w,
            const void *const *k_row, int dim, int real_keys, const real *m, vreal *sum, vint *over,
            const bool clipped, const sa_clip *clip)
{
    vreal acc[KEYS][VECS];
    score_tile(acc, n_keys, vecs, qt, w, k_row, dim);
#pragma GCC unroll 4
    for (int v = 0; v < vecs; v++) {
        const vreal old = vload(m + v * LANES);
        const vreal limit = old + vset((real)SA_STALE);
        const vreal top = clipped ? vselect(old == vset(-INFINITY), vset(0), old) : old;
        if (clipped) {
            const vint lo = load_ints(clip->lo + v * LANES), hi = load_ints(clip->hi + v * LANES);
#pragma GCC unroll 16
            for (int j = 0; j < n_keys; j++) {
                const vint at = vset_int((sint)(clip->first + j));
                acc[j][v] = vselect((at >= lo) & (at < hi), acc[j][v], vset(-INFINITY));
            }
        }
        vreal high = acc[0][v];
#pragma GCC unroll 16
        for (int j = 1; j < n_keys; j++) {
            high = vmax(acc[j][v], high);
        }
        /* A lane at -inf that sees nothing but -inf is left to fold: -inf - -inf is NaN. */
        over[v] |= clipped ? high > limit : high >= limit;
#pragma GCC unroll 16
        for (int j = 0; j < n_keys; j++) {
            const vreal e = vexp(acc[j][v] - top);
            sum[v] = j < real_keys ? sum[v] + e : sum[v];
            vstore(p + (int64_t)j * w + v * LANES, e);
        }
    }
}

/* The last keys of a tile fill a register tile of 4, 8 or 12 rows by repeating the last key: a lone
 * key would wait for each of its multiply-adds. Up to three rows of s past n_keys are written;
 * tiles have a multiple of 4. */
SA_INLINE void
scores_wide(real *s, const int vecs, const real *qt, int w, const void *const *k_row, int n_keys,
            int dim)
{
    const void *row[KEYS];
    int j = 0;
    for (; j + KEYS_FOR(vecs) <= n_keys; j += KEYS_FOR(vecs)) {
        score_raw(s + (int64_t)j * w, KEYS_FOR(vecs), vecs, qt, w, k_row + j, dim);
    }
    const int rest = n_keys - j;
    if (rest == 0) {
        return;
    }
    for (int i = 0; i < KEYS_FOR(vecs); i++) {
        row[i] = k_row[j + SA_MIN(i, rest - 1)];
    }
    if (rest <= 4) {
        score_raw(s + (int64_t)j * w, 4, vecs, qt, w, row, dim);
    } else if (rest <= 8 && KEYS_FOR(vecs) >= 8) {
        score_raw(s + (int64_t)j * w, 8, vecs, qt, w, row, dim);
    } else {
        score_raw(s + (int64_t)j * w, KEYS_FOR(vecs), vecs, qt, w, row, dim);
    }
}

static void
scores(void *s, const void *qt, int w, int wide, const void *const *k_row, int n_keys, int dim)
{
    switch (wide / LANES) {
    case 1:
        scores_wide(s, 1, qt, w, k_row, n_keys, dim);
        break;
    case 2:
        scores_wide(s, 2, qt, w, k_row, n_keys, dim);
        break;
#if VECS > 2
    default:
        scores_wide(s, 3, qt, w, k_row, n_keys, dim);
#endif
    }
}

SA_INLINE bool
scores_exp_wide(real *p, const int vecs, const real *qt, int w, const void *const *k_row,
                int n_keys, int dim, const real *m, real *l, const bool clipped,
                const sa_clip *clip)
{
    vreal sum[VECS];
    vint over[VECS];
    sa_clip here = clipped ? *clip : (sa_clip){0, NULL, NULL};
#pragma GCC unroll 4
    for (int v = 0; v < vecs; v++) {
        sum[v] = vset(0);
        over[v] = (vint){0};
    }
    for (int j = 0; j < n_keys; j += KEYS_FOR(vecs), here.first += KEYS_FOR(vecs)) {
        real *const to = p + (int64_t)j * w;
        const int rest = n_keys - j;
        const void *row[KEYS];
        if (rest >= KEYS_FOR(vecs)) {
            score_fused(to, KEYS_FOR(vecs), vecs, qt, w, k_row + j, dim, KEYS, m, sum, over,
                        clipped, &here);
            continue;
        }
        for (int i = 0; i < KEYS_FOR(vecs); i++) {
            row[i] = k_row[j + SA_MIN(i, rest - 1)];
        }
        if (rest <= 4) {
            score_fused(to, 4, vecs, qt, w, row, dim, rest, m, sum, over, clipped, &here);
        } else {
            score_fused(to, KEYS_FOR(vecs), vecs, qt, w, row, dim, rest, m, sum, over, clipped,
                        &here);
        }
    }
    for (int v = 1; v < vecs; v++) {
        over[0] |= over[v];
    }
    if (vany(over[0])) {
        return false;
    }
    for (int v = 0; v < vecs; v++) {
        vstore(l + v * LANES, vload(l + v * LANES) + sum[v]);
    }
    return true;
}

static bool
scores_exp(void *p, const void *qt, int w, int wide, const void *const *k_row, int n_keys, int dim,
           const void *m, void *l, const sa_clip *c)
{
    switch (wide / LANES) {
    case 1:
        return c ? scores_exp_wide(p, 1, qt, w, k_row, n_keys, dim, m, l, true, c)
                 : scores_exp_wide(p, 1, qt, w, k_row, n_keys, dim, m, l, false, c);
    case 2:
        return c ? scores_exp_wide(p, 2, qt, w, k_row, n_keys, dim, m, l, true, c)
                 : scores_exp_wide(p, 2, qt, w, k_row, n_keys, dim, m, l, false, c);
#if VECS > 2
    case 3:
        return c ? scores_exp_wide(p, 3, qt, w, k_row, n_keys, dim, m, l, true, c)
                 : scores_exp_wide(p, 3, qt, w, k_row, n_keys, dim, m, l, false, c);
#endif
    default:
        return false;
    }
}

/* One vector of lanes. A lane whose maximum stays gets the bits that scores_exp would give it: no
 * factor is applied to it, and its sum is taken in the same order. */
SA_INLINE void
fold_vector(real *s, int w, int n_keys, real *m, real *l, real *o, int dim_v)
{
    const vreal none = vset(-INFINITY);
    const vreal old = vload(m);
    vreal high = none;
    for (int j = 0; j < n_keys; j++) {
        high = vmax(high, vload(s + (int64_t)j * w));
    }
    const vint raise = (high > old + vset((real)SA_STALE)) | ((old == none) & (high > none));
    const vreal top = vselect(raise, high, old);
    if (vany(raise)) {
        const vreal before = vload(l);
        const vreal factor = vexp(vselect(old == none, none, old - top));
        vstore(l, vselect(raise, before * factor, before));
        for (int c = 0; c < dim_v; c++) {
            const vreal out = vload(o + (int64_t)c * w);
            vstore(o + (int64_t)c * w, vselect(raise, out * factor, out));
        }
        vstore(m, top);
    }
    const vreal base = vselect(top == none, vset(0), top);
    vreal sum = vset(0);
    for (int j = 0; j < n_keys; j++) {
        const vreal e = vexp(vload(s + (int64_t)j * w) - base);
        sum += e;
        vstore(s + (int64_t)j * w, e);
    }
    vstore(l, vload(l) + sum);
}

static void
fold(void *s, int w, int wide, int n_keys, void *m, void *l, void *o, int dim_v)
{
    for (int r = 0; r < wide; r += LANES) {
        fold_vector((real *)s + r, w, n_keys, (real *)m + r, (real *)l + r, (real *)o + r, dim_v);
    }
}

static void
clip(void *s, int w, int wide, int n_keys, const sa_clip *c)
{
    for (int r = 0; r < wide; r += LANES) {
        const vint lo = load_ints(c->lo + r), hi = load_ints(c->hi + r);
        for (int j = 0; j < n_keys; j++) {
            const vint at = vset_int((sint)(c->first + j));
            real *const p = (real *)s + (int64_t)j * w + r;
            vstore(p, vselect((at >= lo) & (at < hi), vload(p), vset(-INFINITY)));
        }
    }
}

static void
add_term(void *s, const void *t, int64_t count)
{
    real *const score = s;
    const real *const term = t;
    for (int64_t i = 0; i < count; i++) {
        score[i] = term[i] == -INFINITY ? -INFINITY : score[i] + term[i];
    }
}

static void
weigh(void *s, const void *t, int64_t count)
{
    real *const weight = s;
    const real *const factor = t;
    for (int64_t i = 0; i < count; i++) {
        weight[i] *= factor[i];
    }
}

/* tanh(x) = x + x^3 P(x^2) near 0, else 1 - 2 / (exp(2|x|) + 1) with x's sign. [P: Cephes tanhf] */
SA_INLINE vreal
vtanh(vreal x)
{
#if defined(SA_REAL_IS_DOUBLE)
    for (int i = 0; i < LANES; i++) {
        x[i] = tanh(x[i]);
    }
    return x;
#else
    const vreal size = vmax(-x, x);
    const vreal two = size + size;
    const vreal e = vexp(vselect(two > vset(40), vset(40), two));
    vreal far = vset(1) - vset(2) / (e + vset(1));
    far = vselect(x < vset(0), -far, far);
    const vreal y = x * x;
    vreal p = y * vset(-5.70498872745e-3f) + vset(2.06390887954e-2f);
    p = p * y + vset(-5.37397155531e-2f);
    p = p * y + vset(1.33314422036e-1f);
    p = p * y + vset(-3.33332819422e-1f);
    const vreal near = x + x * y * p;
    return vselect(size < vset(0.625f), near, far);
#endif
}

static void
softcap(void *s, int64_t count, double cap)
{
    real *const score = s;
    const vreal up = vset((real)cap), down = vset((real)(1 / cap));
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        vstore(score + i, up * vtanh(vload(score + i) * down));
    }
    if (i < count) {
        real rest[LANES] = {0};
        memcpy(rest, score + i, (size_t)(count - i) * sizeof(real));
        vstore(rest, up * vtanh(vload(rest) * down));
        memcpy(score + i, rest, (size_t)(count - i) * sizeof(real));
    }
}
