"""A prefix that all rows see, causal after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparseattn.errors import ArgumentError
from sparseattn.variants.base import Piece, Problem, Variant, register

if TYPE_CHECKING:
    from sparseattn.variants.base import Array, Params


@register
@dataclass(frozen=True, slots=True)
class Prefix(Variant):
    """Prefix-LM: every query sees the first n keys, and all up to its own position.

    Another length a batch entry: ``sa.Plan.from_intervals``.

    Parameters
    ----------
    n : int
        Keys of the prefix; 0 is plain causality. The last query stands at the last key.

    Raises
    ------
    ArgumentError
        If it meets ``causal=True``, which would hide the keys of the prefix from rows before them.

    References
    ----------
    Raffel et al., "T5", 2020, arXiv:1910.10683, section 3.2.1; Dong et al., "Unified language model
    pre-training", 2019, arXiv:1905.03197.

    >>> import numpy as np, sparseattn as sa
    >>> x = np.ones((1, 4, 8), np.float32)
    >>> sa.plan(x, x, sa.Prefix(2)).count().kept
    11
    """

    kind: ClassVar[str] = "prefix"
    aliases: ClassVar[tuple[str, ...]] = ("prefix_lm",)
    examples: ClassVar[tuple[str, ...]] = ("prefix:128", "prefix:20", "prefix:0")

    n: int

    def build(
        self, q: Array, k: Array, problem: Problem, params: Params | None
    ) -> tuple[Piece, ...]:
        if problem.causal != 0:
            raise ArgumentError(
                f"Prefix({self.n}) is causal after its prefix by itself, and causal=True, which "
                "language models pass, would cut the prefix to causal as well: pass causal=False"
            )
        return Variant.build(self, q, k, problem, params)
