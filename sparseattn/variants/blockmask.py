"""A layout of live and dead blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparseattn.errors import ArgumentError
from sparseattn.variants.base import Piece, Problem, Variant, register

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
        True where the block is live. Causality and masks cut within live blocks.

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
        if not params or "layout" not in params:
            shape = f"(heads or 1, {-(-q.shape[2] // self.block)}, {-(-k.shape[2] // self.block)})"
            raise ArgumentError(
                f"BlockMask({self.block}) needs params={{'layout': bool array of shape {shape}}}, "
                f"got params={sorted(params) if params else None}"
            )
        return Variant.build(self, q, k, problem, params)
