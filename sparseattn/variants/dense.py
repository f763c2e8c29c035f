"""All visible keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparseattn.variants.base import Variant, register


@register
@dataclass(frozen=True, slots=True)
class Dense(Variant):
    """Every visible key: exact softmax attention, what all others are compared with.

    References
    ----------
    Vaswani et al., "Attention is all you need", 2017, arXiv:1706.03762; computed online as in
    Milakov and Gimelshein, 2018, arXiv:1805.02867.

    >>> import sparseattn as sa
    >>> str(sa.Dense())
    'dense'
    """

    kind: ClassVar[str] = "dense"
    aliases: ClassVar[tuple[str, ...]] = ("full", "softmax", "tree-less")
    examples: ClassVar[tuple[str, ...]] = ("dense",)
