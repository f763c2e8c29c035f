/* pieces.c - intervals of rows against a tile of keys. */
#include "engine/pieces.h"

void
sa_reaches_start(sa_reaches *reaches, const sa_group *g, int columns)
{
    for (int r = 0; r < columns; r++) {
        const sa_query *const q = &g->s.query[SA_MIN(r, g->n_rows - 1)];
        reaches->see.lo[r] = q->see_lo;
        reaches->see.hi[r] = q->see_hi;
        reaches->band.lo[r] = q->band_lo;
        reaches->band.hi[r] = q->band_hi;
    }
}

sa_tile_sight
sa_tile_look(const sa_reaches *reaches, const sa_key_tile *tile, int first, int wide, int32_t *lo,
             int32_t *hi)
{
    const sa_reach *const reach = tile->kind == SA_TILE_BAND ? &reaches->band : &reaches->see;
    const int32_t *const row_lo = reach->lo + first, *const row_hi = reach->hi + first;
    const int32_t n = tile->n, key = tile->keys[0];
    int32_t a = n, b = 0, most_lo = 0, least_hi = n;
    if (tile->kind == SA_TILE_FULL) {
        return (sa_tile_sight){.a = 0, .b = n, .lo = lo, .hi = hi};
    }
    for (int r = 0; r < wide; r++) {
        const int32_t from = SA_MAX(row_lo[r] - key, 0), to = SA_MIN(row_hi[r] - key, n);
        lo[r] = from < to ? from : n;
        hi[r] = from < to ? to : 0;
        a = SA_MIN(a, lo[r]);
        b = SA_MAX(b, hi[r]);
        most_lo = SA_MAX(most_lo, lo[r]);
        least_hi = SA_MIN(least_hi, hi[r]);
    }
    return (sa_tile_sight){a, b, most_lo > a || least_hi < b, lo, hi};
}

int
sa_pieces_cut(const sa_tile_sight *s, int lanes, int wide, sa_piece *to)
{
    int n = 1, a = s->a, b = s->b, first[SA_STRIP_MAX], end[SA_STRIP_MAX];
    for (int r0 = 0; r0 < wide && s->clipped; r0 += lanes) {
        first[r0] = s->b;
        end[r0] = s->a;
        for (int r = r0; r < r0 + lanes; r++) {
            first[r0] = SA_MIN(first[r0], s->lo[r]);
            end[r0] = SA_MAX(end[r0], s->hi[r]);
        }
        a = SA_MAX(a, first[r0]);
        b = SA_MIN(b, end[r0]);
    }
    to[0] = (sa_piece){0, wide, a, SA_MAX(a, b)};
    b = to[0].b;
    for (int r0 = 0; r0 < wide && s->clipped; r0 += lanes) {
        to[n] = (sa_piece){r0, lanes, first[r0], SA_MIN(a, end[r0])};
        n += to[n].a < to[n].b;
        to[n] = (sa_piece){r0, lanes, SA_MAX(b, first[r0]), end[r0]};
        n += to[n].a < to[n].b;
    }
    return n;
}

const sa_clip *
sa_piece_clip(const sa_tile_sight *s, sa_piece at, sa_clip *clip)
{
    bool clipped = false;
    for (int r = at.r0; r < at.r0 + at.wide && s->clipped; r++) {
        clipped = clipped || s->lo[r] > at.a || s->hi[r] < at.b;
    }
    *clip = (sa_clip){at.a, s->lo + at.r0, s->hi + at.r0};
    return clipped ? clip : NULL;
}
