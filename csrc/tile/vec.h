/* vec.h - inline functions over the compiler's vector types, for one real type and one width.
 *
 * Included by tile_body.h after SA_REAL and SA_VBYTES are set. a * b + c contracts to one FMA under
 * -ffp-contract=fast. Intrinsics stand only where the language has no vector operator: max, select.
 */
#define SA_PASTE2(a, b) a##_##b
#define SA_PASTE(a, b) SA_PASTE2(a, b)
#define SA_NAME(name) SA_PASTE(name, SA_SUFFIX)
#define SA_IS_F64 (sizeof(SA_REAL) == 8)
#define LANES ((int)(SA_VBYTES / sizeof(SA_REAL)))

typedef SA_REAL real;
typedef SA_REAL vreal __attribute__((vector_size(SA_VBYTES)));
typedef SA_REAL vreal_u
    __attribute__((vector_size(SA_VBYTES), aligned(sizeof(SA_REAL)), may_alias));
#if defined(SA_REAL_IS_DOUBLE)
typedef int64_t sint;
#else
typedef int32_t sint;
#endif
typedef sint vint __attribute__((vector_size(SA_VBYTES)));
#if !defined(SA_REAL_IS_DOUBLE)
typedef uint32_t vbits __attribute__((vector_size(SA_VBYTES))); /* overflow is defined */
#endif
typedef sint vint_u __attribute__((vector_size(SA_VBYTES), aligned(sizeof(sint)), may_alias));

#define SA_INLINE static inline __attribute__((always_inline, unused))

SA_INLINE vreal
vload(const real *p)
{
    return *(const vreal_u *)p;
}

SA_INLINE void
vstore(real *p, vreal a)
{
    *(vreal_u *)p = a;
}

SA_INLINE vreal
vset(real x)
{
    return x - (vreal){0};
}

SA_INLINE vint
vset_int(sint x)
{
    return x - (vint){0};
}

#if !defined(SA_REAL_IS_DOUBLE)
typedef uint32_t vbits __attribute__((vector_size(SA_VBYTES)));
typedef uint16_t vhalf __attribute__((vector_size(SA_VBYTES / 2)));
typedef uint16_t vhalf_u
    __attribute__((vector_size(SA_VBYTES / 2), aligned(sizeof(uint16_t)), may_alias));

/* LANES numbers of float16 or bfloat16, exactly; a NaN may still be a signalling one, which any
 * arithmetic on it makes quiet. */
SA_INLINE vreal
vload_half(const uint16_t *p, const sa_dtype dtype)
{
#if defined(SA_HAVE_AVX512)
    const __m256i half = _mm256_loadu_si256((const __m256i *)p);
    return dtype == SA_BF16 ? (vreal)((vbits)_mm512_cvtepu16_epi32(half) << 16)
                            : (vreal)_mm512_cvtph_ps(half);
#elif defined(SA_HAVE_AVX2)
    const __m128i half = _mm_loadu_si128((const __m128i *)p);
    return dtype == SA_BF16 ? (vreal)((vbits)_mm256_cvtepu16_epi32(half) << 16)
                            : (vreal)_mm256_cvtph_ps(half);
#else
    if (dtype == SA_BF16) {
        return (vreal)(__builtin_convertvector(*(const vhalf_u *)p, vbits) << 16);
    }
#if defined(SA_HAVE_NEON)
    return (vreal)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    real lane[LANES];
    for (int i = 0; i < LANES; i++) {
        lane[i] = sa_f16_to_f32(p[i]);
    }
    return vload(lane);
#endif
#endif
}

/* The bits that sa_f32_to_f16 and sa_f32_to_bf16 give. */
SA_INLINE void
vstore_half(uint16_t *p, const sa_dtype dtype, vreal a)
{
    if (dtype == SA_BF16) {
        const vbits bits = (vbits)a, nan = (vbits)(a != a);
        const vbits nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        *(vhalf_u *)p =
            __builtin_convertvector((nan & (bits >> 16 | 0x40)) | (~nan & nearest), vhalf);
        return;
    }
#if defined(SA_HAVE_AVX512)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT));
#elif defined(SA_HAVE_AVX2)
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT));
#elif defined(SA_HAVE_NEON)
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)a)));
#else
    for (int i = 0; i < LANES; i++) {
        p[i] = sa_f32_to_f16(a[i]);
    }
#endif
}
#endif

/* mask ? a : b, mask lanes all ones or all zeros */
SA_INLINE vreal
vselect(vint mask, vreal a, vreal b)
{
#if defined(SA_HAVE_AVX512) && defined(SA_REAL_IS_DOUBLE)
    return (vreal)_mm512_mask_blend_pd(_mm512_movepi64_mask((__m512i)mask), (__m512d)b, (__m512d)a);
#elif defined(SA_HAVE_AVX512)
    return (vreal)_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)mask), (__m512)b, (__m512)a);
#elif defined(SA_HAVE_AVX2) && defined(SA_REAL_IS_DOUBLE)
    return (vreal)_mm256_blendv_pd((__m256d)b, (__m256d)a, (__m256d)mask);
#elif defined(SA_HAVE_AVX2)
    return (vreal)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
#else
    return (vreal)(((vint)a & mask) | ((vint)b & ~mask));
#endif
}

/* a > b ? a : b, so that a NaN in b stays */
SA_INLINE vreal
vmax(vreal a, vreal b)
{
#if defined(SA_HAVE_AVX512) && defined(SA_REAL_IS_DOUBLE)
    return (vreal)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(SA_HAVE_AVX512)
    return (vreal)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(SA_HAVE_AVX2) && defined(SA_REAL_IS_DOUBLE)
    return (vreal)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(SA_HAVE_AVX2)
    return (vreal)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return vselect(a > b, a, b);
#endif
}

/* true when any lane of the mask is set */
SA_INLINE bool
vany(vint mask)
{
#if defined(SA_HAVE_AVX512)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(SA_HAVE_AVX2)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(SA_HAVE_NEON)
    return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
    sint any = 0;
    for (int i = 0; i < LANES; i++) {
        any |= mask[i];
    }
    return any != 0;
#endif
}

/* Lanes a0 b0 a1 b1 ...: the lower and the upper half of the shuffle of two vectors. */
#if defined(SA_REAL_IS_DOUBLE) && SA_VBYTES == 16
#define SA_LOW 0, 2
#define SA_HIGH 1, 3
#elif (defined(SA_REAL_IS_DOUBLE) && SA_VBYTES == 32) || SA_VBYTES == 16
#define SA_LOW 0, 4, 1, 5
#define SA_HIGH 2, 6, 3, 7
#elif (defined(SA_REAL_IS_DOUBLE) && SA_VBYTES == 64) || SA_VBYTES == 32
#define SA_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define SA_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define SA_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SA_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif

/* Sum of the lanes: the upper half onto the lower, down to one. */
SA_INLINE real
vsum(vreal a)
{
    for (int half = LANES / 2; half > 0; half /= 2) {
        a = __builtin_shufflevector(a, a, SA_LOW) + __builtin_shufflevector(a, a, SA_HIGH);
    }
    return a[0];
}

SA_INLINE real
vmax_lanes(vreal a)
{
    for (int half = LANES / 2; half > 0; half /= 2) {
        a = vmax(__builtin_shufflevector(a, a, SA_LOW), __builtin_shufflevector(a, a, SA_HIGH));
    }
    return a[0];
}

/* Transposes LANES vectors in place: log2(LANES) perfect shuffles. */
SA_INLINE void
vtranspose(vreal row[LANES])
{
#pragma GCC unroll 4
    for (int stage = 1; stage < LANES; stage *= 2) {
        vreal next[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = __builtin_shufflevector(row[i], row[i + LANES / 2], SA_LOW);
            next[2 * i + 1] = __builtin_shufflevector(row[i], row[i + LANES / 2], SA_HIGH);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            row[i] = next[i];
        }
    }
}

/* Folds 2 half vectors to half. Loops over both at once would keep GCC from using registers. */
SA_INLINE void
fold_sums(vreal *a, const int half)
{
#pragma GCC unroll 16
    for (int i = 0; i < half; i++) {
        a[i] = __builtin_shufflevector(a[i], a[i + half], SA_LOW) +
               __builtin_shufflevector(a[i], a[i + half], SA_HIGH);
    }
}

/* Lane i: the sum of a[i], added in the order of vsum. */
SA_INLINE vreal
vsums(vreal a[LANES])
{
    if (LANES > 8) {
        fold_sums(a, 8);
    }
    if (LANES > 4) {
        fold_sums(a, 4);
    }
    if (LANES > 2) {
        fold_sums(a, 2);
    }
    fold_sums(a, 1);
    return a[0];
}

#if defined(SA_HAVE_AVX512) && !defined(SA_REAL_IS_DOUBLE)
/* 2^(k / 32) */
static const float exp2_table[32] = {
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f,
    1.1637249f,  1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f,
    1.35425556f, 1.38390994f, 1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f,
    1.5759809f,  1.61049032f, 1.64575553f, 1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f,
    1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f,
};

/* Table and parabola: fewer multiply-adds than the polynomial below, and the rest on units that the
 * scores leave idle. e^d = 2^n 2^(k/32) 2^r with 32 n + k = round(32 d log2 e), |r| <= 1/64;
 * relative error 1.5e-7 near 0, exactly 0 below -87.3. */
SA_INLINE vreal
vexp_table(vreal d)
{
    const vreal log2e = vset(1.44269504088896341f);
    const vreal magic = vset(393216.0f); /* 1.5 2^18: the low bits hold 32 n + k */
    const vreal t = d * log2e + magic;
    const vreal r = d * log2e - (t - magic);
    const vreal p = (r * vset(0.24022650718688965f) + vset(0.6931573152542114f)) * r + vset(1.0f);
    const __m512 root = _mm512_permutex2var_ps(_mm512_loadu_ps(exp2_table), (__m512i)t,
                                               _mm512_loadu_ps(exp2_table + 16));
    const vbits power = (vbits)root + (((vbits)t & ~31u) << 18);
    const __mmask16 seen = _mm512_cmp_ps_mask((__m512)d, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
    return (vreal)_mm512_maskz_mul_ps(seen, (__m512)p, (__m512)power);
}
#endif

/* exp(d) for d <= 40. float32: e^d = 2^n 2^r with n = round(d log2 e), a degree-6 polynomial for
 * 2^r (relative error 8e-8), 0 below -87.7; NaN stays NaN because 2^n is a factor. float64: libm,
 * lane by lane. */
SA_INLINE vreal
vexp(vreal d)
{
#if defined(SA_REAL_IS_DOUBLE)
    for (int i = 0; i < LANES; i++) {
        d[i] = exp(d[i]);
    }
    return d;
#elif defined(SA_HAVE_AVX512)
    return vexp_table(d);
#else
    const vreal log2e = vset(1.44269504088896341f);
    const vreal magic = vset(12582912.0f + 127.0f); /* 1.5 2^23: the low bits hold n + 127 */
    d = vmax(vset(-88.0f), d);
    const vreal t = d * log2e + magic;
    const vreal r = d * log2e - (t - magic);
    vreal p = r * vset(0.00015353361959569156f) + vset(0.0013398875016719103f);
    p = p * r + vset(0.00961843691766262f);
    p = p * r + vset(0.055503323674201965f);
    p = p * r + vset(0.24022647738456726f);
    p = p * r + vset(0.6931471824645996f);
    p = p * r + vset(1.0f);
    return p * (vreal)((vbits)t << 23);
#endif
}
