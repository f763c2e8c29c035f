/* tile_f32_avx512.c - the tile table of float on avx512. */
#include "base/cpu.h"
#ifdef SA_X86
#include "tile/tile_includes.h"
#include "tile/target_avx512.h"
#define SA_REAL float
#define SA_VBYTES 64
#define SA_SUFFIX f32_avx512
#include "tile/tile_body.h"
#include "tile/target_pop.h"
#endif
