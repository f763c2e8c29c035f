/* tile_select.h - selection: which scores of a row reach a threshold.
 *
 * A score reaches t unless it is less than t: NaN, which counts as the largest, always does.
 */
#define SELECT_GROUP 32 /* scores that one test passes over when none of them reaches t */

static int64_t
count_ge(const void *s, int64_t n, double t)
{
    const real *const score = s;
    const real level = (real)t;
    const vreal levels = vset(level);
    vint less[4] = {0}; /* lanes count down: a true comparison is -1 */
    int64_t i = 0, below = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            less[v] += vload(score + i + v * LANES) < levels;
        }
    }
    const vint all = less[0] + less[1] + less[2] + less[3];
    for (int lane = 0; lane < LANES; lane++) {
        below -= all[lane];
    }
    for (; i < n; i++) {
        below += score[i] < level;
    }
    return n - below;
}

/* One bit a lane of a mask. */
SA_INLINE uint32_t
lane_bits(vint mask)
{
#if defined(SA_HAVE_AVX512) && defined(SA_REAL_IS_DOUBLE)
    return _mm512_movepi64_mask((__m512i)mask);
#elif defined(SA_HAVE_AVX512)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(SA_HAVE_AVX2) && defined(SA_REAL_IS_DOUBLE)
    return (uint32_t)_mm256_movemask_pd((__m256d)mask);
#elif defined(SA_HAVE_AVX2)
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < LANES; lane++) {
        bits |= ((uint32_t)mask[lane] & 1u) << lane;
    }
    return bits;
#endif
}

static int64_t
compress_ge(const void *s, int64_t n, double t, int32_t *index)
{
    const real *const score = s;
    const real level = (real)t;
    const vreal levels = vset(level);
    int64_t i = 0, found = 0;
    for (; i + SELECT_GROUP <= n; i += SELECT_GROUP) {
        vint reach = vset_int(0);
#pragma GCC unroll 16
        for (int v = 0; v < SELECT_GROUP / LANES; v++) {
            reach |= ~(vload(score + i + v * LANES) < levels);
        }
        if (!vany(reach)) {
            continue;
        }
        uint32_t bits = 0;
#pragma GCC unroll 16
        for (int v = 0; v < SELECT_GROUP / LANES; v++) {
            bits |= lane_bits(~(vload(score + i + v * LANES) < levels)) << (v * LANES);
        }
        for (; bits != 0; bits &= bits - 1) {
            index[found++] = (int32_t)i + __builtin_ctz(bits);
        }
    }
    for (; i < n; i++) {
        if (!(score[i] < level)) { /* never writes past the last one: index may have no more room */
            index[found++] = (int32_t)i;
        }
    }
    return found;
}
#undef SELECT_GROUP
