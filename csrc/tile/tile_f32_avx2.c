/* tile_f32_avx2.c - the tile table of float on avx2. */
#include "base/cpu.h"
#ifdef SA_X86
#include "tile/tile_includes.h"
#include "tile/target_avx2.h"
#define SA_REAL float
#define SA_VBYTES 32
#define SA_SUFFIX f32_avx2
#include "tile/tile_body.h"
#include "tile/target_pop.h"
#endif
