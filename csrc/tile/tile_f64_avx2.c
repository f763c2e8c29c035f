/* tile_f64_avx2.c - the tile table of double on avx2. */
#include "base/cpu.h"
#ifdef SA_X86
#include "tile/tile_includes.h"
#include "tile/target_avx2.h"
#define SA_REAL double
#define SA_REAL_IS_DOUBLE 1
#define SA_VBYTES 32
#define SA_SUFFIX f64_avx2
#include "tile/tile_body.h"
#include "tile/target_pop.h"
#endif
