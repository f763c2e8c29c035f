/* tile_f32_base.c - the tile table of float on base. */
#include "tile/tile_includes.h"
#include "tile/target_base.h"
#define SA_REAL float
#define SA_VBYTES 16
#define SA_SUFFIX f32_base
#include "tile/tile_body.h"
#include "tile/target_pop.h"
