/* tile_row.h - the row path: one query row at a time, straight from K and V (decode, token
 * selections). */

/* Keys that share the loads of q, and whose sums over the lanes are taken together. */
#define DOT_KEYS (LANES > 8 ? LANES : 8)

static void
dots(void *s, const void *q, const void *const *k_row, int n_keys, int dim)
{
    const real *const query = q;
    real *const score = s;
    const int whole = dim / LANES * LANES;
    int j = 0;
    for (; j + DOT_KEYS <= n_keys; j += DOT_KEYS) {
        vreal acc[DOT_KEYS];
#pragma GCC unroll 16
        for (int i = 0; i < DOT_KEYS; i++) {
            acc[i] = vset(0);
        }
        for (int c = 0; c < whole; c += LANES) {
            const vreal x = vload(query + c);
#pragma GCC unroll 16
            for (int i = 0; i < DOT_KEYS; i++) {
                acc[i] += x * vload((const real *)k_row[j + i] + c);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < DOT_KEYS; i += LANES) {
            vstore(score + j + i, vsums(acc + i));
        }
    }
    for (; j < n_keys; j++) {
        vreal acc = vset(0);
        for (int c = 0; c < whole; c += LANES) {
            acc += vload(query + c) * vload((const real *)k_row[j] + c);
        }
        score[j] = vsum(acc);
    }
    if (whole < dim) {
        for (j = 0; j < n_keys; j++) {
            const real *const key = k_row[j];
            for (int c = whole; c < dim; c++) {
                score[j] += query[c] * key[c];
            }
        }
    }
}

/* As fold, for one row: scalar (m, l), o[dim_v]. */
static void
fold_row(void *s, int n_keys, void *m, void *l, void *o, int dim_v)
{
    real *const score = s, *const top = m, *const sum = l, *const out = o;
    real high = -INFINITY;
    for (int j = 0; j < n_keys; j++) {
        high = score[j] > high ? score[j] : high;
    }
    if (high > *top + (real)SA_STALE || (*top == -INFINITY && high > -INFINITY)) {
        const real factor = *top == -INFINITY ? 0 : (real)exp((double)(*top - high));
        *sum *= factor;
        for (int c = 0; c < dim_v; c++) {
            out[c] *= factor;
        }
        *top = high;
    }
    const vreal base = vset(*top == -INFINITY ? 0 : *top);
    vreal total = vset(0);
    int j = 0;
    for (; j + LANES <= n_keys; j += LANES) {
        const vreal e = vexp(vload(score + j) - base);
        total += e;
        vstore(score + j, e);
    }
    if (j < n_keys) {
        real rest[LANES];
        vstore(rest, vset(-INFINITY));
        memcpy(rest, score + j, (size_t)(n_keys - j) * sizeof(real));
        const vreal e = vexp(vload(rest) - base);
        total += e;
        vstore(rest, e);
        memcpy(score + j, rest, (size_t)(n_keys - j) * sizeof(real));
    }
    *sum += vsum(total);
}

/* Channels c .. c + vecs LANES of all keys, for compile-time vecs and select. */
SA_INLINE void
axpys_tile(real *o, const int vecs, const bool select, const real *p, const real *seen,
           const void *const *v_row, int n_keys, int c)
{
    vreal acc[8];
#pragma GCC unroll 8
    for (int i = 0; i < vecs; i++) {
        acc[i] = vset(0);
    }
    for (int j = 0; j < n_keys; j++) {
        if (select && seen[j] == -INFINITY) {
            continue;
        }
        const vreal weight = vset(p[j]);
        const real *const row = (const real *)v_row[j] + c;
#pragma GCC unroll 8
        for (int i = 0; i < vecs; i++) {
            acc[i] += weight * vload(row + i * LANES);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < vecs; i++) {
        vstore(o + c + i * LANES, vload(o + c + i * LANES) + acc[i]);
    }
}

SA_INLINE void
axpys_any(real *o, const bool select, const real *p, const real *seen, const void *const *v_row,
          int n_keys, int dim_v)
{
    int c = 0;
    for (; c + 8 * LANES <= dim_v; c += 8 * LANES) { /* 8 sums in flight hide the FMA's latency */
        axpys_tile(o, 8, select, p, seen, v_row, n_keys, c);
    }
    for (; c + 4 * LANES <= dim_v; c += 4 * LANES) {
        axpys_tile(o, 4, select, p, seen, v_row, n_keys, c);
    }
    for (; c + 2 * LANES <= dim_v; c += 2 * LANES) {
        axpys_tile(o, 2, select, p, seen, v_row, n_keys, c);
    }
    for (; c + LANES <= dim_v; c += LANES) {
        axpys_tile(o, 1, select, p, seen, v_row, n_keys, c);
    }
    real sum[LANES] = {0};
    for (int j = 0; c < dim_v && j < n_keys; j++) {
        const real *const row = (const real *)v_row[j] + c;
        for (int i = 0; i < dim_v - c && !(select && seen[j] == -INFINITY); i++) {
            sum[i] += p[j] * row[i];
        }
    }
    for (int i = 0; i < dim_v - c; i++) {
        o[c + i] += sum[i];
    }
}

static void
axpys(void *o, const void *p, const void *seen, const void *const *v_row, int n_keys, int dim_v)
{
    if (seen != NULL) {
        axpys_any(o, true, p, seen, v_row, n_keys, dim_v);
    } else {
        axpys_any(o, false, p, NULL, v_row, n_keys, dim_v);
    }
}

/* [algorithms 0.8] in unnormalised form: both sides rescaled to the larger maximum. */
static void
join_row(void *m, void *l, void *o, const void *m2, const void *l2, const void *o2, int dim_v)
{
    real *const top = m, *const sum = l, *const out = o;
    const real other = *(const real *)m2, more = *(const real *)l2;
    const real high = *top > other ? *top : other;
    const real a = *top == -INFINITY ? *sum : (real)exp((double)(*top - high));
    const real b = other == -INFINITY ? more : (real)exp((double)(other - high));
    /* A side that saw nothing has sum 0, or NaN when what it saw was NaN: its factor is then that
     * sum. */
    for (int c = 0; c < dim_v; c++) {
        out[c] = out[c] * a + ((const real *)o2)[c] * b;
    }
    *sum = *sum * a + more * b;
    *top = high;
}

static void
finish(void *factor, void *lse, const void *m, const void *l, int n)
{
    for (int r = 0; r < n; r++) {
        const real sum = ((const real *)l)[r], top = ((const real *)m)[r];
        ((real *)factor)[r] = sum == 0 ? 0 : 1 / sum;
        if (lse != NULL) {
            ((real *)lse)[r] = sum == 0 ? -INFINITY : top + (real)log((double)sum);
        }
    }
}
