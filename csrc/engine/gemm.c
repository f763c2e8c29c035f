/* gemm.c - products cut into blocks of c by shape; a block is one task with a fixed order of sums.
 *
 * Blocks go to OpenBLAS, one call each, or to the tiles, as all with half precision in b do. The
 * tile path packs b, widened and turned as need be, into panels as wide as a register tile, and
 * leaves a where it lies. It sums every element of c in the same order, DEPTH terms at a time, so
 * an element's bits depend on its row of a and its column of b and on nothing else: not on m, n,
 * blocks or threads. With OpenBLAS they also depend on m and on the row's place: its kernels for
 * edges and for few rows sum in other orders.
 */
#include <limits.h>
#include <string.h>

#include "base/threads.h"
#include "engine/blas.h"
#include "engine/gemm.h"
#include "tile/rows.h"
#include "tile/tile.h"

enum {
    DEPTH = 256,     /* terms summed before they are added to c: a panel of that depth fits L1 */
    COLUMNS = 192,   /* of a block: a multiple of every panel width; packed, they fit L2      */
    ROWS = 512,      /* of a block at most: what packing b is spread over                     */
    ROWS_NEAR = 192, /* rows of a that stay near while the panels pass                        */
    ROWS_READ = 16,  /* rows of b that are packed side by side                                */
    TASKS_WANTED = 8,
    THIN_STEP = 64,        /* columns of a thin task come in such steps             */
    THIN_WANTED = 1 << 14, /* numbers of b that are worth a dispatch to a thin task */
};
#define FLOPS_WANTED 2e6 /* a task of less is not cut further: about ten dispatches */

typedef struct {
    const sa_gemm_args *g;
    const sa_blas *blas; /* NULL: tiles */
    const sa_tile *tile;
    int64_t rows, columns; /* of a block   */
    int64_t row_blocks, column_blocks;
    size_t size; /* of an element of a, c and bias */
} gemm_job;

typedef struct {
    int64_t i0, i1, j0, j1; /* rows and columns of c */
} block;

/* b is of half precision: a task holds its part in the real type. */
static bool
is_widened(const sa_gemm_args *g)
{
    return g->b_dtype != g->dtype;
}

/* So few rows take longer to pack b for than to multiply. (The functions of double do not widen.)
 */
static bool
is_thin(const sa_gemm_args *g)
{
    return g->m <= SA_THIN && (g->dtype == SA_F32 || !is_widened(g));
}

static const void *
a_at(const gemm_job *job, int64_t i, int64_t t)
{
    return (const char *)job->g->a + (i * job->g->lda + t) * (int64_t)job->size;
}

/* Row t, column j of b as the [k, n] matrix that it is, however it is stored. */
static const void *
b_at(const gemm_job *job, int64_t t, int64_t j)
{
    const sa_gemm_args *const g = job->g;
    const int64_t index = g->b_transposed ? j * g->ldb + t : t * g->ldb + j;
    return (const char *)g->b + index * (int64_t)sa_dtype_size(g->b_dtype);
}

static void *
c_at(const gemm_job *job, int64_t i, int64_t j)
{
    return (char *)job->g->c + (i * job->g->ldc + j) * (int64_t)job->size;
}

/* c = bias, or 0: what the sums are added to. */
static void
start_block(const gemm_job *job, block c)
{
    const size_t bytes = (size_t)(c.j1 - c.j0) * job->size;
    for (int64_t i = c.i0; i < c.i1; i++) {
        if (job->g->bias != NULL) {
            memcpy(c_at(job, i, c.j0), (const char *)job->g->bias + (size_t)c.j0 * job->size,
                   bytes);
        } else {
            memset(c_at(job, i, c.j0), 0, bytes);
        }
    }
}

/* panels[p][t][w] = b[t0 + t][j0 + p w ..] where b's rows lie as they are summed: a few rows at a
 * time, so that memory is read along them. */
static void
pack_rows(const gemm_job *job, char *panels, int64_t t0, int depth, int64_t j0, int64_t j1)
{
    const sa_gemm_args *const g = job->g;
    const int w = job->tile->strip_max;
    const size_t row_bytes = (size_t)w * job->size;
    for (int t = 0; t < depth; t += ROWS_READ) {
        const int rows = SA_MIN(depth - t, ROWS_READ);
        char *to = panels + (size_t)t * row_bytes;
        for (int64_t j = j0; j < j1; j += w, to += (size_t)depth * row_bytes) {
            const int width = (int)SA_MIN(j1 - j, w);
            if (width < w) {
                memset(to, 0, (size_t)rows * row_bytes);
            }
            job->tile->load_rows(to, w, b_at(job, t0 + t, j), g->b_dtype, g->ldb, rows, width, 1.0);
        }
    }
}

/* The same where b is stored as [n, k]. wide: room for [w][DEPTH] reals, rows of half precision
 * widened. */
static void
pack_turned(const gemm_job *job, char *panels, char *wide, int64_t t0, int depth, int64_t j0,
            int64_t j1)
{
    const sa_gemm_args *const g = job->g;
    const int w = job->tile->strip_max;
    const void *row[SA_STRIP_MAX];
    for (int64_t j = j0; j < j1; j += w, panels += (size_t)depth * (size_t)w * job->size) {
        const int width = (int)SA_MIN(j1 - j, w);
        if (is_widened(g)) {
            job->tile->load_rows(wide, DEPTH, b_at(job, t0, j), g->b_dtype, g->ldb, width, depth,
                                 1.0);
        }
        for (int r = 0; r < width; r++) {
            row[r] = is_widened(g) ? wide + (size_t)r * DEPTH * job->size : b_at(job, t0, j + r);
        }
        job->tile->load_cols(panels, w, row, g->dtype, width, depth, 1.0);
    }
}

/* c += a panel where the panel is wider than c: the product goes to `whole` [rows][w] first. */
static void
add_edge(const gemm_job *job, void *whole, const void *panel, block c, int64_t t0, int depth)
{
    const int w = job->tile->strip_max;
    const int64_t rows = c.i1 - c.i0, width = c.j1 - c.j0;
    job->tile->product(whole, w, a_at(job, c.i0, t0), job->g->lda, panel, w, (int)rows, w, depth,
                       false);
    for (int64_t i = 0; i < rows; i++) {
        void *const to = c_at(job, c.i0 + i, c.j0);
        for (int64_t j = 0; j < width; j++) {
            if (job->g->dtype == SA_F64) {
                ((double *)to)[j] += ((const double *)whole)[i * w + j];
            } else {
                ((float *)to)[j] += ((const float *)whole)[i * w + j];
            }
        }
    }
}

/* Scratch of a tile task, in elements: packed block, widened rows, edge. */
static size_t
tile_scratch(const sa_tile *tile)
{
    return (size_t)COLUMNS * DEPTH + (size_t)tile->strip_max * (DEPTH + ROWS_NEAR);
}

/* A few rows: packing b would take longer than the product. Same bits. Where b is turned, whole
 * rows of it are read, a few side by side. */
static sa_status
thin_block(const gemm_job *job, block c)
{
    const sa_gemm_args *const g = job->g;
    const sa_rows *const rows = sa_rows_for(g->dtype == SA_F64);
    const int64_t columns = g->b_transposed ? ROWS_READ : c.j1 - c.j0;
    sa_thin part = {.lda = g->lda, .ldb = g->ldb, .ldy = g->ldc, .m = (int)g->m};
    start_block(job, c);
    for (int64_t j = c.j0; j < c.j1; j += columns) {
        part.n = SA_MIN(c.j1 - j, columns);
        part.y = c_at(job, 0, j);
        for (int64_t t0 = 0; t0 < g->k; t0 += DEPTH) {
            part.k = SA_MIN(g->k - t0, DEPTH);
            part.a = a_at(job, 0, t0);
            part.b = b_at(job, t0, j);
            (g->b_transposed ? rows->times_turned : rows->times)(&part, g->b_dtype);
        }
    }
    return SA_OK;
}

static sa_status
tile_block(sa_ctx *ctx, const gemm_job *job, block c, sa_arena *scratch)
{
    const sa_gemm_args *const g = job->g;
    const int w = job->tile->strip_max;
    char *const panels = sa_arena_take_array(scratch, tile_scratch(job->tile), job->size);
    char *const wide = panels + (size_t)COLUMNS * DEPTH * job->size;
    char *const edge = wide + (size_t)w * DEPTH * job->size;
    start_block(job, c);
    for (int64_t t0 = 0; t0 < g->k && !sa_stopped(ctx); t0 += DEPTH) {
        const int depth = (int)SA_MIN(g->k - t0, DEPTH);
        const size_t panel_bytes = (size_t)w * (size_t)depth * job->size;
        if (g->b_transposed) {
            pack_turned(job, panels, wide, t0, depth, c.j0, c.j1);
        } else {
            pack_rows(job, panels, t0, depth, c.j0, c.j1);
        }
        for (int64_t i = c.i0; i < c.i1; i += ROWS_NEAR) {
            const int64_t end = SA_MIN(i + ROWS_NEAR, c.i1);
            const char *panel = panels;
            for (int64_t j = c.j0; j < c.j1; j += w, panel += panel_bytes) {
                if (j + w > c.j1) {
                    add_edge(job, edge, panel, (block){i, end, j, c.j1}, t0, depth);
                } else {
                    job->tile->product(c_at(job, i, j), g->ldc, a_at(job, i, t0), g->lda, panel, w,
                                       (int)(end - i), w, depth, true);
                }
            }
        }
    }
    return SA_OK;
}

static sa_status
blas_block(const gemm_job *job, block c)
{
    const sa_gemm_args *const g = job->g;
    const int m = (int)(c.i1 - c.i0), n = (int)(c.j1 - c.j0), k = (int)g->k;
    const int turned = g->b_transposed ? SA_CBLAS_TRANSPOSED : SA_CBLAS_AS_IS;
    const bool add = g->bias != NULL;
    if (add) {
        start_block(job, c);
    }
    void *const to = c_at(job, c.i0, c.j0);
    const void *const a = a_at(job, c.i0, 0), *const b = b_at(job, 0, c.j0);
    const int lda = (int)g->lda, ldb = (int)g->ldb, ldc = (int)g->ldc;
    if (g->dtype == SA_F64) {
        job->blas->dgemm(SA_CBLAS_ROWS, SA_CBLAS_AS_IS, turned, m, n, k, 1.0, a, lda, b, ldb,
                         add ? 1.0 : 0.0, to, ldc);
    } else {
        job->blas->sgemm(SA_CBLAS_ROWS, SA_CBLAS_AS_IS, turned, m, n, k, 1.0f, a, lda, b, ldb,
                         add ? 1.0f : 0.0f, to, ldc);
    }
    return SA_OK;
}

static sa_status
run_block(sa_ctx *ctx, void *arg, int64_t task, int worker)
{
    const gemm_job *const job = arg;
    const sa_gemm_args *const g = job->g;
    sa_arena *const scratch = sa_scratch(ctx, worker);
    const int64_t i0 = task % job->row_blocks * job->rows;
    const int64_t j0 = task / job->row_blocks * job->columns;
    const block c = {i0, SA_MIN(i0 + job->rows, g->m), j0, SA_MIN(j0 + job->columns, g->n)};
    sa_arena_reset(scratch);
    if (job->blas != NULL) {
        return blas_block(job, c);
    }
    return is_thin(g) ? thin_block(job, c) : tile_block(ctx, job, c, scratch);
}

/* Thin: tasks of about equal width, few where b is small. */
static void
cut_thin(gemm_job *job)
{
    const sa_gemm_args *const g = job->g;
    const int64_t even = (g->n + TASKS_WANTED - 1) / TASKS_WANTED;
    const int64_t worth = (int64_t)THIN_WANTED / SA_MAX(1, g->k);
    const int64_t columns = (SA_MAX(even, worth) + THIN_STEP - 1) / THIN_STEP * THIN_STEP;
    job->rows = g->m;
    job->columns = SA_MIN(columns, SA_THIN_COLUMNS);
    job->row_blocks = 1;
    job->column_blocks = (g->n + job->columns - 1) / job->columns;
}

/* Blocks by shape alone: narrower first, which packs no column of b twice, then shorter ones. */
static void
cut(gemm_job *job)
{
    const sa_gemm_args *const g = job->g;
    const int64_t narrowest = COLUMNS / 2, shortest = 48;
    job->rows = ROWS;
    job->columns = job->blas == NULL ? COLUMNS : 2 * COLUMNS;
    for (;;) {
        job->row_blocks = (g->m + job->rows - 1) / job->rows;
        job->column_blocks = (g->n + job->columns - 1) / job->columns;
        const double flops = 2.0 * (double)SA_MIN(job->rows, g->m) *
                             (double)SA_MIN(job->columns, g->n) * (double)g->k;
        if (job->row_blocks * job->column_blocks >= TASKS_WANTED || flops < FLOPS_WANTED) {
            return;
        }
        if (job->columns > narrowest) {
            job->columns /= 2;
        } else if (job->rows > shortest) {
            job->rows = (SA_MIN(job->rows, g->m) / 2 + 23) / 24 * 24; /* 24: every register tile */
        } else {
            return;
        }
    }
}

void
sa_gemm_prepare(void)
{
    sa_blas_get();
}

/* One row has no stride to speak of: any number may stand there, and BLAS wants a true one. */
static sa_gemm_args
with_strides(const sa_gemm_args *args)
{
    sa_gemm_args g = *args;
    if (g.m == 1) {
        g.lda = g.k;
        g.ldc = g.n;
    }
    if ((g.b_transposed ? g.n : g.k) == 1) {
        g.ldb = g.b_transposed ? g.k : g.n;
    }
    return g;
}

/* OpenBLAS counts in int and takes rows that neither overlap nor run backwards. A few rows it
 * multiplies at the speed of its packing; the tiles read b two to four times as fast. Half
 * precision would have to be widened into memory that it packs once more; the tiles widen as they
 * pack. */
static bool
blas_takes(const sa_gemm_args *g)
{
    const int64_t width = g->b_transposed ? g->k : g->n;
    return !is_thin(g) && !is_widened(g) && g->k > 0 && g->lda >= g->k && g->ldb >= width &&
           g->ldc >= g->n && SA_MAX(SA_MAX(g->lda, g->ldb), g->ldc) <= INT_MAX;
}

sa_status
sa_gemm(sa_ctx *ctx, const sa_gemm_args *args)
{
    if (args->m <= 0 || args->n <= 0) {
        return SA_OK;
    }
    const sa_gemm_args g = with_strides(args);
    gemm_job job = {.g = &g, .size = sa_dtype_size(g.dtype)};
    job.tile = sa_tile_for(g.dtype == SA_F64);
    job.blas = blas_takes(&g) ? sa_blas_get() : NULL;
    (is_thin(&g) ? cut_thin : cut)(&job);
    const sa_status status =
        sa_scratch_reserve_array(ctx, job.blas != NULL ? 0 : tile_scratch(job.tile), job.size);
    if (status != SA_OK) {
        return status;
    }
    return sa_parallel(ctx, job.row_blocks * job.column_blocks, run_block, &job);
}
