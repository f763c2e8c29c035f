"""Sliding window, sinks, global columns (algorithms 0.3, 3)."""

from __future__ import annotations

from typing import Any

import numpy as np


def pattern(
    n_q: int,
    n_k: int,
    left: int,
    right: int,
    sinks: int = 0,
    columns: tuple[int, ...] = (),
    offset: int = 0,
) -> np.ndarray:
    """p - left <= j <= p + right, p = i + offset; or j < sinks; or j in columns. -1: no bound."""
    i = np.arange(n_q)[:, None] + offset
    j = np.arange(n_k)[None]
    inside = np.ones((n_q, n_k), bool)
    if left >= 0:
        inside &= j >= i - left
    if right >= 0:
        inside &= j <= i + right
    return inside | (j < sinks) | np.isin(j, columns)


def check(
    kept: np.ndarray,
    visible: np.ndarray,
    scores: np.ndarray,
    *,
    size: int | None,
    window_size: tuple[int, int] | None,
    sinks: int,
    globals: tuple[int, ...],
    causal: Any,
    **_: Any,
) -> None:
    """The last query stands at the last key, but for top-left causality: the first at the first."""
    left, right = window_size if size is None else (size - 1, 0)
    n_q, n_k = visible.shape[-2:]
    offset = 0 if causal == "top_left" else n_k - n_q
    want = pattern(n_q, n_k, left, right, sinks, globals, offset)
    np.testing.assert_array_equal(kept, visible & want)
