/* score_terms.h - one row of score terms; included by score.c once per real type (TERM_REAL,
 * TERM_NAME). */

static void
TERM_NAME(const sa_problem *p, bool masked, int64_t b, int64_t h, int64_t i, const int32_t *keys,
          int n, TERM_REAL *t)
{
    if (p->bias.data != NULL) {
        const TERM_REAL *const bias = sa_view_row(p->bias, b, h, i);
        const int64_t step = p->bias.stride[3];
        for (int x = 0; x < n; x++) {
            t[x] = bias[keys[x] * step];
        }
    } else {
        for (int x = 0; x < n; x++) {
            t[x] = 0;
        }
    }
    if (masked && p->mask.data != NULL) {
        const unsigned char *const mask = sa_view_row(p->mask, b, h, i);
        const int64_t step = p->mask.stride[3];
        for (int x = 0; x < n; x++) {
            t[x] = mask[keys[x] * step] ? t[x] : -INFINITY;
        }
    }
    if (masked && p->key_mask.data != NULL) {
        const unsigned char *const mask = sa_view_row(p->key_mask, b, 0, 0);
        const int64_t step = p->key_mask.stride[3];
        for (int x = 0; x < n; x++) {
            t[x] = mask[keys[x] * step] ? t[x] : -INFINITY;
        }
    }
}
