/* sight.c - visible intervals of rows, and scans of boolean rows. */
#include "engine/sight.h"

#include <string.h>

#include "base/threads.h"

enum { TASK_ROWS = 64, STRIDED_KEYS = 8 };

/* First true byte of a contiguous row, eight at a time. */
static int64_t
next_true(const unsigned char *at, int64_t from, int64_t to)
{
    for (; from + 8 <= to; from += 8) {
        uint64_t word;
        memcpy(&word, at + from, sizeof word);
        if (word != 0) {
            break;
        }
    }
    while (from < to && at[from] == 0) {
        from++;
    }
    return from;
}

int64_t
sa_bits_next(sa_bits bits, bool value, int64_t from, int64_t to)
{
    if (from >= to) {
        return to;
    }
    if (bits.at == NULL) {
        return value ? from : to;
    }
    if (bits.step == 0) {
        return (bits.at[0] != 0) == value ? from : to;
    }
    if (bits.step == 1) {
        if (value) {
            return next_true(bits.at, from, to);
        }
        const unsigned char *const zero = memchr(bits.at + from, 0, (size_t)(to - from));
        return zero == NULL ? to : zero - bits.at;
    }
    while (from < to && (bits.at[from * bits.step] != 0) != value) {
        from++;
    }
    return from;
}

sa_row_bits
sa_row_bits_of(const sa_problem *p, bool mask, bool key_mask, int64_t b, int64_t h, int64_t i)
{
    sa_row_bits bits = {0};
    if (mask && p->mask.data != NULL) {
        bits.mask = (sa_bits){sa_view_row(p->mask, b, h, i), p->mask.stride[3]};
    }
    if (key_mask && p->key_mask.data != NULL) {
        bits.keys = (sa_bits){sa_view_row(p->key_mask, b, 0, 0), p->key_mask.stride[3]};
    }
    return bits;
}

int64_t
sa_row_bits_next(sa_row_bits bits, bool value, int64_t from, int64_t to)
{
    if (!value) {
        return sa_bits_next(bits.keys, false, from, sa_bits_next(bits.mask, false, from, to));
    }
    for (;;) {
        const int64_t first = sa_bits_next(bits.mask, true, from, to);
        from = sa_bits_next(bits.keys, true, first, to);
        if (from == first) {
            return from;
        }
    }
}

/* Bytes that are true in both rows, in pieces that a byte can count. */
static int64_t
count_both(const unsigned char *a, const unsigned char *b, int64_t n)
{
    int64_t total = 0;
    for (int64_t j = 0; j < n;) {
        const int64_t end = SA_MIN(j + 248, n);
        unsigned char piece = 0;
        for (; j < end; j++) {
            piece += (unsigned char)((a[j] != 0) & (b[j] != 0));
        }
        total += piece;
    }
    return total;
}

int64_t
sa_row_bits_count(sa_row_bits bits, int64_t from, int64_t to)
{
    const sa_bits a = bits.mask.at ? bits.mask : bits.keys, b = bits.keys.at ? bits.keys : a;
    int64_t total = 0;
    if (from >= to || a.at == NULL) {
        return SA_MAX(to - from, 0);
    }
    if (a.step == 1 && b.step == 1) {
        return count_both(a.at + from, b.at + from, to - from);
    }
    for (int64_t j = from; j < to; j++) {
        total += (a.at[j * a.step] != 0) & (b.at[j * b.step] != 0);
    }
    return total;
}

static bool
differs(const sa_problem *p, sa_view v)
{
    return v.data != NULL && p->batch > 1 && v.stride[0] != 0;
}

/* First and last real key of batch entry b; *holes when padding stands between them. */
static void
key_run(const sa_problem *p, int64_t b, int64_t *lo, int64_t *hi, bool *holes)
{
    const sa_bits keys = sa_row_bits_of(p, false, true, b, 0, 0).keys;
    int64_t end = p->n_k;
    *lo = sa_bits_next(keys, true, 0, end);
    *hi = sa_bits_next(keys, false, *lo, end);
    if (sa_bits_next(keys, true, *hi, end) < end) {
        *holes = true;
        /* *hi bounds the way back: another thread of the caller's may have cleared that last key */
        while (end > *hi && sa_bits_next(keys, true, end - 1, end) == end) {
            end--;
        }
        *hi = end;
    }
}

/* Intervals of all rows by causality and padding. */
static void
fill_rows(const sa_problem *p, sa_sight *sight)
{
    for (int64_t m = 0; m < sight->maps; m++) {
        int64_t first, last;
        bool holes;
        key_run(p, m, &first, &last, &holes);
        for (int64_t i = 0; i < p->n_q; i++) {
            const int64_t end = SA_MIN(last, sa_causal_end(p, i));
            sight->lo[m * p->n_q + i] = first < end ? (int32_t)first : 0;
            sight->hi[m * p->n_q + i] = first < end ? (int32_t)end : 0;
        }
    }
}

/* Narrows rows [begin, end) of a map to their run in the mask; false as soon as a row has a second
 * run. Goes through the keys in pieces for all rows together, so that a transposed mask is read
 * line by line. */
static bool
narrow_rows(const sa_problem *p, int64_t b, int64_t begin, int64_t end, int32_t *lo, int32_t *hi)
{
    const int64_t piece = p->mask.stride[3] == 1 ? SA_MAX(p->n_k, 1) : STRIDED_KEYS;
    int64_t first[TASK_ROWS], last[TASK_ROWS];
    for (int64_t r = 0; r < end - begin; r++) {
        first[r] = last[r] = -1;
    }
    for (int64_t j = 0; j < p->n_k; j += piece) {
        for (int64_t r = 0; r < end - begin; r++) {
            const sa_bits bits = sa_row_bits_of(p, true, false, b, 0, begin + r).mask;
            const int64_t z = SA_MIN(j + piece, hi[begin + r]);
            int64_t a = SA_MAX(j, lo[begin + r]);
            if (a < z && first[r] < 0 && (a = sa_bits_next(bits, true, a, z)) < z) {
                first[r] = a;
            }
            if (a < z && last[r] < 0 && (a = sa_bits_next(bits, false, a, z)) < z) {
                last[r] = a;
            }
            if (sa_bits_next(bits, true, a, z) < z) {
                return false;
            }
        }
    }
    for (int64_t r = 0; r < end - begin; r++) {
        hi[begin + r] = first[r] < 0 ? 0 : last[r] < 0 ? hi[begin + r] : (int32_t)last[r];
        lo[begin + r] = first[r] < 0 ? 0 : (int32_t)first[r];
    }
    return true;
}

typedef struct {
    const sa_problem *p;
    sa_sight *sight;
    atomic_bool *broken; /* some row of the mask has more than one run */
} narrowing;

static sa_status
narrow_task(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const narrowing *const job = arg;
    const sa_problem *const p = job->p;
    const int64_t chunks = (p->n_q + TASK_ROWS - 1) / TASK_ROWS, m = task / chunks;
    const int64_t begin = task % chunks * TASK_ROWS;
    (void)ctx, (void)worker;
    if (!atomic_load_explicit(job->broken, memory_order_relaxed) &&
        !narrow_rows(p, m, begin, SA_MIN(begin + TASK_ROWS, p->n_q), job->sight->lo + m * p->n_q,
                     job->sight->hi + m * p->n_q)) {
        atomic_store_explicit(job->broken, true, memory_order_relaxed);
    }
    return SA_OK;
}

/* Turns the mask into intervals where all heads share it and each row is one run. Which rows a
 * failed attempt has narrowed depends on threads, so it starts afresh then. */
static sa_status
narrow(sa_ctx *ctx, const sa_problem *p, sa_sight *sight)
{
    atomic_bool broken = false;
    narrowing job = {p, sight, &broken};
    sight->mask = p->mask.data != NULL;
    if (!sight->mask || (p->heads > 1 && p->mask.stride[1] != 0)) {
        return SA_OK;
    }
    const sa_status status =
        sa_parallel(ctx, sight->maps * ((p->n_q + TASK_ROWS - 1) / TASK_ROWS), narrow_task, &job);
    sight->mask = broken;
    if (broken) {
        fill_rows(p, sight);
    }
    return status;
}

sa_status
sa_sight_make(sa_ctx *ctx, const sa_problem *p, sa_sight *sight)
{
    sa_problem bare;
    if (p->batch == 0) { /* the masks have no rows to read */
        bare = *p;
        bare.mask.data = bare.key_mask.data = NULL;
        p = &bare;
    }
    const int64_t paddings = p->key_mask.data == NULL ? 0 : differs(p, p->key_mask) ? p->batch : 1;
    int64_t first = 0, last = 0;
    *sight = (sa_sight){.maps = differs(p, p->mask) ? p->batch : 1};
    for (int64_t b = 0; b < paddings; b++) {
        int64_t lo, hi;
        key_run(p, b, &lo, &hi, &sight->key_mask);
        if (b == 0) {
            first = lo;
            last = hi;
        } else if (lo != first || hi != last) {
            sight->maps = p->batch;
        }
    }
    const int64_t rows = sight->maps * p->n_q; /* at most the batch's, which have been checked */
    sight->lo = sa_malloc_array((size_t)rows, sizeof *sight->lo);
    sight->hi = sa_malloc_array((size_t)rows, sizeof *sight->hi);
    if (sight->lo == NULL || sight->hi == NULL) {
        sa_sight_free(sight);
        return sa_fail(ctx, SA_ENOMEM, "no memory for the visible intervals of %lld rows",
                       (long long)rows);
    }
    fill_rows(p, sight);
    const sa_status status = narrow(ctx, p, sight);
    if (status != SA_OK) {
        sa_sight_free(sight);
    }
    return status;
}

void
sa_sight_free(sa_sight *sight)
{
    sa_free(sight->lo);
    sa_free(sight->hi);
    *sight = (sa_sight){0};
}
