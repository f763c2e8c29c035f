"""Choosing the next token by its definition, in float64: temperature, top-k, top-p, a number."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def probabilities(logits: Array, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Array:
    """What tokens are drawn with; 0 for those cut off.

    The order is that of Hugging Face's processors: temperature, the k largest logits and all that
    equal the last of them, then the likeliest whose sum before them is below p.
    """
    x = logits.astype(np.float64) / temperature
    if 0 < top_k < x.size:
        x = np.where(x >= np.sort(x)[-top_k], x, -np.inf)
    p = np.exp(x - x.max())
    p /= p.sum()
    if top_p < 1:
        order = falling(p)
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
        p /= p.sum()
    return p


def falling(p: Array) -> Array:
    """Indices from the likeliest on, the lower of equals first."""
    return np.argsort(-p, kind="stable")


def draw(p: Array, u: float, in_order: bool) -> tuple[int, float]:
    """The token that u points to, and how far u is from where another one would begin."""
    order = np.arange(p.size) if in_order else falling(p)
    ends = np.cumsum(p[order])
    at = int(np.searchsorted(ends, u * ends[-1], side="right"))
    at = min(at, np.flatnonzero(p[order])[-1])
    return int(order[at]), float(np.abs(ends - u * ends[-1]).min())
