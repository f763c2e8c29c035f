/* tile_ops.h - the functions of rows.h: activations, norms, the sums of losses, one row times a
 * matrix.
 *
 * But for the last, arithmetic is double for both real types: a vector then holds half as many
 * numbers, and in return float rows come out within an ulp of the truth with no case analysis.
 * Products take far longer than all of this.
 */
#include "tile/rows.h"

typedef double vwide __attribute__((vector_size(SA_VBYTES)));
typedef int64_t wint __attribute__((vector_size(SA_VBYTES)));
typedef real vpart __attribute__((vector_size(SA_VBYTES / 8 * sizeof(real))));
typedef real vpart_u
    __attribute__((vector_size(SA_VBYTES / 8 * sizeof(real)), aligned(sizeof(real)), may_alias));
#define WIDE ((int)(SA_VBYTES / 8))

SA_INLINE vwide
wset(double x)
{
    return x - (vwide){0};
}

SA_INLINE vwide
wload(const real *p)
{
    return __builtin_convertvector(*(const vpart_u *)p, vwide);
}

SA_INLINE void
wstore(real *p, vwide a)
{
    *(vpart_u *)p = __builtin_convertvector(a, vpart);
}

/* Numbers i .. i + WIDE of a row of n, those past its end `rest`. */
SA_INLINE vwide
wload_part(const real *p, int64_t i, int64_t n, double rest)
{
    if (i + WIDE <= n) {
        return wload(p + i);
    }
    double lane[WIDE];
    vwide a;
    for (int l = 0; l < WIDE; l++) {
        lane[l] = i + l < n ? (double)p[i + l] : rest;
    }
    memcpy(&a, lane, sizeof a);
    return a;
}

SA_INLINE void
wstore_part(real *p, int64_t i, int64_t n, vwide a)
{
    if (i + WIDE <= n) {
        wstore(p + i, a);
        return;
    }
    real lane[WIDE];
    wstore(lane, a);
    memcpy(p + i, lane, (size_t)(n - i) * sizeof(real));
}

/* mask ? a : b */
SA_INLINE vwide
wselect(wint mask, vwide a, vwide b)
{
    return (vwide)(((wint)a & mask) | ((wint)b & ~mask));
}

SA_INLINE double
wsum(vwide a)
{
    double lane[WIDE];
    memcpy(lane, &a, sizeof lane);
    for (int half = WIDE / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; l++) {
            lane[l] += lane[l + half];
        }
    }
    return lane[0];
}

/* exp(x) = 2^n e^r, n = round(x / ln 2) with ln 2 in two parts [Cody, Waite], e^r by so many terms
 * of its series: 14 give a double to its last bits, 8 give 5e-9. 0 below -708, infinity above 709;
 * NaN stays. */
SA_INLINE vwide
wexp(vwide x, const int terms)
{
    static const double over_factorial[14] = {
        1. / 1,       1. / 1,        1. / 2,         1. / 6,         1. / 24,
        1. / 120,     1. / 720,      1. / 5040,      1. / 40320,     1. / 362880,
        1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
    const vwide magic = wset(6755399441055744.0); /* 1.5 2^52: the low bits hold n */
    const vwide t = x * wset(1.4426950408889634) + magic;
    const vwide n = t - magic;
    const vwide r = (x - n * wset(0.6931471803691238)) - n * wset(1.9082149292705877e-10);
    vwide p = wset(over_factorial[terms - 1]);
#pragma GCC unroll 16
    for (int i = terms - 2; i >= 0; i--) {
        p = p * r + wset(over_factorial[i]);
    }
    p *= (vwide)(((wint)t << 52) + 0x3FF0000000000000);
    p = wselect(x > wset(709), wset(INFINITY), p);
    return wselect(x < wset(-708), wset(0), p);
}

/* exp in the precision that the real type can hold. */
SA_INLINE vwide
wexp_real(vwide x)
{
    return wexp(x, SA_IS_F64 ? 14 : 8);
}

/* Phi(-|x|), the normal distribution's tail. float: with z = |x| / sqrt 2 and t = (z - 3) / (z +
 * 3), erfc(z) = exp(-z^2) P(t) / (z + 3), P fitted to 3e-9. double: libm. */
SA_INLINE vwide
normal_tail(vwide x)
{
#if defined(SA_REAL_IS_DOUBLE)
    for (int l = 0; l < WIDE; l++) {
        x[l] = 0.5 * erfc(fabs(x[l]) * 0.70710678118654752);
    }
    return x;
#else
    static const double fit[10] = {
        1.0740069073820209,     -0.8833944911406237,   0.5902283307986809,
        -0.3104658991473435,    0.11952871916300482,   -0.026840570123562467,
        -0.0012254635377125238, 0.0030821372761200847, -0.00048357154425952836,
        -0.0003262563726912426,
    };
    const vwide z = wselect(x < wset(0), -x, x) * wset(0.70710678118654752);
    const vwide near =
        wselect(z > wset(10), wset(10), z); /* further out the result is 0 in float */
    const vwide inverse = wset(1) / (near + wset(3));
    const vwide t = (near - wset(3)) * inverse;
    vwide p = wset(fit[9]);
#pragma GCC unroll 16
    for (int i = 8; i >= 0; i--) {
        p = p * t + wset(fit[i]);
    }
    return wset(0.5) * p * inverse * wexp_real(-(z * z));
#endif
}

SA_INLINE vwide
activate_wide(const sa_activation act, vwide x)
{
    switch (act) {
    case SA_ACT_GELU_TANH: { /* x (1 + tanh u) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x +
                                0.044715 x^3) */
        const vwide two_u = wset(1.5957691216057308) * (x + wset(0.044715) * (x * x * x));
        return x / (wset(1) + wexp_real(-two_u));
    }
    case SA_ACT_GELU: {
        const vwide tail = normal_tail(x);
        return x * wselect(x < wset(0), tail, wset(1) - tail);
    }
    case SA_ACT_SILU:
        return x / (wset(1) + wexp_real(-x));
    default:
        return wselect(x < wset(0), wset(0), x);
    }
}

SA_INLINE void
activate_row(const sa_activation act, real *y, const real *x, const real *gate, int64_t n)
{
    for (int64_t i = 0; i < n; i += WIDE) {
        vwide a = activate_wide(act, wload_part(x, i, n, 0));
        if (gate != NULL) {
            a *= wload_part(gate, i, n, 0);
        }
        wstore_part(y, i, n, a);
    }
}

static void
activate(sa_activation act, void *y, const void *x, const void *gate, int64_t n)
{
    switch (act) {
    case SA_ACT_GELU_TANH:
        activate_row(SA_ACT_GELU_TANH, y, x, gate, n);
        break;
    case SA_ACT_GELU:
        activate_row(SA_ACT_GELU, y, x, gate, n);
        break;
    case SA_ACT_SILU:
        activate_row(SA_ACT_SILU, y, x, gate, n);
        break;
    default:
        activate_row(SA_ACT_RELU, y, x, gate, n);
    }
}

static void
norm(void *y, const void *x, const void *weight, const void *bias, int64_t n, double eps,
     bool centred)
{
    const real *const row = x, *const w = weight, *const b = bias;
    double mean = 0;
    vwide sum = wset(0);
    if (centred) {
        for (int64_t i = 0; i < n; i += WIDE) {
            sum += wload_part(row, i, n, 0);
        }
        mean = wsum(sum) / (double)n;
        sum = wset(0);
    }
    for (int64_t i = 0; i < n; i += WIDE) {
        const vwide d = wload_part(row, i, n, mean) - wset(mean);
        sum += d * d;
    }
    const double factor = 1 / sqrt(wsum(sum) / (double)n + eps);
    for (int64_t i = 0; i < n; i += WIDE) {
        vwide d = (wload_part(row, i, n, 0) - wset(mean)) * wset(factor);
        if (w != NULL) {
            d *= wload_part(w, i, n, 0);
        }
        if (b != NULL) {
            d += wload_part(b, i, n, 0);
        }
        wstore_part(y, i, n, d);
    }
}

/* Lanes that peak looks for: those that hold the maximum, or a NaN where there is one. */
SA_INLINE vint
wanted(vreal a, real top, bool has_nan)
{
    return has_nan ? a != a : a == vset(top);
}

static double
peak(const void *x, int64_t n, int64_t *at)
{
    const real *const row = x;
    vreal high = vset(-INFINITY);
    vint odd = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vreal a = vload(row + i);
        high = vmax(a, high);
        odd |= a != a;
    }
    real top = vmax_lanes(high);
    bool has_nan = vany(odd);
    for (; i < n; i++) {
        has_nan |= row[i] != row[i];
        top = row[i] > top ? row[i] : top;
    }
    for (i = 0; i + LANES <= n && !vany(wanted(vload(row + i), top, has_nan)); i += LANES) {
    }
    while (i < n - 1 && !(has_nan ? row[i] != row[i] : row[i] == top)) {
        i++;
    }
    *at = i;
    return (double)row[i];
}

static double
exp_sum(const void *x, int64_t n, double top)
{
    vwide sum = wset(0);
    for (int64_t i = 0; i < n; i += WIDE) {
        sum += wexp(wload_part(x, i, n, -INFINITY) - wset(top), 14);
    }
    return wsum(sum);
}

static void
kl_sums(const void *x, const void *y, int64_t n, double x_top, double y_top, double sums[3])
{
    vwide x_sum = wset(0), y_sum = wset(0), d_sum = wset(0);
    for (int64_t i = 0; i < n; i += WIDE) {
        const vwide a = wload_part(x, i, n, -INFINITY) - wset(x_top);
        const vwide b = wload_part(y, i, n, -INFINITY) - wset(y_top);
        const vwide p = wexp(a, 14);
        x_sum += p;
        y_sum += wexp(b, 14);
        d_sum += wselect(a == wset(-INFINITY), wset(0), p * (a - b));
    }
    sums[0] = wsum(x_sum);
    sums[1] = wsum(y_sum);
    sums[2] = wsum(d_sum);
}

/* Columns of `vecs` vectors, compile time: acc[v] = a[k] b[k, ..]. */
SA_INLINE void
times_strip(vreal *acc, const int vecs, const sa_dtype dtype, const real *a, const void *b,
            int64_t at, int64_t ldb, int64_t k)
{
#pragma GCC unroll 4
    for (int v = 0; v < vecs; v++) {
        acc[v] = vset(0);
    }
    for (int64_t t = 0; t < k; t++, at += ldb) {
        const vreal x = vset(a[t]);
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            acc[v] += x * load_vector(b, dtype, at + v * LANES);
        }
    }
}

/* n < LANES numbers, then zeros */
SA_INLINE vreal
load_some(const void *src, const sa_dtype dtype, int64_t at, int64_t n)
{
    real lane[LANES] = {0};
    for (int64_t l = 0; l < n; l++) {
        lane[l] = load_one(src, dtype, at + l);
    }
    return vload(lane);
}

/* The last n < LANES columns. In vectors too: a scalar loop might round products and sums apart. */
SA_INLINE void
times_rest(real *y, const sa_dtype dtype, const real *a, const void *b, int64_t at, int64_t ldb,
           int64_t n, int64_t k)
{
    real lane[LANES];
    vreal acc = vset(0);
    for (int64_t t = 0; t < k; t++, at += ldb) {
        acc += vset(a[t]) * load_some(b, dtype, at, n);
    }
    vstore(lane, acc);
    for (int64_t l = 0; l < n; l++) {
        y[l] += lane[l];
    }
}

SA_INLINE void
times_as(const sa_dtype dtype, real *y, const real *a, const void *b, int64_t ldb, int64_t n,
         int64_t k)
{
    vreal acc[4];
    int64_t j = 0;
    for (; j + 4 * LANES <= n; j += 4 * LANES) {
        times_strip(acc, 4, dtype, a, b, j, ldb, k);
        for (int v = 0; v < 4; v++) {
            vstore(y + j + v * LANES, vload(y + j + v * LANES) + acc[v]);
        }
    }
    for (; j + LANES <= n; j += LANES) {
        times_strip(acc, 1, dtype, a, b, j, ldb, k);
        vstore(y + j, vload(y + j) + acc[0]);
    }
    if (j < n) {
        times_rest(y + j, dtype, a, b, j, ldb, n - j, k);
    }
}

static void
times(void *y, const void *a, const void *b, sa_dtype dtype, int64_t ldb, int64_t n, int64_t k)
{
    if (dtype == SA_BF16) {
        times_as(SA_BF16, y, a, b, ldb, n, k);
    } else if (dtype == SA_F16) {
        times_as(SA_F16, y, a, b, ldb, n, k);
    } else {
        times_as(SA_IS_F64 ? SA_F64 : SA_F32, y, a, b, ldb, n, k);
    }
}

/* LANES numbers of each of LANES rows from `at` on, turned: block[i] holds column i. Rows past n
 * repeat the last one, columns past k are 0. */
SA_INLINE void
load_turned(vreal *block, const sa_dtype dtype, const void *b, int64_t at, int64_t ldb, int64_t n,
            int64_t k)
{
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) {
        const int64_t row = at + SA_MIN(r, n - 1) * ldb;
        block[r] = k >= LANES ? load_vector(b, dtype, row) : load_some(b, dtype, row, k);
    }
    vtranspose(block);
}

SA_INLINE void
times_turned_as(const sa_dtype dtype, real *y, const real *a, const void *b, int64_t ldb, int64_t n,
                int64_t k)
{
    for (int64_t j = 0; j < n; j += LANES) {
        vreal acc = vset(0), block[LANES];
        int64_t t = 0;
        for (; t + LANES <= k; t += LANES) {
            load_turned(block, dtype, b, j * ldb + t, ldb, n - j, LANES);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                acc += vset(a[t + i]) * block[i];
            }
        }
        if (t < k) {
            load_turned(block, dtype, b, j * ldb + t, ldb, n - j, k - t);
            for (int i = 0; i < k - t; i++) {
                acc += vset(a[t + i]) * block[i];
            }
        }
        real lane[LANES];
        vstore(lane, acc);
        for (int64_t l = 0; l < SA_MIN(LANES, n - j); l++) {
            y[j + l] += lane[l];
        }
    }
}

static void
times_turned(void *y, const void *a, const void *b, sa_dtype dtype, int64_t ldb, int64_t n,
             int64_t k)
{
    if (dtype == SA_BF16) {
        times_turned_as(SA_BF16, y, a, b, ldb, n, k);
    } else if (dtype == SA_F16) {
        times_turned_as(SA_F16, y, a, b, ldb, n, k);
    } else {
        times_turned_as(SA_IS_F64 ? SA_F64 : SA_F32, y, a, b, ldb, n, k);
    }
}

const sa_rows SA_NAME(sa_rows) = {
    .activate = activate,
    .norm = norm,
    .peak = peak,
    .times = times,
    .times_turned = times_turned,
    .exp_sum = exp_sum,
    .kl_sums = kl_sums,
};
