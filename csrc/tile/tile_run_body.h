/* tile_run_body.h - the functions of tile_run.h for one storage type: RUN_DTYPE, RUN_NAME.
 *
 * There is a function for 1, 2 and 4 queries, because GCC lends registers function by function.
 */

static __attribute__((noinline)) void
RUN_NAME(dots4)(real *s, const real *q, const key_rows *k, int n_keys, int dim)
{
    dots_any(s, SA_TILE_KEYS, 4, false, RUN_DTYPE, q, *k, n_keys, dim);
}

static __attribute__((noinline)) void
RUN_NAME(dots2)(real *s, const real *q, const key_rows *k, int n_keys, int dim)
{
    dots_any(s, SA_TILE_KEYS, 2, false, RUN_DTYPE, q, *k, n_keys, dim);
}

static __attribute__((noinline)) void
RUN_NAME(dots1)(real *s, const real *q, const key_rows *k, int n_keys, int dim)
{
    dots_any(s, SA_TILE_KEYS, 1, false, RUN_DTYPE, q, *k, n_keys, dim);
}

static void
RUN_NAME(dots)(real *s, const real *q, int n_rows, const key_rows *k, int n_keys, int dim)
{
    int r = 0;
    for (; r + 4 <= n_rows; r += 4) {
        RUN_NAME(dots4)(s + r * SA_TILE_KEYS, q + r * dim, k, n_keys, dim);
    }
    for (; r + 2 <= n_rows; r += 2) {
        RUN_NAME(dots2)(s + r * SA_TILE_KEYS, q + r * dim, k, n_keys, dim);
    }
    if (r < n_rows) {
        RUN_NAME(dots1)(s + r * SA_TILE_KEYS, q + r * dim, k, n_keys, dim);
    }
}

static __attribute__((noinline)) void
RUN_NAME(axpys4)(real *o, const real *p, const key_rows *v, int n_keys, int dim_v)
{
    axpys_any(o, 4, false, false, RUN_DTYPE, p, SA_TILE_KEYS, NULL, *v, n_keys, dim_v);
}

static __attribute__((noinline)) void
RUN_NAME(axpys2)(real *o, const real *p, const key_rows *v, int n_keys, int dim_v)
{
    axpys_any(o, 2, false, false, RUN_DTYPE, p, SA_TILE_KEYS, NULL, *v, n_keys, dim_v);
}

static __attribute__((noinline)) void
RUN_NAME(axpys1)(real *o, const real *p, const key_rows *v, int n_keys, int dim_v)
{
    axpys_any(o, 1, false, false, RUN_DTYPE, p, SA_TILE_KEYS, NULL, *v, n_keys, dim_v);
}

static __attribute__((noinline)) void
RUN_NAME(axpys_seen)(real *o, const real *p, const real *seen, const key_rows *v, int n_keys,
                     int dim_v)
{
    axpys_any(o, 1, true, false, RUN_DTYPE, p, SA_TILE_KEYS, seen, *v, n_keys, dim_v);
}

static void
RUN_NAME(axpys)(real *o, const real *p, const real *seen, int n_rows, const key_rows *v, int n_keys,
                int dim_v)
{
    int r = 0;
    for (; r < n_rows && seen != NULL; r++) {
        const int at = r * SA_TILE_KEYS;
        RUN_NAME(axpys_seen)(o + r * dim_v, p + at, seen + at, v, n_keys, dim_v);
    }
    for (; r + 4 <= n_rows; r += 4) {
        RUN_NAME(axpys4)(o + r * dim_v, p + r * SA_TILE_KEYS, v, n_keys, dim_v);
    }
    for (; r + 2 <= n_rows; r += 2) {
        RUN_NAME(axpys2)(o + r * dim_v, p + r * SA_TILE_KEYS, v, n_keys, dim_v);
    }
    if (r < n_rows) {
        RUN_NAME(axpys1)(o + r * dim_v, p + r * SA_TILE_KEYS, v, n_keys, dim_v);
    }
}

static __attribute__((noinline)) void
RUN_NAME(attend1)(const sa_queries *a, const sa_run *k, const sa_run *v, int64_t n_keys, int step,
                  const sa_run *next)
{
    attend_steps(1, RUN_DTYPE, a, k, v, n_keys, step, next);
}

static __attribute__((noinline)) void
RUN_NAME(attend2)(const sa_queries *a, const sa_run *k, const sa_run *v, int64_t n_keys, int step,
                  const sa_run *next)
{
    attend_steps(2, RUN_DTYPE, a, k, v, n_keys, step, next);
}

static __attribute__((noinline)) void
RUN_NAME(attend4)(const sa_queries *a, const sa_run *k, const sa_run *v, int64_t n_keys, int step,
                  const sa_run *next)
{
    attend_steps(4, RUN_DTYPE, a, k, v, n_keys, step, next);
}

/* False where there is no such function. */
static bool
RUN_NAME(attend)(const sa_queries *a, const sa_run *k, const sa_run *v, int64_t n_keys, int step,
                 const sa_run *next)
{
    switch (a->n_rows) {
    case 1:
        RUN_NAME(attend1)(a, k, v, n_keys, step, next);
        return true;
    case 2:
        RUN_NAME(attend2)(a, k, v, n_keys, step, next);
        return true;
    case 4:
        RUN_NAME(attend4)(a, k, v, n_keys, step, next);
        return true;
    default:
        return false;
    }
}
