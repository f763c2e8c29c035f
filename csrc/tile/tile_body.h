/* tile_body.h - every tile function, once, for one real type and one instruction set.
 *
 * Set before: SA_REAL (and SA_REAL_IS_DOUBLE), SA_VBYTES, SA_SUFFIX, and an open target region.
 */
#include "tile/vec.h"

/* Widest strip in vectors, and how many key rows (channels) share a register tile with 1, 2 or 3
 * vectors of queries: the accumulators, the vectors and one broadcast must fit the register file
 * (16 registers, 32 with AVX-512), and enough accumulators must be in flight to hide the latency of
 * an FMA. Sums over queries: SUM_KEYS rows of SUM_VECS vectors of channels. */
#if defined(SA_HAVE_AVX512)
#define VECS 2
#define KEYS 12
#define KEYS_FOR(vecs) ((vecs) == 1 ? 8 : 12)
#define CHANNELS 8
#define CHANNELS_FOR(vecs) 8
#define SUM_VECS 4
#define SUM_KEYS 6
#else
#define VECS 3
#define KEYS 8
#define KEYS_FOR(vecs) ((vecs) == 1 ? 8 : (vecs) == 2 ? 6 : 4)
#define CHANNELS 8
#define CHANNELS_FOR(vecs) ((vecs) == 1 ? 8 : 4)
#define SUM_VECS 3
#define SUM_KEYS 4
#endif

#include "tile/tile_pack.h"
#include "tile/tile_scores.h"
#include "tile/tile_values.h"
#include "tile/tile_grad.h"
#include "tile/tile_received.h"
#include "tile/tile_row.h"
#include "tile/tile_run.h"
#include "tile/tile_product.h"
#include "tile/tile_select.h"
#include "tile/tile_ops.h"

const sa_tile SA_NAME(sa_tile) = {
#if defined(SA_HAVE_AVX512)
    .isa = SA_ISA_AVX512,
#elif defined(SA_HAVE_AVX2)
    .isa = SA_ISA_AVX2,
#else
    .isa = SA_ISA_BASE,
#endif
    .real_bytes = sizeof(real),
    .lanes = LANES,
    .strip_max = VECS * LANES,
    .load_rows = load_rows,
    .load_cols = load_cols,
    .store_cols = store_cols,
    .store_row = store_row,
    .scores = scores,
    .scores_exp = scores_exp,
    .fold = fold,
    .clip = clip,
    .values = values,
    .values_select = values_select,
    .softcap = softcap,
    .add_term = add_term,
    .weigh = weigh,
    .finite = all_finite,
    .dots = dots,
    .fold_row = fold_row,
    .axpys = axpys,
    .join_row = join_row,
    .finish = finish,
    .fill = fill,
    .product = product,
    .count_ge = count_ge,
    .compress_ge = compress_ge,
    .strip_weights = strip_weights,
    .strip_grads = strip_grads,
    .weights_grad = weights_grad,
    .sums = sums,
    .inner = inner,
    .fma_peak = fma_peak,
    .received = received,
    .peaks = peaks,
    .run_dots = run_dots,
    .run_axpys = run_axpys,
    .run_attend = run_attend,
    .read_sum = read_sum,
};
