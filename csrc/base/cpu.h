/* cpu.h - which instruction set runs. */
#ifndef SA_CPU_H
#define SA_CPU_H

#include <stdbool.h>

#if defined(__x86_64__) || defined(_M_X64)
#define SA_X86 1
#endif

typedef enum { SA_ISA_BASE = 0, SA_ISA_AVX2, SA_ISA_AVX512, SA_ISA_COUNT } sa_isa;

sa_isa sa_isa_now(void);     /* the best this CPU has, or SPARSEATTN_ISA=baseline|avx2|avx512 */
bool sa_isa_has(sa_isa isa); /* CPUID and XGETBV: avx2 means AVX2+FMA+F16C; avx512 F+VL+BW+DQ */
bool sa_isa_set(sa_isa isa); /* false when this CPU lacks it; for tests */
const char *sa_isa_name(sa_isa isa); /* "baseline" | "avx2" | "avx512" */
/* SPARSEATTN_ISA held a word that is no ISA or that this CPU lacks: that word, else NULL. */
const char *sa_isa_refused(void);

#endif
