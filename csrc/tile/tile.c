/* tile.c - picks the table of the instruction set in force. */
#include "tile/tile.h"

extern const sa_tile sa_tile_f32_base, sa_tile_f64_base;
#ifdef SA_X86
extern const sa_tile sa_tile_f32_avx2, sa_tile_f64_avx2, sa_tile_f32_avx512, sa_tile_f64_avx512;
#endif

const sa_tile *
sa_tile_for(bool f64)
{
    switch (sa_isa_now()) {
#ifdef SA_X86
    case SA_ISA_AVX512:
        return f64 ? &sa_tile_f64_avx512 : &sa_tile_f32_avx512;
    case SA_ISA_AVX2:
        return f64 ? &sa_tile_f64_avx2 : &sa_tile_f32_avx2;
#endif
    default:
        return f64 ? &sa_tile_f64_base : &sa_tile_f32_base;
    }
}
