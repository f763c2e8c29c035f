/* tile_received.h - what keys receive of a strip, and the largest scores of neighbouring keys. */

/* sum[j * LANES + i] += sum over the strip's vectors of lane i of key j's weights. */
static void
received(void *sum, const void *s, int w, int wide, int n_keys, const void *lse)
{
    for (int j = 0; j < n_keys; j++) {
        const real *const row = (const real *)s + (int64_t)j * w;
        real *const to = (real *)sum + (int64_t)j * LANES;
        vreal total = vload(to);
        for (int r = 0; r < wide; r += LANES) {
            const vreal x = vload(row + r);
            total += lse ? vexp(x - vload((const real *)lse + r)) : x;
        }
        vstore(to, total);
    }
}

static void
peaks(void *peak, const void *s, int w, int wide, int n_keys)
{
    for (int j0 = 0; j0 < n_keys; j0 += SA_PEAK_KEYS) {
        real *const to = (real *)peak + (int64_t)(j0 / SA_PEAK_KEYS) * w;
        for (int r = 0; r < wide; r += LANES) {
            vreal high = vset(-INFINITY);
            for (int j = j0; j < SA_MIN(j0 + SA_PEAK_KEYS, n_keys); j++) {
                high = vmax(vload((const real *)s + (int64_t)j * w + r), high);
            }
            vstore(to + r, high);
        }
    }
}
