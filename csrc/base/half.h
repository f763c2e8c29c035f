/* half.h - scalar float16 and bfloat16, as bit patterns, to float and back. Exact for every input:
 * subnormal numbers, infinities, ties to even; NaN stays NaN (quiet, sign and leading payload bits
 * kept), as F16C does. */
#ifndef SA_HALF_H
#define SA_HALF_H

#include <stdint.h>
#include <string.h>

static inline float
sa_float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t
sa_bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float
sa_f16_to_f32(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7FFFu;
    if (magnitude > 0x7C00u) {
        return sa_float_of(sign | 0x7FC00000u | magnitude << 13);
    }
    if (magnitude == 0x7C00u) {
        return sa_float_of(sign | 0x7F800000u);
    }
    if (magnitude < 0x0400u) { /* zero or subnormal: magnitude / 2^24, exact in float */
        return sa_float_of(sign | sa_bits_of((float)magnitude * 0x1p-24f));
    }
    return sa_float_of(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

static inline uint16_t
sa_f32_to_f16(float x)
{
    const uint32_t bits = sa_bits_of(x);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) {
        return (uint16_t)(sign | 0x7E00u | (magnitude >> 13 & 0x03FFu));
    }
    if (magnitude >= 0x477FF000u) { /* 65520 and above round to infinity */
        return (uint16_t)(sign | 0x7C00u);
    }
    if (magnitude <
        0x38800000u) { /* below 2^-14: adding 1/2 leaves x 2^24 in the last bits, rounded to even */
        return (uint16_t)(sign | (sa_bits_of(sa_float_of(magnitude) + 0.5f) - 0x3F000000u));
    }
    const uint32_t odd = magnitude >> 13 & 1u;
    return (uint16_t)(sign | ((magnitude - ((127u - 15u) << 23) + 0x0FFFu + odd) >> 13));
}

static inline float
sa_bf16_to_f32(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    return sa_float_of((half & 0x7FFFu) > 0x7F80u ? bits | 0x00400000u : bits);
}

static inline uint16_t
sa_f32_to_bf16(float x)
{
    const uint32_t bits = sa_bits_of(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
        return (uint16_t)(bits >> 16 | 0x0040u);
    }
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

#endif
