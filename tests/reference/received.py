"""Received mass and largest weights by their definitions, from explicit weights in float64."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def mass(weights: Array) -> Array:
    """What each key received over all rows: (..., heads, n_k)."""
    return weights.sum(-2)


def largest(weights: Array, see: Array, n: int) -> tuple[Array, Array]:
    """The n largest weights of each row over the keys it sees, equal ones by key upwards, and those
    keys; past them weight 0 and key -1. NaN stands before all numbers."""
    rows = weights.shape[:-1]
    values = np.zeros((*rows, n), weights.dtype)
    keys = np.full((*rows, n), -1, np.int64)
    for at in np.ndindex(*rows):
        seen = np.flatnonzero(see[at])
        w = weights[at][seen]
        order = np.lexsort((seen, -w, ~np.isnan(w)))[:n]
        values[at][: order.size] = w[order]
        keys[at][: order.size] = seen[order]
    return values, keys
