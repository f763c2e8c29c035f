/* chunks.h - how operators over rows become tasks: by shape alone, and big enough to be worth a
 * dispatch. */
#ifndef SA_CHUNKS_H
#define SA_CHUNKS_H

#include "base/threads.h"
#include "base/view.h"

#define SA_CHUNK 16384 /* elements of a task, about 10 microseconds of memory traffic */

/* Rows per task when a row has `width` elements. */
static inline int64_t
sa_chunk_rows(int64_t width)
{
    return SA_MAX(1, SA_CHUNK / SA_MAX(1, width));
}

/* Runs fn over `rows` rows, `step` at a time: task t has rows [t step, min((t + 1) step, rows)). */
static inline sa_status
sa_chunk_run(sa_ctx *ctx, int64_t rows, int64_t step, sa_task_fn fn, void *arg)
{
    return rows <= 0 ? SA_OK : sa_parallel(ctx, (rows + step - 1) / step, fn, arg);
}

/* Element `index` of an array of such elements. */
static inline void *
sa_at(const void *array, int64_t index, size_t size)
{
    return (char *)array + index * (int64_t)size;
}

#endif
