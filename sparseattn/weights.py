"""Weights of a call without n_q x n_k memory: rows read off the spans when asked for, the largest
of each row, and what each key received."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparseattn import _core
from sparseattn.errors import ArgumentError
from sparseattn.inputs import Operands, empty
from sparseattn.variants.base import Piece, Problem

if TYPE_CHECKING:
    from sparseattn.variants.base import Array

SCORES_AT_ONCE = 1 << 20  # scores held while rows of weights are made
DENSE_WEIGHTS = 1 << 22  # weights up to here come as an array
MOST_DIGITS = 18


class Rows:
    """Reader of the keys that single rows of a core plan see."""

    def __init__(self, core: _core.Plan, problem: Problem, first_head: int = 0) -> None:
        self.core = core
        self.arrays = core.arrays()
        self.mask = problem.mask if core.term_mask else None
        self.key_mask = problem.key_mask if core.term_mask else None
        self.first_head = first_head

    def keys(self, batch: int, head: int, row: int) -> Array:
        """Ascending keys of one row; ``head`` counts query heads of the whole call."""
        core, a = self.core, self.arrays
        head -= self.first_head
        maps = core.heads // core.heads_per_map
        plan_map = (batch * maps if a["per_batch"] else 0) + head // core.heads_per_map
        block = int(np.searchsorted(a["row_start"], row, "right")) - 1
        at = plan_map * core.n_blocks + block
        full, see = a["row_ptr"][at], a["see_ptr"][at]
        band, end = a["band_ptr"][at], a["row_ptr"][at + 1]
        low = interval(a["see_lo"], core.n_q, batch, row, 0)
        high = interval(a["see_hi"], core.n_q, batch, row, core.n_k)
        clipped = [self.spans(see, band, low, high)]
        if end > band:
            low = max(low, interval(a["band_lo"], core.n_q, plan_map, row, 0))
            high = min(high, interval(a["band_hi"], core.n_q, plan_map, row, core.n_k))
            clipped.append(self.spans(band, end, low, high))
        keys = np.concatenate(clipped)
        if self.mask is not None:
            keys = keys[self.mask[batch, head, row, keys]]
        if self.key_mask is not None:
            keys = keys[self.key_mask[batch, keys]]
        return np.sort(np.concatenate([self.spans(full, see, 0, core.n_k), keys]))

    def spans(self, begin: int, end: int, low: int, high: int) -> Array:
        """All keys of spans [begin, end) that lie in [low, high)."""
        start = self.arrays["start"][begin:end].astype(np.int64)
        length = self.arrays["len"]
        stop = start + (self.arrays["span_len"] if length is None else length[begin:end])
        start, stop = np.maximum(start, low), np.minimum(stop, min(high, self.core.n_k))
        start, stop = start[start < stop], stop[start < stop]
        size = stop - start
        ends = np.cumsum(size)
        return np.repeat(start - (ends - size), size) + np.arange(ends[-1] if size.size else 0)


def interval(bounds: Array | None, n_q: int, at: int, row: int, otherwise: int) -> int:
    """Entry of flat (maps or 1, n_q) bounds."""
    if bounds is None:
        return otherwise
    return int(bounds[row if bounds.size == n_q else at * n_q + row])


class WeightRows(NamedTuple):
    """Rows of attention weights, compressed: row r holds entries indptr[r] to indptr[r + 1]."""

    indptr: Array  # int64 (rows + 1,)
    indices: Array  # int64, the keys
    values: Array  # the weights, in float64 for float64 inputs, else float32


class Weights:
    """Attention weights of a large problem, made row by row when asked for.

    ``rows(batch, head, begin, end)`` gives compressed rows; ``to_dense()`` is the explicit way to
    the whole array. Leading axes count as one batch.
    """

    def __init__(
        self, q: Array, k: Array, lse: Array, problem: Problem, plan: Any, lead: tuple[int, ...]
    ) -> None:
        self._q, self._k = q.copy(), k.copy()  # the caller may go on and change them
        self._lse, self._problem, self._plan, self._lead = lse, problem, plan, lead

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., heads, n_q, n_k)"""
        return self._lead + tuple(self._plan.shape[1:])

    @property
    def nnz(self) -> int:
        """Number of weights over all rows."""
        return int(self._plan.count().kept)

    def rows(self, batch: int, head: int, begin: int = 0, end: int | None = None) -> WeightRows:
        """Weights of query rows [begin, end) of one batch entry and query head."""
        _, _, n_q, n_k = self._plan.shape
        end = n_q if end is None else min(end, n_q)
        reader = self._plan.rows(head)
        indices, values = [np.empty(0, np.int64)], [np.empty(0, self._lse.dtype)]
        sizes = [0]
        chunk = max(1, SCORES_AT_ONCE // max(1, n_k))
        for i0 in range(begin, end, chunk):
            i1 = min(i0 + chunk, end)
            scores = _core.score_rows(self._q, self._k, self._problem, batch, head, i0, i1)
            for i in range(i0, i1):
                keys = reader.keys(batch, head, i)
                indices.append(keys)
                values.append(exp_minus(scores[i - i0, keys], self._lse[batch, head, i]))
                sizes.append(keys.size)
        indptr = np.cumsum(sizes, dtype=np.int64)
        return WeightRows(indptr, np.concatenate(indices), np.concatenate(values))

    def to_dense(self) -> Array:
        """The whole array of shape (..., heads, n_q, n_k)."""
        mask = self._plan.to_mask().reshape(self._plan.shape)
        dense = dense_weights(self._q, self._k, self._lse, self._problem, mask)
        return dense.reshape(self.shape)

    def __repr__(self) -> str:
        return f"<Weights of shape {self.shape}: {self.nnz:,} entries, made by .rows(batch, head)>"


class TopWeights(NamedTuple):
    """The largest weights of each row, downwards; equal ones by key upwards."""

    values: Any  # (..., heads, n_q, n), float64 for float64 inputs, else float32
    indices: Any  # int64, alike: the keys; -1, with weight 0, past the keys that a row keeps


class Wanted(NamedTuple):
    """What ``return_weights`` asks for."""

    kind: str  # "", "all", "mass", "topn"
    n: int = 0


def read_wanted(return_weights: Any) -> Wanted:
    if isinstance(return_weights, bool | np.bool_):
        return Wanted("all" if return_weights else "")
    if isinstance(return_weights, str):
        name, colon, number = return_weights.strip().lower().partition(":")
        if name == "mass" and not colon:
            return Wanted("mass")
        if name == "topn" and number.isdecimal() and len(number) <= MOST_DIGITS and int(number) > 0:
            return Wanted("topn", int(number))
        if name == "topn":
            raise ArgumentError(
                f"return_weights={return_weights!r:.80} must say how many weights of each row, "
                "from 1 on: pass 'topn:16'"
            )
    raise ArgumentError(
        f"return_weights must be False, True, 'topn:16' (the 16 largest weights of each row) or "
        f"'mass' (what each key received), got {return_weights!r:.80}"
    )


def make_weights(wanted: Wanted, ops: Operands, lse: Array, problem: Problem, plan: Any) -> Any:
    """What was asked for, of a call whose log-sum-exp (batch, heads, n_q) is known."""
    if wanted.kind == "mass":
        return ops.give(mass(ops, lse, problem, plan))
    if wanted.kind == "topn":
        values, indices = largest(ops, lse, problem, plan, wanted.n)
        return TopWeights(ops.give(values), ops.give(indices))
    batch, heads, n_q, n_k = ops.score_shape
    if batch * heads * n_q * n_k > DENSE_WEIGHTS:
        return Weights(ops.q, ops.k, lse, problem, plan, ops.lead)
    mask = plan.to_mask().reshape(ops.score_shape)
    return ops.give(dense_weights(ops.q, ops.k, lse, problem, mask), stored=True)


def mass(ops: Operands, lse: Array, problem: Problem, plan: Any) -> Array:
    """Sums of the weights over the rows, (batch, heads, n_k)."""
    batch, heads, _, n_k = ops.score_shape
    total = empty("the mass of the keys", (batch, heads, n_k), lse.dtype)
    for piece in plan.pieces:
        call, own = of_piece(piece, ops, lse, problem, plan.group)
        _core.attend_mass(*call, total[:, own])
    return total


def largest(ops: Operands, lse: Array, problem: Problem, plan: Any, n: int) -> tuple[Array, Array]:
    """The n largest weights of each row and their keys, (batch, heads, n_q, n)."""
    shape = (*ops.score_shape[:3], n)
    values = empty("the largest weights", shape, lse.dtype)
    indices = empty("the keys of the largest weights", shape, np.int64)
    for piece in plan.pieces:
        call, own = of_piece(piece, ops, lse, problem, plan.group)
        _core.attend_topn(*call, values[:, own], indices[:, own])
    return values, indices


def of_piece(
    piece: Piece, ops: Operands, lse: Array, problem: Problem, group: int
) -> tuple[tuple[Array, Array, Array, _core.Plan, Problem, Array], slice]:
    """q, k, v, plan, problem and lse of the heads of one piece, and those heads."""
    own, kv = slice(piece.begin, piece.end), slice(*piece.kv_range(group))
    arrays = (ops.q[:, own], ops.k[:, kv], ops.k[:, kv])  # values are not read
    return (*arrays, piece.core, problem.of_heads(piece.begin, piece.end), lse[:, own]), own


def exp_minus(scores: Array, lse: Any) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        weights: Array = np.exp(scores - lse)
    return weights


def dense_weights(q: Array, k: Array, lse: Array, problem: Problem, mask: Array) -> Array:
    """Weights (batch, heads, n_q, n_k): exp(s - lse) where ``mask`` shows the key."""
    weights = np.zeros(mask.shape, lse.dtype)
    for b, h in np.ndindex(mask.shape[:2]):
        seen = mask[b, h] & (lse[b, h] != -np.inf)[:, None]
        scores = _core.score_rows(q, k, problem, b, h, 0, mask.shape[2])
        weights[b, h][seen] = exp_minus(scores, lse[b, h][:, None])[seen]
    return weights
