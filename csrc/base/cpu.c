/* cpu.c - CPUID once, then a choice that the environment or a test may lower. */
#define _POSIX_C_SOURCE 200809L /* strdup */
#include "base/cpu.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/environment.h"

#ifdef SA_X86
#include <cpuid.h>
#endif

static const char *const names[SA_ISA_COUNT] = {"baseline", "avx2", "avx512"};

static atomic_int chosen = -1; /* -1: nobody has asked yet */
static _Atomic(char *) refused;

#ifdef SA_X86
static uint64_t
enabled_state(void) /* register sets that the operating system saves (XCR0) */
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static sa_isa
best_isa(void)
{
    enum {
        FMA = 1 << 12,
        OSXSAVE = 1 << 27,
        AVX = 1 << 28,
        F16C = 1 << 29,
        LEAF1 = FMA | OSXSAVE | AVX | F16C
    };
    enum { AVX2 = 1 << 5, F = 1 << 16, DQ = 1 << 17, BW = 1 << 30 };
    const uint32_t vl = UINT32_C(1) << 31, leaf7 = (uint32_t)(F | DQ | BW) | vl;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & LEAF1) != LEAF1) {
        return SA_ISA_BASE;
    }
    const uint64_t state = enabled_state();
    if ((state & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & AVX2)) {
        return SA_ISA_BASE;
    }
    return (state & 0xE6) == 0xE6 && (b & leaf7) == leaf7 ? SA_ISA_AVX512 : SA_ISA_AVX2;
}
#else
static sa_isa
best_isa(void)
{
    return SA_ISA_BASE;
}
#endif

/* Keeps a copy of the refused word: the environment may change under us. */
static void
refuse(const char *word)
{
    char *none = NULL, *copy = strdup(word);
    if (!atomic_compare_exchange_strong(&refused, &none, copy)) {
        free(copy);
    }
}

/* Several threads may come here at once: they agree. */
static void
choose(void)
{
    sa_isa isa = best_isa();
    char room[SA_VALUE_MAX];
    const char *word = sa_environment("SPARSEATTN_ISA", room);
    if (word != NULL && word[0] != '\0') {
        int named = 0;
        while (named < SA_ISA_COUNT && strcmp(word, names[named]) != 0) {
            named++;
        }
        if (named < SA_ISA_COUNT && sa_isa_has((sa_isa)named)) {
            isa = (sa_isa)named;
        } else {
            refuse(word);
        }
    }
    int unset = -1;
    atomic_compare_exchange_strong(&chosen, &unset, (int)isa);
}

sa_isa
sa_isa_now(void)
{
    const int isa = atomic_load_explicit(&chosen, memory_order_acquire);
    if (isa < 0) {
        choose();
        return (sa_isa)atomic_load(&chosen);
    }
    return (sa_isa)isa;
}

bool
sa_isa_has(sa_isa isa)
{
    return isa <= best_isa();
}

bool
sa_isa_set(sa_isa isa)
{
    if (isa >= SA_ISA_COUNT || !sa_isa_has(isa)) {
        return false;
    }
    (void)
        sa_isa_now(); /* so that the environment's word has been read, and refused if it must be */
    atomic_store(&chosen, (int)isa);
    return true;
}

const char *
sa_isa_name(sa_isa isa)
{
    return names[isa];
}

const char *
sa_isa_refused(void)
{
    (void)sa_isa_now();
    return atomic_load(&refused);
}
