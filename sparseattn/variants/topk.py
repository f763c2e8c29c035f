"""The best-scoring keys of each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from sparseattn.variants.base import Piece, Problem, Variant, register

if TYPE_CHECKING:
    from sparseattn.variants.base import Array, Params


@register
@dataclass(frozen=True, slots=True)
class TopK(Variant):
    """Each query row keeps its k best-scoring visible keys; ties go to the lower key.

    Every key is read for its score, only kept values are: the saving is on values.

    Parameters
    ----------
    k : int
        Keys kept; rows with at most ``k`` visible keys stay dense.
    placement : {"pre", "post"}
        Select before the softmax (kept weights sum to 1) or after it (they are those of the full
        row, the rest is dropped; the log-sum-exp is the full row's).
    gradient : {"selected", "straight_through"}
        Of the scores: through the kept keys, or as if all visible keys had been kept, so that keys
        left out can learn to be chosen. Outputs and the gradient of v are the same.

    References
    ----------
    Gupta et al., "Memory-efficient transformers via top-k attention", 2021, arXiv:2106.06899.
    Bengio, Leonard, Courville, 2013, arXiv:1308.3432 (straight-through).

    >>> import numpy as np, sparseattn as sa
    >>> q = np.random.default_rng(0).standard_normal((2, 100, 16), np.float32)
    >>> int(sa.plan(q, q, sa.TopK(16)).to_mask().sum(-1).max())
    16
    """

    kind: ClassVar[str] = "topk"
    aliases: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[str, ...]] = (
        "topk:16",
        "topk:1",
        "topk:16:placement=post",
        "topk:100000",
        "topk:7:gradient=straight_through",
    )
    reads_keys: ClassVar[bool] = True

    k: int
    placement: Literal["pre", "post"] = "pre"
    gradient: Literal["selected", "straight_through"] = "selected"

    def build(
        self, q: Array, k: Array, problem: Problem, params: Params | None
    ) -> tuple[Piece, ...]:
        (piece,) = Variant.build(self, q, k, problem, params)
        return (
            piece._replace(
                full_row=self.placement == "post",
                straight_through=self.gradient == "straight_through",
            ),
        )
