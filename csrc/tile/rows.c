/* rows.c - picks the table of the instruction set in force. */
#include "base/cpu.h"
#include "tile/rows.h"

extern const sa_rows sa_rows_f32_base, sa_rows_f64_base;
#ifdef SA_X86
extern const sa_rows sa_rows_f32_avx2, sa_rows_f64_avx2, sa_rows_f32_avx512, sa_rows_f64_avx512;
#endif

const sa_rows *
sa_rows_for(bool f64)
{
    switch (sa_isa_now()) {
#ifdef SA_X86
    case SA_ISA_AVX512:
        return f64 ? &sa_rows_f64_avx512 : &sa_rows_f32_avx512;
    case SA_ISA_AVX2:
        return f64 ? &sa_rows_f64_avx2 : &sa_rows_f32_avx2;
#endif
    default:
        return f64 ? &sa_rows_f64_base : &sa_rows_f32_base;
    }
}
