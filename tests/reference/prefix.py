"""Prefix-LM: fully visible within the prefix, causal after it (T5, figure 4, right)."""

from __future__ import annotations

from typing import Any

import numpy as np


def pattern(n_q: int, n_k: int, n: int) -> np.ndarray:
    """j < n, or j <= i + n_k - n_q: the last query stands at the last key."""
    i, j = np.arange(n_q)[:, None], np.arange(n_k)[None]
    return (j < n) | (j <= i + n_k - n_q)


def check(kept: np.ndarray, visible: np.ndarray, scores: np.ndarray, *, n: int, **_: Any) -> None:
    np.testing.assert_array_equal(kept, visible & pattern(*visible.shape[-2:], n))
