/* philox.h - counter-based random numbers, Philox4x64-10.
 * [Salmon, Moraes, Dror, Shaw 2011, doi:10.1145/2063384.2063405]
 *
 * A draw is a function of its address, never of what was drawn before. An address has four words:
 *   numpy.random.Philox(key=[key0, key1], counter=[draw, row, head, batch]).random_raw(4)
 * NumPy raises its counter before the first block, so the block here is that of counter + 1.
 */
#ifndef SA_PHILOX_H
#define SA_PHILOX_H

#include <stdint.h>

typedef struct {
    uint64_t word[4];
} sa_philox_block;

/* a * b as 128 bits: returns the high word. */
static inline uint64_t
sa_mul_high(uint64_t a, uint64_t b, uint64_t *low)
{
#ifdef __SIZEOF_INT128__
    const unsigned __int128 product = (unsigned __int128)a * b;
    *low = (uint64_t)product;
    return (uint64_t)(product >> 64);
#else
    const uint64_t mask = 0xFFFFFFFFu;
    const uint64_t ll = (a & mask) * (b & mask), lh = (a & mask) * (b >> 32);
    const uint64_t hl = (a >> 32) * (b & mask), hh = (a >> 32) * (b >> 32);
    const uint64_t middle = (ll >> 32) + (lh & mask) + (hl & mask);
    *low = a * b;
    return hh + (lh >> 32) + (hl >> 32) + (middle >> 32);
#endif
}

static inline sa_philox_block
sa_philox(uint64_t key0, uint64_t key1, uint64_t draw, uint64_t row, uint64_t head, uint64_t batch)
{
    uint64_t c0 = draw + 1, c1 = row, c2 = head, c3 = batch;
    c1 += c0 == 0;
    c2 += c0 == 0 && c1 == 0;
    c3 += c0 == 0 && c1 == 0 && c2 == 0;
    for (int round = 0; round < 10; round++) {
        uint64_t low0, low1;
        const uint64_t high0 = sa_mul_high(UINT64_C(0xD2E7470EE14C6C93), c0, &low0);
        const uint64_t high1 = sa_mul_high(UINT64_C(0xCA5A826395121157), c2, &low1);
        c0 = high1 ^ c1 ^ key0;
        c1 = low1;
        c2 = high0 ^ c3 ^ key1;
        c3 = low0;
        key0 += UINT64_C(0x9E3779B97F4A7C15); /* Weyl constants: golden ratio, sqrt(3) - 1 */
        key1 += UINT64_C(0xBB67AE8584CAA73B);
    }
    return (sa_philox_block){{c0, c1, c2, c3}};
}

/* Uniform integer in [0, n), 1 <= n <= 2^32, of the address (draw, row, head, batch).
 *
 * The high half of word * n, passing over words whose low half is below 2^64 mod n: no bias [Lemire
 * 2019, arXiv:1805.10941]. All four words of an address are passed over with probability below
 * 2^-128; then the last one serves. */
static inline uint64_t
sa_philox_below(uint64_t n, uint64_t key0, uint64_t key1, uint64_t draw, uint64_t row,
                uint64_t head, uint64_t batch)
{
    const sa_philox_block block = sa_philox(key0, key1, draw, row, head, batch);
    uint64_t low, high = sa_mul_high(block.word[0], n, &low);
    if (low < n) {
        const uint64_t uneven = (0 - n) % n;
        for (int i = 1; i < 4 && low < uneven; i++) {
            high = sa_mul_high(block.word[i], n, &low);
        }
    }
    return high;
}

#endif
