/* tile_values.h - o += p v with queries in the lanes: broadcast elements of natural value rows.
 *
 * A tile is summed by itself and then added to o: over n keys the rounding is that of n / 64 + 64
 * additions, not of n.
 */

/* Channels c .. c + channels of all keys, for compile-time channels, vecs and select; with select,
 * a value counts as 0 where `seen` is -inf. */
SA_INLINE void
value_tile(real *o, const int channels, const int vecs, const bool select, const real *p,
           const real *seen, int w, const void *const *v_row, int n_keys, int c)
{
    const vreal unseen = vset(-INFINITY);
    vreal acc[CHANNELS][VECS];
#pragma GCC unroll 16
    for (int i = 0; i < channels; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            acc[i][v] = vset(0);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < n_keys; j++) {
        const real *const row = (const real *)v_row[j] + c;
        const int64_t at = (int64_t)j * w;
        vreal weight[VECS];
        vint hidden[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            weight[v] = vload(p + at + v * LANES);
            hidden[v] = select ? vload(seen + at + v * LANES) == unseen : (vint){0};
        }
#pragma GCC unroll 16
        for (int i = 0; i < channels; i++) {
            const vreal value = vset(row[i]);
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) {
                /* The weight is 0 where hidden. Choosing between sums would cost Clang the FMA. */
                acc[i][v] += weight[v] * (select ? vselect(hidden[v], vset(0), value) : value);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < channels; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            real *const to = o + (int64_t)i * w + v * LANES;
            vstore(to, vload(to) + acc[i][v]);
        }
    }
}

SA_INLINE void
values_wide(real *o, const int vecs, const bool select, const real *p, const real *seen, int w,
            const void *const *v_row, int n_keys, int dim_v)
{
    int c = 0;
    for (; c + CHANNELS_FOR(vecs) <= dim_v; c += CHANNELS_FOR(vecs)) {
        value_tile(o + (int64_t)c * w, CHANNELS_FOR(vecs), vecs, select, p, seen, w, v_row, n_keys,
                   c);
    }
    for (; c + 4 <= dim_v; c += 4) {
        value_tile(o + (int64_t)c * w, 4, vecs, select, p, seen, w, v_row, n_keys, c);
    }
    for (; c < dim_v; c++) {
        value_tile(o + (int64_t)c * w, 1, vecs, select, p, seen, w, v_row, n_keys, c);
    }
}

SA_INLINE void
values_any(void *o, const bool select, const void *p, const void *seen, int w, int wide,
           const void *const *v_row, int n_keys, int dim_v)
{
    switch (wide / LANES) {
    case 1:
        values_wide(o, 1, select, p, seen, w, v_row, n_keys, dim_v);
        break;
    case 2:
        values_wide(o, 2, select, p, seen, w, v_row, n_keys, dim_v);
        break;
#if VECS > 2
    default:
        values_wide(o, 3, select, p, seen, w, v_row, n_keys, dim_v);
#endif
    }
}

static void
values(void *o, const void *p, int w, int wide, const void *const *v_row, int n_keys, int dim_v)
{
    values_any(o, false, p, NULL, w, wide, v_row, n_keys, dim_v);
}

static void
values_select(void *o, const void *p, const void *seen, int w, int wide, const void *const *v_row,
              int n_keys, int dim_v)
{
    values_any(o, true, p, seen, w, wide, v_row, n_keys, dim_v);
}

/* 0 x is 0 for finite x and NaN otherwise, and a sum that met NaN stays NaN. */
static bool
all_finite(const void *const *v_row, int n_keys, int dim_v)
{
    vreal sum[4] = {vset(0), vset(0), vset(0), vset(0)}; /* enough to hide the latency of an FMA */
    for (int j = 0; j < n_keys; j++) {
        const real *const row = v_row[j];
        int c = 0;
        for (; c + 4 * LANES <= dim_v; c += 4 * LANES) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                sum[i] += vload(row + c + i * LANES) * vset(0);
            }
        }
        for (; c + LANES <= dim_v; c += LANES) {
            sum[0] += vload(row + c) * vset(0);
        }
        for (; c < dim_v; c++) {
            if (!isfinite(row[c])) {
                return false;
            }
        }
    }
    sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    return !vany(sum[0] != vset(0));
}
