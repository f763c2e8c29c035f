/* target_avx2.h - opens a region compiled for AVX2, FMA and F16C; target_pop.h closes it. */
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define SA_HAVE_AVX2 1
#define SA_TARGET_PUSHED 1
