/* tile_run.h - the row path over rows that lie one after another (decode): a few queries share the
 * loads of a row.
 *
 * Each query has sums of its own, in the order of dots and axpys: its bits do not depend on the
 * queries beside it, nor on whether its keys are listed or converted first.
 */

/* Rows `at` and on of a run; what is asked for when there is no ahead is read anyway. */
SA_INLINE key_rows
rows_from(const sa_run *run, int64_t at, const sa_run *ahead, int64_t ahead_at)
{
    const sa_run *const other = ahead != NULL ? ahead : run;
    return (key_rows){
        .first = (const char *)run->row + at * run->step,
        .step = run->step,
        .ahead = (const char *)other->row + (ahead != NULL ? ahead_at : at) * other->step,
        .ahead_step = other->step,
    };
}

/* run_attend for compile-time rows and one dtype. */
SA_INLINE void
attend_steps(const int rows, const sa_dtype dtype, const sa_queries *a, const sa_run *k,
             const sa_run *v, int64_t n_keys, int step, const sa_run *next)
{
    real *const s = a->s, *const m = a->m, *const l = a->l, *const o = a->o;
    for (int64_t j = 0; j < n_keys; j += step) {
        const int n = (int)SA_MIN(step, n_keys - j);
        const bool last = j + step >= n_keys;
        const key_rows keys = rows_from(k, j, v, j);
        const key_rows values = rows_from(v, j, last ? next : k, last ? 0 : j + step);
        dots_any(s, SA_TILE_KEYS, rows, false, dtype, a->q, keys, n, a->dim);
        for (int r = 0; r < rows; r++) {
            fold_row(s + r * SA_TILE_KEYS, n, m + r, l + r, o + r * a->dim_v, a->dim_v);
        }
        axpys_any(o, rows, false, false, dtype, s, SA_TILE_KEYS, NULL, values, n, a->dim_v);
    }
}

#define RUN_DTYPE REAL_DTYPE
#define RUN_NAME(name) run_##name##_real
#include "tile/tile_run_body.h"
#undef RUN_DTYPE
#undef RUN_NAME
#if !defined(SA_REAL_IS_DOUBLE)
#define RUN_DTYPE SA_F16
#define RUN_NAME(name) run_##name##_f16
#include "tile/tile_run_body.h"
#undef RUN_DTYPE
#undef RUN_NAME
#define RUN_DTYPE SA_BF16
#define RUN_NAME(name) run_##name##_bf16
#include "tile/tile_run_body.h"
#undef RUN_DTYPE
#undef RUN_NAME
#endif

static void
run_dots(void *s, const void *q, int n_rows, const sa_run *k, int n_keys, int dim,
         const sa_run *ahead)
{
    const key_rows rows = rows_from(k, 0, ahead, 0);
#if !defined(SA_REAL_IS_DOUBLE)
    if (k->dtype == SA_F16) {
        run_dots_f16(s, q, n_rows, &rows, n_keys, dim);
        return;
    }
    if (k->dtype == SA_BF16) {
        run_dots_bf16(s, q, n_rows, &rows, n_keys, dim);
        return;
    }
#endif
    run_dots_real(s, q, n_rows, &rows, n_keys, dim);
}

static void
run_axpys(void *o, const void *p, const void *seen, int n_rows, const sa_run *v, int n_keys,
          int dim_v, const sa_run *ahead)
{
    const key_rows rows = rows_from(v, 0, ahead, 0);
#if !defined(SA_REAL_IS_DOUBLE)
    if (v->dtype == SA_F16) {
        run_axpys_f16(o, p, seen, n_rows, &rows, n_keys, dim_v);
        return;
    }
    if (v->dtype == SA_BF16) {
        run_axpys_bf16(o, p, seen, n_rows, &rows, n_keys, dim_v);
        return;
    }
#endif
    run_axpys_real(o, p, seen, n_rows, &rows, n_keys, dim_v);
}

static bool
run_attend(const sa_queries *a, const sa_run *k, const sa_run *v, int64_t n_keys, int step,
           const sa_run *next)
{
    if (k->dtype != v->dtype) {
        return false;
    }
#if !defined(SA_REAL_IS_DOUBLE)
    if (k->dtype == SA_F16) {
        return run_attend_f16(a, k, v, n_keys, step, next);
    }
    if (k->dtype == SA_BF16) {
        return run_attend_bf16(a, k, v, n_keys, step, next);
    }
#endif
    return run_attend_real(a, k, v, n_keys, step, next);
}
