/* tile_row.h - the row path: one query row at a time, straight from K and V (decode, token
 * selections). */

#define REAL_DTYPE (SA_IS_F64 ? SA_F64 : SA_F32)

/* Where rows of keys or values lie: at listed addresses, or `step` bytes apart. In the second case
 * memory is asked, row by row and line by line as these are read, for others: `ahead`. */
typedef struct {
    const void *const *list;
    const char *first, *ahead;
    int64_t step, ahead_step;
} key_rows;

/* sa_dtype_size where the compiler knows the type. */
SA_INLINE int
number_bytes(const sa_dtype dtype)
{
    return dtype == SA_F64 ? 8 : dtype == SA_F32 ? 4 : 2;
}

/* Channel c of row j. */
SA_INLINE const char *
key_row(key_rows k, const bool listed, const sa_dtype dtype, int j, int c)
{
    const char *const row = listed ? k.list[j] : k.first + j * k.step;
    return row + c * (int64_t)number_bytes(dtype);
}

/* The same address, as one number: else GCC keeps an address for each of many rows at once. */
SA_INLINE const char *
one_address(const char *row)
{
    __asm__("" : "+r"(row));
    return row;
}

/* Dot products whose sums over the lanes are taken together, and vectors of a key in registers. */
#define DOTS (LANES > 8 ? LANES : 8)
#define DOT_VECS 4

/* LANES numbers, `at` of them past row; ahead is asked for the line that such a row has there. */
SA_INLINE vreal
row_vector(const char *row, const bool ask, const char *ahead, const sa_dtype dtype, const int at)
{
    if (ask && at * number_bytes(dtype) % 64 == 0) {
        __builtin_prefetch(ahead + at * number_bytes(dtype), 0, 3);
    }
    return load_vector(row, dtype, at);
}

/* Adds channels c .. c + vecs LANES of keys j .. j + keys, for compile-time rows, keys, vecs. A key
 * is read once for all rows, and keys in order: memory answers that fastest. */
SA_INLINE void
dots_vecs(vreal *acc, const int rows, const int keys, const int vecs, const bool listed,
          const sa_dtype dtype, const real *q, key_rows k, int j, int dim, int c)
{
    const int64_t at = c * (int64_t)number_bytes(dtype);
    const char *next = listed ? NULL : k.first + j * k.step + at;
    const char *ahead = listed ? NULL : k.ahead + j * k.ahead_step + at;
#pragma GCC unroll 16
    for (int i = 0; i < keys; i++) {
        const char *const row = one_address(listed ? (const char *)k.list[j + i] + at : next);
        vreal x[DOT_VECS];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            x[v] = row_vector(row, !listed, ahead, dtype, v * LANES);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) {
                acc[r * keys + i] += vload(q + r * dim + c + v * LANES) * x[v];
            }
        }
        if (!listed) {
            next = row + k.step;
            ahead = one_address(ahead + k.ahead_step);
        }
    }
}

/* acc[r * keys + i]: the products of query r and key j + i, lane by lane. */
SA_INLINE void
dots_tile(vreal *acc, const int rows, const int keys, const bool listed, const sa_dtype dtype,
          const real *q, key_rows k, int j, int dim)
{
#pragma GCC unroll 16
    for (int i = 0; i < rows * keys; i++) {
        acc[i] = vset(0);
    }
    int c = 0;
    for (; c + DOT_VECS * LANES <= dim; c += DOT_VECS * LANES) {
        dots_vecs(acc, rows, keys, DOT_VECS, listed, dtype, q, k, j, dim, c);
    }
    for (; c + LANES <= dim; c += LANES) {
        dots_vecs(acc, rows, keys, 1, listed, dtype, q, k, j, dim, c);
    }
}

/* s[r * ld + j] = q_r . k_j for compile-time rows, listed, dtype; q_r = q + r dim. */
SA_INLINE void
dots_any(real *s, int ld, const int rows, const bool listed, const sa_dtype dtype, const real *q,
         key_rows k, int n_keys, int dim)
{
    const int keys = DOTS / rows;
    int j = 0;
    for (; j + keys <= n_keys; j += keys) {
        vreal acc[DOTS];
        real sum[DOTS];
        dots_tile(acc, rows, keys, listed, dtype, q, k, j, dim);
#pragma GCC unroll 4
        for (int i = 0; i < DOTS; i += LANES) {
            vstore(rows == 1 ? s + j + i : sum + i, vsums(acc + i));
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows && rows > 1; r++) {
            memcpy(s + r * ld + j, sum + r * keys, (size_t)keys * sizeof(real));
        }
    }
    for (; j < n_keys; j++) {
        vreal acc[4];
        dots_tile(acc, rows, 1, listed, dtype, q, k, j, dim);
        for (int r = 0; r < rows; r++) {
            s[r * ld + j] = vsum(acc[r]);
        }
    }
    for (int r = 0; r < rows; r++) {
        for (j = 0; j < n_keys && dim % LANES > 0; j++) {
            for (int c = dim / LANES * LANES; c < dim; c++) {
                s[r * ld + j] +=
                    q[r * dim + c] * load_one(key_row(k, listed, dtype, j, c), dtype, 0);
            }
        }
    }
}

static void
dots(void *s, const void *q, const void *const *k_row, int n_keys, int dim)
{
    const key_rows k = {.list = k_row};
    dots_any(s, 0, 1, true, REAL_DTYPE, q, k, n_keys, dim);
}

/* The largest of n numbers that is not NaN; -inf when there is none. */
SA_INLINE real
row_max(const real *s, int n)
{
    vreal high = vset(-INFINITY);
    int j = 0;
    for (; j + LANES <= n; j += LANES) {
        high = vmax(vload(s + j), high);
    }
    real top = vmax_lanes(high);
    for (; j < n; j++) {
        top = s[j] > top ? s[j] : top;
    }
    return top;
}

/* As fold, for one row: scalar (m, l), o[dim_v]. */
static void
fold_row(void *s, int n_keys, void *m, void *l, void *o, int dim_v)
{
    real *const score = s, *const top = m, *const sum = l, *const out = o;
    const real high = row_max(score, n_keys);
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

/* Sums of one pass over the values: they, the vectors of a value and a weight share the registers.
 */
#if defined(SA_HAVE_AVX512)
#define AXPYS 16
#else
#define AXPYS 8
#endif

/* Channels c .. c + vecs LANES of all values, for compile-time rows, vecs and select (of one row).
 */
SA_INLINE void
axpys_tile(real *o, const int rows, const int vecs, const bool select, const bool listed,
           const sa_dtype dtype, const real *p, int ld, const real *seen, key_rows v, int n_keys,
           int dim_v, int c)
{
    const int64_t at = c * (int64_t)number_bytes(dtype);
    const char *next = listed ? NULL : v.first + at, *ahead = listed ? NULL : v.ahead + at;
    vreal acc[AXPYS];
#pragma GCC unroll 16
    for (int i = 0; i < rows * vecs; i++) {
        acc[i] = vset(0);
    }
#pragma GCC unroll 4
    for (int j = 0; j < n_keys; j++) {
        const char *const row = one_address(listed ? (const char *)v.list[j] + at : next);
        vreal x[8];
        if (!listed) {
            next = row + v.step;
        }
        if (!(select && seen[j] == -INFINITY)) {
#pragma GCC unroll 8
            for (int i = 0; i < vecs; i++) {
                x[i] = row_vector(row, !listed, ahead, dtype, i * LANES);
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const vreal weight = vset(p[r * ld + j]);
#pragma GCC unroll 8
                for (int i = 0; i < vecs; i++) {
                    acc[r * vecs + i] += weight * x[i];
                }
            }
        }
        if (!listed) {
            ahead = one_address(ahead + v.ahead_step);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 8
        for (int i = 0; i < vecs; i++) {
            real *const to = o + r * dim_v + c + i * LANES;
            vstore(to, vload(to) + acc[r * vecs + i]);
        }
    }
}

/* o_r[c] += sum_j p_r[j] v_j[c] for compile-time rows, select, listed, dtype; o_r = o + r dim_v,
 * p_r = p + r ld. */
SA_INLINE void
axpys_any(real *o, const int rows, const bool select, const bool listed, const sa_dtype dtype,
          const real *p, int ld, const real *seen, key_rows v, int n_keys, int dim_v)
{
    const int most = SA_MIN(AXPYS / rows, 8);
    int c = 0;
    for (; most >= 8 && c + 8 * LANES <= dim_v; c += 8 * LANES) {
        axpys_tile(o, rows, 8, select, listed, dtype, p, ld, seen, v, n_keys, dim_v, c);
    }
    for (; most >= 4 && c + 4 * LANES <= dim_v; c += 4 * LANES) {
        axpys_tile(o, rows, 4, select, listed, dtype, p, ld, seen, v, n_keys, dim_v, c);
    }
    for (; c + 2 * LANES <= dim_v; c += 2 * LANES) {
        axpys_tile(o, rows, 2, select, listed, dtype, p, ld, seen, v, n_keys, dim_v, c);
    }
    for (; c + LANES <= dim_v; c += LANES) {
        axpys_tile(o, rows, 1, select, listed, dtype, p, ld, seen, v, n_keys, dim_v, c);
    }
    for (int r = 0; r < rows && c < dim_v; r++) {
        real sum[LANES] = {0};
        for (int j = 0; j < n_keys; j++) {
            const void *const row = key_row(v, listed, dtype, j, c);
            for (int i = 0; i < dim_v - c && !(select && seen[j] == -INFINITY); i++) {
                sum[i] += p[r * ld + j] * load_one(row, dtype, i);
            }
        }
        for (int i = 0; i < dim_v - c; i++) {
            o[r * dim_v + c + i] += sum[i];
        }
    }
}

static void
axpys(void *o, const void *p, const void *seen, const void *const *v_row, int n_keys, int dim_v)
{
    const key_rows v = {.list = v_row};
    if (seen != NULL) {
        axpys_any(o, 1, true, true, REAL_DTYPE, p, 0, seen, v, n_keys, dim_v);
    } else {
        axpys_any(o, 1, false, true, REAL_DTYPE, p, 0, NULL, v, n_keys, dim_v);
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
