/* blockmask.c - whole blocks of keys, as a layout says. [Dao et al. 2022, arXiv:2205.14135,
 * block-sparse FlashAttention]
 *
 * Row i sees key j where layout[h, i / block, j / block], of the keys that causality and masks
 * allow.
 */
#include "variants/variant.h"

typedef struct {
    int64_t block;  /* rows and keys of a block, counted from the first row and the first key */
    sa_view layout; /* bool (1, heads or 1, query blocks, key blocks)                         */
} sa_blockmask_opts;

static const sa_field fields[] = {
    SA_FIELD(sa_blockmask_opts, block, SA_FIELD_I64, 1, SA_MAX_KEYS),
    SA_FIELD(sa_blockmask_opts, layout, SA_FIELD_ARRAY, 0, 0),
    SA_FIELD_END,
};

static sa_status
check(sa_ctx *ctx, const sa_problem *p, const void *opts)
{
    const sa_blockmask_opts *const o = opts;
    const int64_t *const size = o->layout.size;
    const int64_t rows = (p->n_q + o->block - 1) / o->block,
                  cols = (p->n_k + o->block - 1) / o->block;
    if (o->layout.data == NULL || o->layout.dtype != SA_BOOL) {
        return sa_fail(ctx, SA_ETYPE, "blockmask needs params={\"layout\": bool array}");
    }
    if (size[0] == 1 && (size[1] == 1 || size[1] == p->heads) && size[2] == rows &&
        size[3] == cols) {
        return SA_OK;
    }
    return sa_fail(ctx, SA_EINVAL,
                   "layout must have shape (%lld or 1, %lld, %lld) for %lld x %lld positions in "
                   "blocks of %lld, got (%lld, "
                   "%lld, %lld)",
                   (long long)p->heads, (long long)rows, (long long)cols, (long long)p->n_q,
                   (long long)p->n_k, (long long)o->block, (long long)(size[0] * size[1]),
                   (long long)size[2], (long long)size[3]);
}

/* All rows of a row block lie in one row of the layout: about 64 rows that divide the layout's
 * block, or all of it. */
static void
shape(const sa_problem *p, const void *opts, sa_plan_shape *shape)
{
    const sa_blockmask_opts *const o = opts;
    int64_t rows = o->block % 64 == 0 ? 64 : SA_MIN(o->block, 192);
    while (o->block % rows != 0 && rows > 16) {
        rows--;
    }
    if (o->block % rows != 0) {
        rows = o->block;
    }
    shape->rows_per_block = (int32_t)rows;
    shape->per_head = shape->per_head || o->layout.size[1] > 1;
    (void)p;
}

static sa_status
emit(const sa_plan_task *t, sa_spans *spans)
{
    const sa_blockmask_opts *const o = t->opts;
    for (int64_t i = t->begin; i < t->end;) {
        sa_row_block rows;
        sa_status status = sa_spans_block(spans, &rows);
        const int64_t h = o->layout.size[1] > 1 ? t->head : 0;
        const sa_bits bits = {sa_view_row(o->layout, 0, h, i / o->block), o->layout.stride[3]};
        for (int64_t a = 0, z; status == SA_OK; a = z) { /* runs [a, z) of key blocks */
            a = sa_bits_next(bits, true, a, o->layout.size[3]);
            z = sa_bits_next(bits, false, a, o->layout.size[3]);
            if (a == z) {
                break;
            }
            status = sa_spans_seen(spans, a * o->block, SA_MIN(z * o->block, t->problem->n_k));
        }
        if (status != SA_OK) {
            return status;
        }
        i = rows.end;
    }
    return SA_OK;
}

const sa_planner sa_planner_blockmask = {
    .name = "blockmask",
    .fields = fields,
    .opts_size = sizeof(sa_blockmask_opts),
    .rows_per_block = 64,
    .check = check,
    .shape = shape,
    .emit = emit,
};
