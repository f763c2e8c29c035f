/* target_avx512.h - opens a region for AVX-512 F, VL, BW and DQ; target_pop.h closes it. */
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq"))),                   \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,prefer-vector-width=512")
#endif
#define SA_HAVE_AVX2 1
#define SA_HAVE_AVX512 1
#define SA_TARGET_PUSHED 1
