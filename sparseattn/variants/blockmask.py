"""A layout of live and dead blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sparseattn.errors import ArgumentError
from sparseattn.variants.base import PAST, Piece, Problem, Variant, register

if TYPE_CHECKING:
    from sparseattn.variants.base import Array, Params


@register
@dataclass(frozen=True, slots=True)
class BlockMask(Variant):
    """Blocks of queries see blocks of keys where a layout says so.

    Parameters
    ----------
    block : int
        Rows and columns of a block; the last ones may be ragged.

    Arrays (``params``)
    -------------------
    layout : ndarray of bool, shape (heads or 1, ceil(n_q / block), ceil(n_k / block))
        True where the block is live. Causality and masks cut within live blocks. With a cache the
        layout is that of all tokens so far, and may reach further.

    Raises
    ------
    ArgumentError
        If ``layout`` is not given or has another shape.

    References
    ----------
    Dao et al., "FlashAttention", 2022, arXiv:2205.14135, section 3.3.

    >>> import numpy as np, sparseattn as sa
    >>> x = np.ones((1, 128, 16), np.float32)
    >>> plan = sa.plan(x, x, sa.BlockMask(64), params={"layout": np.eye(2, dtype=bool)[None]})
    >>> plan.kept_share
    0.5
    """

    kind: ClassVar[str] = "blockmask"
    aliases: ClassVar[tuple[str, ...]] = ("block_sparse",)
    examples: ClassVar[tuple[str, ...]] = ("blockmask:64", "blockmask:16", "blockmask:24")
    arrays: ClassVar[tuple[str, ...]] = ("layout",)

    block: int = 64

    def build(
        self, q: Array, k: Array, problem: Problem, params: Params | None
    ) -> tuple[Piece, ...]:
        params = params or {}
        past, n_q, n_k = params.get(PAST, 0), q.shape[2], k.shape[2]
        if "layout" not in params:
            shape = f"(heads or 1, {-(-(past + n_q) // self.block)}, {-(-n_k // self.block)})"
            given = sorted(name for name in params if name != PAST)
            raise ArgumentError(
                f"BlockMask({self.block}) needs params={{'layout': bool array of shape {shape}}}, "
                f"got params={given or None}"
            )
        if PAST not in params:
            return Variant.build(self, q, k, problem, params)
        spec, layout = self.of_rows(np.asarray(params["layout"]), past, n_q, n_k)
        return Variant.build(spec, q, k, problem, {"layout": layout})

    def of_rows(self, layout: Array, past: int, n_q: int, n_k: int) -> tuple[BlockMask, Array]:
        """The same blocks for rows ``past`` and on alone, of a layout that may reach further."""
        rows, columns = -(-(past + n_q) // self.block), -(-n_k // self.block)
        if past < 0:
            raise ArgumentError(f"q has {n_q} rows and there are {n_k} tokens: give no more rows")
        if layout.ndim < 2 or layout.shape[-2] < rows or layout.shape[-1] < columns:
            raise ArgumentError(
                f"layout must reach rows {past} to {past + n_q} and {n_k} keys in blocks of "
                f"{self.block}, at least (heads or 1, {rows}, {columns}), got {layout.shape}"
            )
        layout = layout[..., past // self.block : rows, :columns]
        first = past % self.block
        if first == 0 or first + n_q <= self.block:
            return self, layout[..., : -(-n_q // self.block), :]
        block = math.gcd(first, self.block)  # the first row of the call begins a block of these
        times, begin = self.block // block, first // block
        layout = layout.repeat(times, -2)[..., begin : begin + -(-n_q // block), :]
        return BlockMask(block), layout.repeat(times, -1)[..., : -(-n_k // block)]
