/* test_philox.c - against numpy.random.Philox(key=key, counter=address).random_raw(4), where key
 * and address are uint64 arrays: NumPy rounds large integers of a list to float64. */
#include "base/philox.h"

#include "check.h"

#define ALL UINT64_MAX

static const struct {
    uint64_t key[2], address[4], words[4];
} golden[] = {
    {{1, 2},
     {3, 4, 5, 6},
     {0x8070e5788d05927e, 0x1c5aef1cb5451508, 0xd04b22ec4863e2a0, 0xd67cc7da10e919ce}},
    {{0, 0},
     {0, 0, 0, 0},
     {0x02f4ba6408e4d89b, 0x3dd62b0b9ca8c5b2, 0x1c8667a55d902e79, 0x907d7a052fd5b4dc}},
    {{ALL, ALL},
     {ALL, ALL, ALL, ALL},
     {0x44b7493d1acfc229, 0x6636af8e997921dd, 0x3f73e132b5b3780e, 0x605644dde03b01b1}},
    {{0x0123456789abcdef, 0xfedcba9876543210},
     {ALL, 7, ALL, 9},
     {0xa0af458c49056b6d, 0xa3ea687e09358973, 0x30126458e7aa3a61, 0x9641befc1d57fdbe}},
    {{1, 2},
     {ALL, ALL, 5, 6},
     {0x5f48c7f3eb171f81, 0x72b715c1fe6850ca, 0xb6404c2c8e7ef49f, 0x54b6f6306c519d0f}},
};

void
sa_selftest_philox(void)
{
    check_case("Philox gives NumPy's words");
    for (unsigned i = 0; i < sizeof golden / sizeof *golden; i++) {
        const uint64_t *a = golden[i].address;
        const sa_philox_block b =
            sa_philox(golden[i].key[0], golden[i].key[1], a[0], a[1], a[2], a[3]);
        for (int w = 0; w < 4; w++) {
            CHECK(b.word[w] == golden[i].words[w], "case %u, word %d: %016llx", i, w,
                  (unsigned long long)b.word[w]);
        }
    }

    check_case("bounded integers are the high half of word * n");
    const uint64_t limits[] = {1, 2, 3, 10, 1000003, UINT64_C(1) << 32};
    for (unsigned i = 0; i < sizeof limits / sizeof *limits; i++) {
        for (uint64_t draw = 0; draw < 1000; draw++) {
            const uint64_t n = limits[i], word = sa_philox(7, 8, draw, 1, 2, 3).word[0];
            const uint64_t got = sa_philox_below(n, 7, 8, draw, 1, 2, 3);
            /* long division of word * n by 2^64, in halves */
            const uint64_t low = (word & 0xFFFFFFFF) * n;
            CHECK(got == ((word >> 32) * n + (low >> 32)) >> 32 && got < n, "n %llu, draw %llu",
                  (unsigned long long)n, (unsigned long long)draw);
        }
    }

    check_case("bounded integers are even: chi-square of 60 bins");
    double bins[60] = {0}, chi = 0;
    for (uint64_t draw = 0; draw < 60000; draw++) {
        bins[sa_philox_below(60, 1, 0, draw, 0, 0, 0)]++;
    }
    for (int i = 0; i < 60; i++) {
        chi += (bins[i] - 1000) * (bins[i] - 1000) / 1000;
    }
    CHECK(chi > 25 && chi < 110, "%g, expected about 59", chi); /* five sigma */
}
