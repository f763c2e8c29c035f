/* tile_values.h - o += p v with queries in the lanes: broadcast elements of natural value rows. */

/* Channels c .. c + channels of all keys, for compile-time channels and vecs. */
SA_INLINE void
value_tile(real *o, const int channels, const int vecs, const bool select, const real *p, int w,
           const void *const *v_row, int n_keys, int c)
{
    vreal acc[CHANNELS][VECS];
#pragma GCC unroll 16
    for (int i = 0; i < channels; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            acc[i][v] = vload(o + (int64_t)i * w + v * LANES);
        }
    }
    for (int j = 0; j < n_keys; j++) {
        const real *const row = (const real *)v_row[j] + c;
        vreal weight[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            weight[v] = vload(p + v * LANES);
        }
        p += w;
#pragma GCC unroll 16
        for (int i = 0; i < channels; i++) {
            const vreal value = vset(row[i]);
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) {
                const vreal next = acc[i][v] + weight[v] * value;
                acc[i][v] = select ? vselect(weight[v] == vset(0), acc[i][v], next) : next;
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < channels; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            vstore(o + (int64_t)i * w + v * LANES, acc[i][v]);
        }
    }
}

SA_INLINE void
values_wide(real *o, const int vecs, const bool select, const real *p, int w, const void *const *v_row, int n_keys,
            int dim_v)
{
    int c = 0;
    for (; c + CHANNELS_FOR(vecs) <= dim_v; c += CHANNELS_FOR(vecs)) {
        value_tile(o + (int64_t)c * w, CHANNELS_FOR(vecs), vecs, select, p, w, v_row, n_keys, c);
    }
    for (; c + 4 <= dim_v; c += 4) {
        value_tile(o + (int64_t)c * w, 4, vecs, select, p, w, v_row, n_keys, c);
    }
    for (; c < dim_v; c++) {
        value_tile(o + (int64_t)c * w, 1, vecs, select, p, w, v_row, n_keys, c);
    }
}

SA_INLINE void
values_any(void *o, const bool select, const void *p, int w, int wide, const void *const *v_row, int n_keys, int dim_v)
{
    switch (wide / LANES) {
    case 1:
        values_wide(o, 1, select, p, w, v_row, n_keys, dim_v);
        break;
    case 2:
        values_wide(o, 2, select, p, w, v_row, n_keys, dim_v);
        break;
#if VECS > 2
    default:
        values_wide(o, 3, select, p, w, v_row, n_keys, dim_v);
#endif
    }
}

static void
values(void *o, const void *p, int w, int wide, const void *const *v_row, int n_keys, int dim_v)
{
    values_any(o, false, p, w, wide, v_row, n_keys, dim_v);
}

static void
values_select(void *o, const void *p, int w, int wide, const void *const *v_row, int n_keys, int dim_v)
{
    values_any(o, true, p, w, wide, v_row, n_keys, dim_v);
}

/* x - x is 0 for finite x and NaN otherwise. */
static bool
all_finite(const void *const *v_row, int n_keys, int dim_v)
{
    vint bad = {0};
    for (int j = 0; j < n_keys; j++) {
        const real *const row = v_row[j];
        int c = 0;
        for (; c + LANES <= dim_v; c += LANES) {
            const vreal x = vload(row + c);
            bad |= (x - x) != vset(0);
        }
        for (; c < dim_v; c++) {
            if (!isfinite(row[c])) {
                return false;
            }
        }
    }
    return !vany(bad);
}
