/* test_half.c - float16 and bfloat16 against their definitions, for every bit pattern. */
#include <math.h>

#include "base/half.h"
#include "check.h"

/* The value of a pattern with `fraction` bits of significand and the given bias. */
static double
value_of(unsigned pattern, int fraction, int bias)
{
    const unsigned sign = pattern >> 15, exponent = (pattern & 0x7FFF) >> fraction;
    const unsigned top = 0x7FFFu >> fraction, digits = pattern & ((1u << fraction) - 1);
    double value;
    if (exponent == top) {
        value = digits ? (double)NAN : (double)INFINITY;
    } else if (exponent == 0) {
        value = ldexp(digits, 1 - bias - fraction);
    } else {
        value = ldexp(digits + (1u << fraction), (int)exponent - bias - fraction);
    }
    return sign ? -value : value;
}

typedef struct {
    const char *name;
    int fraction, bias;
    float (*widen)(uint16_t);
    uint16_t (*narrow)(float);
} format;

static void
check_widen(const format *f)
{
    check_case("%s to float, every pattern", f->name);
    for (unsigned p = 0; p < 0x10000; p++) {
        const float got = f->widen((uint16_t)p);
        const double want = value_of(p, f->fraction, f->bias);
        CHECK(isnan(want) ? isnan(got) : (double)got == want && !signbit(got) == !(p >> 15),
              "pattern %04x gave %g", p, (double)got);
    }
    check_case("%s to float and back, every pattern", f->name);
    for (unsigned p = 0; p < 0x10000; p++) {
        const unsigned quiet =
            isnan(value_of(p, f->fraction, f->bias)) ? 1u << (f->fraction - 1) : 0;
        const uint16_t back = f->narrow(f->widen((uint16_t)p));
        CHECK(back == (p | quiet), "pattern %04x came back as %04x", p, back);
    }
}

/* Between two neighbours: below the middle goes down, above goes up, the middle to the even one. */
static void
check_round(const format *f)
{
    const unsigned infinity = (0x7FFFu >> f->fraction) << f->fraction;
    check_case("float to %s, around every middle", f->name);
    for (unsigned p = 0; p < infinity; p++) {
        const double low = value_of(p, f->fraction, f->bias);
        const double high = p + 1 < infinity ? value_of(p + 1, f->fraction, f->bias)
                                             : 2 * low - value_of(p - 1, f->fraction, f->bias);
        const float middle = (float)(low + (high - low) / 2); /* exact but for the last bfloat16 */
        const uint16_t even = (uint16_t)(p + (p & 1));
        CHECK(f->narrow(middle) == even, "%a gave %04x", (double)middle, f->narrow(middle));
        CHECK(f->narrow(-middle) == (even | 0x8000), "%a gave %04x", (double)-middle,
              f->narrow(-middle));
        CHECK(f->narrow(nextafterf(middle, 0)) == p, "below %a", (double)middle);
        CHECK(f->narrow(nextafterf(middle, INFINITY)) == p + 1, "above %a", (double)middle);
    }
}

void
sa_selftest_half(void)
{
    static const format formats[] = {
        {"float16", 10, 15, sa_f16_to_f32, sa_f32_to_f16},
        {"bfloat16", 7, 127, sa_bf16_to_f32, sa_f32_to_bf16},
    };
    for (int i = 0; i < 2; i++) {
        check_widen(&formats[i]);
        check_round(&formats[i]);
        check_case("float to %s, the ends", formats[i].name);
        const unsigned infinity = (0x7FFFu >> formats[i].fraction) << formats[i].fraction;
        CHECK(formats[i].narrow(INFINITY) == infinity, "infinity");
        CHECK(formats[i].narrow(-INFINITY) == (infinity | 0x8000), "-infinity");
        CHECK(formats[i].narrow(3.4e38f) == infinity, "the largest float");
        CHECK(formats[i].narrow(1e-45f) == 0, "the smallest float");
        CHECK(formats[i].narrow(-0.0f) == 0x8000, "-0");
        CHECK(formats[i].narrow(NAN) > infinity, "NaN");
    }
}
