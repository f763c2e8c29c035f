"""Keys drawn at random: the floor that a selector must beat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from sparseattn.variants.base import Variant, register

SEEDS = 2**53  # one more than the largest seed
STEP = 2654435761 * 4099  # odd and large: heads of neighbouring seeds do not meet


@register
@dataclass(frozen=True, slots=True)
class RandomKeys(Variant):
    """Each query row keeps k visible keys drawn uniformly without replacement: the floor.

    Parameters
    ----------
    k : int
        Keys kept; rows with at most ``k`` visible keys stay dense.
    seed : int
        Same seed, same keys, for any number of threads; draws differ by row, head and batch.

    References
    ----------
    Zaheer et al., "Big Bird", 2020, arXiv:2007.14062 (random attention).

    >>> import sparseattn as sa
    >>> str(sa.RandomKeys(16, seed=3))
    'random:16:seed=3'
    """

    kind: ClassVar[str] = "random"
    aliases: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[str, ...]] = ("random:16", "random:1:seed=7", "random:100000")

    k: int
    seed: int = 0

    def for_head(self, head: int) -> Variant:
        return replace(self, seed=(self.seed + head * STEP) % SEEDS)
