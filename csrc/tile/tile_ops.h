/* tile_ops.h - the functions of rows.h but for its products: activations, norms, sums of losses.
 *
 * Arithmetic is double for both real types: a vector then holds half as many numbers, and in return
 * float rows come out within an ulp of the truth with no case analysis. Products take far longer
 * than all of this.
 */
#include "tile/rows.h"
#include "tile/tile_thin.h"

typedef double vwide __attribute__((vector_size(SA_VBYTES)));
typedef int64_t wint __attribute__((vector_size(SA_VBYTES)));
typedef uint64_t wbits __attribute__((vector_size(SA_VBYTES))); /* overflow is defined */
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
    p *= (vwide)(((wbits)t << 52) + 0x3FF0000000000000);
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

const sa_rows SA_NAME(sa_rows) = {
    .activate = activate,
    .norm = norm,
    .peak = peak,
    .times = times,
    .times_turned = times_turned,
    .exp_sum = exp_sum,
    .kl_sums = kl_sums,
};
