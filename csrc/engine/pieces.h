/* pieces.h - what a strip of query rows sees of a tile of keys, cut so that products compute little
 * that is thrown away. Both passes of attention.
 */
#ifndef SA_PIECES_H
#define SA_PIECES_H

#include "engine/attend_call.h"

/* Keys [lo, hi) of each row of a group. */
typedef struct {
    int32_t lo[SA_STRIP_MAX * SA_GROUP_STRIPS], hi[SA_STRIP_MAX * SA_GROUP_STRIPS];
} sa_reach;

/* What the rows see of spans of either kind that rows may see in part. */
typedef struct {
    sa_reach see, band;
} sa_reaches;

/* Keys [a, b) of a tile that rows of a strip see, and what each row sees of the tile; lo and hi are
 * set where the tile is not a full one. When no row sees a key, a is the tile's end and b is 0. */
typedef struct {
    int a, b;
    bool clipped; /* some row sees less than [a, b) */
    const int32_t *lo, *hi;
} sa_tile_sight;

/* Keys [a, b) of a tile against columns [r0, r0 + wide) of a strip. */
typedef struct {
    int r0, wide, a, b;
} sa_piece;

enum { SA_MOST_PIECES = 1 + SA_STRIP_MAX }; /* two for each vector, of two reals at least */

/* Of the group's rows; columns past its last row, up to `columns`, see what that one sees: nobody
 * reads what they get, and hiding keys from them would take time. */
void sa_reaches_start(sa_reaches *reaches, const sa_group *g, int columns);
/* Of rows [first, first + wide) of the group; lo and hi are room for `wide` numbers each. */
sa_tile_sight sa_tile_look(const sa_reaches *reaches, const sa_key_tile *tile, int first, int wide,
                           int32_t *lo, int32_t *hi);
/* All columns over the keys that every vector of rows reaches, then each vector over what only it
 * reaches. The first piece may be empty, no other one is. Returns how many. */
int sa_pieces_cut(const sa_tile_sight *s, int lanes, int wide, sa_piece *to);
/* NULL, or `clip` set to hide from rows of the piece what they do not see. */
const sa_clip *sa_piece_clip(const sa_tile_sight *s, sa_piece at, sa_clip *clip);

#endif
