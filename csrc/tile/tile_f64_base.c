/* tile_f64_base.c - the tile table of double on base. */
#include "tile/tile_includes.h"
#include "tile/target_base.h"
#define SA_REAL double
#define SA_REAL_IS_DOUBLE 1
#define SA_VBYTES 16
#define SA_SUFFIX f64_base
#include "tile/tile_body.h"
#include "tile/target_pop.h"
