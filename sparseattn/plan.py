"""Which keys each query row sees, as an object: build, inspect, reuse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from sparseattn import _core
from sparseattn.errors import ArgumentError, UnknownArgument, door
from sparseattn.inputs import (
    MOST,
    Operands,
    check_params,
    check_sizes,
    empty,
    enough_memory,
    once,
    read_bool,
    read_causal,
    read_operands,
    read_problem,
)
from sparseattn.packed import build, read_cu_seqlens, read_ints
from sparseattn.variants.base import Piece, Problem, Variant, nearest, parse
from sparseattn.weights import Rows

if TYPE_CHECKING:
    from sparseattn.variants.base import Array

Shape: TypeAlias = tuple[int, int, int, int]
Remake: TypeAlias = Callable[[Shape, tuple[int, ...], int], "Plan"]  # shape, lead, kv heads

MOST_OF_MASK = ((-1, 1 << 30, "wide"), *MOST[1:])
MOD_ROWS = 1024  # rows of a mask_mod evaluated at once
PICTURE = 64  # cells a side
PICTURE_HEADS = 4

# What people type elsewhere, and what it is called here.
RENAMED = {
    "is_causal": "causal (causal='top_left' for PyTorch's alignment)",
    "attn_mask": "mask for a bool array, or bias for floats",
    "attention_mask": "key_mask for padding (batch, n_k), mask for bool, bias for floats",
    "key_padding_mask": "key_mask, with True for the keys that are there",
    "padding_mask": "key_mask, with True for the keys that are there",
    "attn_bias": "bias",
    "alibi_slopes": "bias",
    "dropout": "dropout_p",
    "attention_dropout": "dropout_p",
    "generator": "seed",
    "softmax_scale": "scale",
    "sm_scale": "scale",
    "scaling": "scale",
    "logits_soft_cap": "softcap",
    "softcapping": "softcap",
    "window_size": "spec, as in sa.Window(window_size=(left, right))",
    "sliding_window": "spec, as in sa.Window(64)",
    "cu_seqlens_q": "cu_seqlens, as in cu_seqlens=(cu_q, cu_k)",
    "cu_seqlens_k": "cu_seqlens, as in cu_seqlens=(cu_q, cu_k)",
    "max_seqlen": "nothing: cu_seqlens says it",
    "max_seqlen_q": "nothing: cu_seqlens says it",
    "max_seqlen_k": "nothing: cu_seqlens says it",
    "document_ids": "spec, as in sa.Plan.from_documents(ids)",
    "block_mask": "spec, as in sa.BlockMask(64), or a plan",
    "enable_gqa": "nothing: unequal numbers of heads just work",
    "need_weights": "return_weights",
    "output_attentions": "return_weights",
    "return_attn_probs": "return_weights",
    "return_softmax_lse": "return_lse",
    "past_key_values": "cache, as in cache=sa.Cache()",
    "past_key_value": "cache, as in cache=sa.Cache()",
    "kv_cache": "cache, as in cache=sa.Cache()",
    "use_cache": "cache, as in cache=sa.Cache()",
    "sinks": "params, as in params={'sink': one score a head}",
    "s_aux": "params, as in params={'sink': one score a head}",
}


def refuse_keywords(
    function: str,
    wrong: dict[str, Any],
    known: tuple[str, ...],
    renamed: dict[str, str] = RENAMED,
) -> None:
    """A TypeError that names the right argument for the first unknown one."""
    for name in wrong:
        near = nearest(name, known, cutoff=0.7)
        right = renamed.get(name) or (near[0] if near else f"one of {', '.join(known)}")
        raise UnknownArgument(f"{function}() has no argument {name}: use {right}")


class PlanCounts(NamedTuple):
    """Pairs over all batches and heads, and rows over all batches and kv heads."""

    kept: int  # (query, key) pairs that the plan shows
    visible: int  # pairs that causality, masks and cu_seqlens alone would show; of a mask, all
    union_rows: int  # distinct keys that the heads of a kv group see together, summed over rows


class Plan:
    """Which keys each query row sees. Made by ``sa.plan`` or one of the functions ``from_...``.

    ``sa.attention(q, k, v, plan)`` runs it, under the causality and masks it was made with.

    Attributes
    ----------
    batch, heads, kv_heads, n_q, n_k : int
        Leading axes count as one batch.
    spec : Variant or None
        What it was made from; None for masks, intervals and documents.
    cu_seqlens : tuple of arrays or None
        Offsets of queries and of keys of the sequences that are packed.

    >>> import numpy as np, sparseattn as sa
    >>> plan = sa.Plan.from_mask(np.tri(4, dtype=bool))
    >>> plan.count().kept
    10
    """

    __slots__ = ("_counts", "_remake", "kv_heads", "lead", "pieces", "problem", "shape", "spec")

    def __init__(
        self,
        pieces: tuple[Piece, ...],
        problem: Problem,
        shape: Shape,
        kv_heads: int,
        lead: tuple[int, ...],
        spec: Variant | None,
        remake: Remake | None = None,
    ) -> None:
        self.pieces = pieces
        self.problem = problem
        self.shape = shape
        self.kv_heads = kv_heads
        self.lead = lead
        self.spec = spec
        self._remake = remake  # of what holds for other batches and heads as well
        self._counts: PlanCounts | None = None

    @staticmethod
    def from_mask(mask: Any) -> Plan:
        """The plan of a bool array, True = may attend.

        Parameters
        ----------
        mask : array of bool, shape (n_q, n_k) or (..., heads, n_q, n_k)
            Copied. Sizes of 1 before ``n_q`` serve any batch and any number of heads.

        Raises
        ------
        DtypeError
            If it is not bool.

        >>> import numpy as np, sparseattn as sa
        >>> sa.Plan.from_mask(np.eye(3, dtype=bool)).kept_share
        0.3333333333333333
        """
        array = read_bool("mask", mask, "a plan says who may attend, True or False")
        if array.ndim < 2:
            raise ArgumentError(f"mask must be (..., heads, n_q, n_k), got shape {array.shape}")
        check_sizes("mask", array.shape, MOST_OF_MASK)
        with enough_memory("a copy of mask", array.shape, bool):
            array = array.copy()
        array = array.reshape((1,) * (3 - array.ndim) + array.shape)
        lead = array.shape[:-3]
        return _from_mask(array.reshape((math.prod(lead), *array.shape[-3:])), lead)

    @staticmethod
    def from_mask_mod(
        fn: Callable[[Any, Any, Any, Any], Any],
        B: int | None,
        H: int | None,
        n_q: int,
        n_k: int,
    ) -> Plan:
        """The plan of a function of indices, as FlexAttention's ``create_block_mask`` takes it.

        Parameters
        ----------
        fn : callable (b, h, q_idx, kv_idx) -> bool
            Called with NumPy index arrays that broadcast to (rows, n_k): join conditions by
            ``&`` and ``|``.
        B, H : int or None
            Batch and heads; None: the same for all.
        n_q, n_k : int

        >>> import sparseattn as sa
        >>> plan = sa.Plan.from_mask_mod(lambda b, h, q, k: (q >= k) & (q - k < 2), 1, 2, 5, 5)
        >>> plan.count().kept
        18
        """
        sizes = {"B": 1 if B is None else B, "H": 1 if H is None else H, "n_q": n_q, "n_k": n_k}
        for name, size in sizes.items():
            _check_size(name, size)
        shape = tuple(sizes.values())
        check_sizes("(B, H, n_q, n_k)", shape, MOST_OF_MASK)
        mask = empty("the mask", shape, bool)
        for b, h in np.ndindex(mask.shape[:2]):
            for i in range(0, n_q, MOD_ROWS):
                rows = np.arange(i, min(i + MOD_ROWS, n_q))[:, None]
                mask[b, h, i : i + MOD_ROWS] = _call_mod(fn, b, h, rows, np.arange(n_k)[None])
        return _from_mask(mask, (mask.shape[0],))

    @staticmethod
    def from_intervals(
        lo: Any, hi: Any, n_k: int, batch: int | None = None, heads: int | None = None
    ) -> Plan:
        """The plan of one interval of keys a row: row i sees key j iff ``lo[i] <= j < hi[i]``.

        In O(n_q) memory: documents, a prefix of another length for each batch entry, ragged keys.

        Parameters
        ----------
        lo, hi : array of int, shape (n_q,) or (batch, n_q)
            ``0 <= lo <= hi <= n_k``; a row with ``lo = hi`` sees nothing. They broadcast together,
            so that ``lo`` may be 0. Copied.
        n_k : int
            Number of keys.
        batch, heads : int or None
            None: any number of heads, and any batch unless ``lo`` or ``hi`` says which.

        Raises
        ------
        ArgumentError, DtypeError
            If shapes disagree, an interval is not within the keys, or the dtype is not an integer.

        >>> import numpy as np, sparseattn as sa
        >>> hi = np.maximum(np.arange(1, 7), [[2], [4]])  # prefix-LM: 2 keys, and 4
        >>> sa.Plan.from_intervals(0, hi, 6).to_mask().sum(-1).tolist()
        [[[2, 2, 3, 4, 5, 6]], [[4, 4, 4, 4, 5, 6]]]
        """
        low, high = read_ints("lo", lo), read_ints("hi", hi)
        try:
            low, high = np.broadcast_arrays(low, high)
        except ValueError:
            raise ArgumentError(
                f"lo and hi must have one shape, got {low.shape} and {high.shape}"
            ) from None
        if low.ndim not in (1, 2):
            raise ArgumentError(f"lo and hi must be (n_q,) or (batch, n_q), got {low.shape}")
        sizes = {"n_k": n_k, "batch": batch, "heads": heads}
        for name, size in sizes.items():
            _check_size(name, size, least=int(name == "heads"))
        low, high = (np.array(x, order="C", ndmin=2) for x in (low, high))  # nobody else's
        shape = (low.shape[0] if batch is None else batch, heads or 1, low.shape[1], n_k)
        return _from_intervals(low, high, shape, shape[:1])

    @staticmethod
    def from_documents(ids: Any, causal: Any = True, heads: int | None = None) -> Plan:
        """The plan of documents packed one after the other: tokens see their own document alone.

        Parameters
        ----------
        ids : array of int, shape (n,) or (batch, n)
            The document of each token, any numbers; each document is one run of tokens.
        causal : bool
            Whether a token sees those up to itself, or all of its document.
        heads : int or None
            None: any number. Of shape (n,), ``ids`` serve any batch.

        Raises
        ------
        ArgumentError, DtypeError
            If a document comes back after another, or ``ids`` are not integers of such a shape.

        >>> import sparseattn as sa
        >>> sa.Plan.from_documents([7, 7, 7, 2, 2]).to_mask().sum(-1).tolist()
        [[[1, 2, 3, 1, 2]]]
        """
        array = read_ints("ids", ids)
        if array.ndim not in (1, 2):
            raise ArgumentError(f"ids must be (n,) or (batch, n), got shape {array.shape}")
        array = np.array(array, ndmin=2)
        at = np.arange(array.shape[1])
        first = np.ones(array.shape, bool)  # of its document
        first[:, 1:] = array[:, 1:] != array[:, :-1]
        for b, row in enumerate(array):
            starts = np.flatnonzero(first[b])
            found, where = np.unique(row[starts], return_index=True)
            if found.size < starts.size:
                again = int(starts[np.setdiff1d(np.arange(starts.size), where)[0]])
                raise ArgumentError(
                    f"ids must have each document in one run, and batch entry {b} comes back to "
                    f"{row[again]} at token {again}: pass mask=ids[:, None] == ids for such"
                )
        lo = np.maximum.accumulate(np.where(first, at, 0), 1)
        hi = np.broadcast_to(at + 1, array.shape)
        if not read_causal(causal):
            last = np.ones(array.shape, bool)
            last[:, :-1] = first[:, 1:]
            ends = np.where(last, at + 1, at.size)
            hi = np.minimum.accumulate(ends[:, ::-1], 1)[:, ::-1]
        return Plan.from_intervals(lo, hi, at.size, heads=heads)

    @property
    def cu_seqlens(self) -> tuple[Array, Array] | None:
        return self.problem.cu_seqlens

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def heads(self) -> int:
        return self.shape[1]

    @property
    def n_q(self) -> int:
        return self.shape[2]

    @property
    def n_k(self) -> int:
        return self.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes that the plan itself holds; a mask it was made under is not counted."""
        return sum(piece.core.nbytes for piece in self.pieces)

    @property
    def kept_share(self) -> float:
        """Kept pairs over visible pairs; 1 where nothing is visible."""
        counts = self.count()
        return counts.kept / counts.visible if counts.visible else 1.0

    def count(self) -> PlanCounts:
        """Pairs kept and visible, and rows read; counted without n_q x n_k memory.

        Where one kv group is split between specs (``PerHead``), ``union_rows`` adds their parts.
        """
        if self._counts is None:
            total = np.zeros(3, object)
            for piece in self.pieces:
                low, high = piece.kv_range(self.group)
                total += np.array(piece.core.count(high - low), object)
            kept, visible, union_rows = map(int, total)
            if self._remake is not None:
                visible = math.prod(self.shape)
            self._counts = PlanCounts(kept, visible, union_rows)
        return self._counts

    @property
    def group(self) -> int:
        """Query heads to a kv head."""
        return max(1, self.heads // max(1, self.kv_heads))

    def to_mask(self) -> Array:
        """bool (..., heads, n_q, n_k): True where the row sees the key."""
        mask = np.zeros(self.shape, bool)
        for piece in self.pieces:
            mask[:, piece.begin : piece.end] = piece.core.to_mask()
        return mask.reshape(self.lead + self.shape[1:])

    def for_call(self, ops: Operands) -> Plan:
        """This plan, or the same for more batches and heads; else an error."""
        wanted, have = ops.score_shape, self.shape
        kv_heads = ops.k.shape[1]
        if have == wanted and kv_heads == self.kv_heads:
            return self
        fits = have[2:] == wanted[2:] and have[0] in (1, wanted[0]) and have[1] in (1, wanted[1])
        if self._remake is not None and fits:
            return self._remake(wanted, ops.lead, kv_heads)
        raise ArgumentError(
            f"the plan is for (batch, heads, n_q, n_k) = {have} with {self.kv_heads} kv heads, and "
            f"q, k are {wanted} with {ops.k.shape[1]}: make a plan for them"
        )

    def rows(self, head: int) -> Rows:
        """Reader of the keys of single rows of a query head."""
        piece = next(p for p in self.pieces if p.begin <= head < p.end)
        return Rows(piece.core, self.problem.of_heads(piece.begin, piece.end), piece.begin)

    def __repr__(self) -> str:
        source = "mask" if self.spec is None else str(self.spec)
        if self.cu_seqlens is not None:
            source += f" in {self.cu_seqlens[0].size - 1} sequences"
        batch, heads, n_q, n_k = self.shape
        return (
            f"<Plan of {source}: batch {batch}, heads {heads}, n_q {n_q}, n_k {n_k}, "
            f"keeps {100 * self.kept_share:.3g} % of visible pairs, {self.nbytes:,} bytes>"
        )

    def _repr_svg_(self) -> str:
        return draw(self)

    def _repr_html_(self) -> str:
        text = repr(self).strip("<>").replace("&", "&amp;").replace("<", "&lt;")
        return f"<div><div>{text}</div>{draw(self)}</div>"


def _from_mask(mask: Array, lead: tuple[int, ...], kv_heads: int | None = None) -> Plan:
    """From a 4-D bool array that nobody else writes."""

    def remake(shape: Shape, lead: tuple[int, ...], kv_heads: int) -> Plan:
        return _from_mask(np.broadcast_to(mask, shape), lead, kv_heads)

    batch, heads, n_q, n_k = mask.shape
    pieces = (Piece(_core.plan_from_mask(mask), 0, heads),)
    shape = (batch, heads, n_q, n_k)
    return Plan(pieces, Problem(mask=mask), shape, kv_heads or heads, lead, None, remake)


def _from_intervals(
    lo: Array, hi: Array, shape: Shape, lead: tuple[int, ...], kv_heads: int | None = None
) -> Plan:
    """From int64 arrays (batch or 1, n_q) that nobody else writes."""

    def remake(shape: Shape, lead: tuple[int, ...], kv_heads: int) -> Plan:
        return _from_intervals(lo, hi, shape, lead, kv_heads)

    batch, heads, _, n_k = shape
    pieces = (Piece(_core.plan_from_intervals(lo, hi, n_k, batch, heads), 0, heads),)
    return Plan(pieces, Problem(), shape, kv_heads or heads, lead, None, remake)


def _check_size(name: str, size: Any, least: int = 0) -> None:
    if size is not None and (not isinstance(size, int | np.integer) or size < least):
        raise ArgumentError(f"{name} must be a number of at least {least}, got {size!r:.80}")


def _call_mod(fn: Callable[..., Any], b: int, h: int, rows: Array, keys: Array) -> Array:
    try:
        seen = np.asarray(fn(np.int64(b), np.int64(h), rows, keys))
    except ValueError as error:
        if "ambiguous" not in str(error):
            raise
        raise ArgumentError(
            "mask_mod must join conditions on index arrays by & and |, not by 'and' and 'or'"
        ) from error
    if seen.dtype != np.bool_:
        raise ArgumentError(f"mask_mod must give bool, got {seen.dtype}")
    return np.broadcast_to(seen, (rows.shape[0], keys.shape[1]))


def make_plan(ops: Operands, spec: Any, problem: Problem, params: Any) -> Plan:
    """The plan of a spec or its text for operands that have passed the door."""
    variant = parse("dense" if spec is None else spec)
    taken = check_params(params, variant.arrays, variant)
    pieces = build(variant, ops.q, ops.k, problem, taken)
    return Plan(pieces, problem, ops.score_shape, ops.k.shape[1], ops.lead, variant)


@door
def plan(
    q: Any,
    k: Any,
    spec: Any = None,
    *,
    params: Any = None,
    causal: Any = False,
    scale: Any = None,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    softcap: Any = None,
    cu_seqlens: Any = None,
    **wrong: Any,
) -> Plan:
    """Which keys each query would see: the structure of an attention call, without its arithmetic.

    Parameters
    ----------
    q, k : array, shape (..., heads, n_q, dim) and (..., kv_heads, n_k, dim)
        float32, float64, float16 or bfloat16; patterns use the shapes only, selectors the values.
    spec : spec or str
        None is dense.
    params, causal, scale, mask, key_mask, bias, softcap, cu_seqlens
        As in :func:`attention`; the plan holds copies of the masks and offsets.

    Returns
    -------
    Plan
        Accepted by :func:`attention` in place of a spec.

    Raises
    ------
    ArgumentError, DtypeError
        If shapes, values or dtypes do not fit; the message names the argument.

    >>> import numpy as np, sparseattn as sa
    >>> x = np.zeros((4, 100, 16), np.float32)
    >>> sa.plan(x, x, "window:10", causal=True).count().kept
    3820
    """
    known = ("params", "causal", "scale", "mask", "key_mask", "bias", "softcap", "cu_seqlens")
    refuse_keywords("plan", wrong, known)
    if isinstance(spec, Plan):
        raise ArgumentError("plan() makes a plan of a spec, got a Plan: use it as it is")
    ops = read_operands(q, k, None)
    problem = read_problem(
        ops, causal=causal, scale=scale, mask=mask, key_mask=key_mask, bias=bias, softcap=softcap
    )
    problem = problem._replace(mask=own(problem.mask), key_mask=own(problem.key_mask))
    if cu_seqlens is not None:
        offsets = read_cu_seqlens(cu_seqlens, ops.q.shape[2], ops.k.shape[2])
        problem = problem._replace(cu_seqlens=offsets)
    return make_plan(ops, spec, problem, params)


def own(mask: Array | None) -> Array | None:
    """A copy that nobody else writes; what was broadcast stays so."""
    if mask is None:
        return None
    with enough_memory("a copy of the masks", mask.shape, bool):
        return np.broadcast_to(once(mask).copy(), mask.shape)


# ---- pictures -----------------------------------------------------------------------------------


def shares(plan: Plan, head: int, cells: int = PICTURE) -> Array:
    """Share of kept pairs in each cell of a coarse grid, of batch 0; rows are sampled."""
    n_q, n_k = plan.n_q, plan.n_k
    high, wide = min(cells, n_q), min(cells, n_k)
    grid = np.zeros((high, wide))
    edges = np.arange(wide + 1) * n_k // max(1, wide)
    reader = plan.rows(head)
    for y in range(high):
        low, top = y * n_q // high, (y + 1) * n_q // high
        sample = np.unique(np.linspace(low, top - 1, 4).astype(int))
        for i in sample:
            keys = reader.keys(0, head, int(i))
            grid[y] += np.histogram(keys, edges)[0] / np.diff(edges) / len(sample)
    return grid


def draw(plan: Plan) -> str:
    """SVG: queries down, keys across, darker where more is kept; a few heads where they differ."""
    if 0 in plan.shape:
        return '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
    alike = len(plan.pieces) == 1 and plan.pieces[0].core.n_maps == 1
    heads = [0] if alike else range(min(plan.heads, PICTURE_HEADS))
    side, gap = 160, 10
    parts = []
    for at, head in enumerate(heads):
        grid = shares(plan, head)
        high, wide = grid.shape
        parts.append(
            f'<g transform="translate({at * (side + gap)} 14) '
            f'scale({side / wide:.6g} {side / high:.6g})">'
            f'<rect width="{wide}" height="{high}" fill="#eee"/>'
        )
        for y, row in enumerate(np.round(grid, 2)):
            cuts = np.flatnonzero(np.diff(row, prepend=-1.0, append=-1.0))
            for x, end in itertools.pairwise(cuts):
                if row[x] > 0:
                    parts.append(
                        f'<rect x="{x}" y="{y}" width="{end - x}" height="1" fill="#1f4e79" '
                        f'fill-opacity="{max(row[x], 0.1):.2g}"/>'
                    )
        label = "all heads" if alike else f"head {head}"
        parts.append(f'</g><text x="{at * (side + gap)}" y="10" font-size="10">{label}</text>')
    width = len(heads) * (side + gap)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{side + 20}" '
        f'font-family="sans-serif">{"".join(parts)}</svg>'
    )
