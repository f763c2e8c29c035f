/* tile_includes.h - system headers of tile_body.h, read before a target region opens. */
#ifndef SA_TILE_INCLUDES_H
#define SA_TILE_INCLUDES_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "base/half.h"
#include "tile/tile.h"

#endif
