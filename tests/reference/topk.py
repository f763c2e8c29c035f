"""The k best-scoring visible keys of each row, ties to the lower key (algorithms 4.1)."""

from __future__ import annotations

from typing import Any

import numpy as np


def select(scores: np.ndarray, visible: np.ndarray, k: int) -> np.ndarray:
    """Exactly, by a stable sort of each row; -inf scores are as good as unseen."""
    kept = np.zeros(visible.shape, bool)
    for at in np.ndindex(visible.shape[:-1]):
        keys = np.flatnonzero(visible[at] & ~np.isneginf(scores[at]))
        best = keys[np.argsort(-scores[at][keys], kind="stable")][:k]
        kept[at][best] = True
    return kept


def check(
    kept: np.ndarray,
    visible: np.ndarray,
    scores: np.ndarray,
    *,
    k: int,
    eps: float = 0.0,
    **_: Any,
) -> None:
    """Right counts, visible keys only, and nothing dropped beats anything kept.

    Near ties may fall either way: ``eps`` is the rounding of one score, relative to the largest.
    """
    assert not (kept & ~visible).any()
    np.testing.assert_array_equal(kept.sum(-1), np.minimum(k, visible.sum(-1)))
    worst_kept = np.where(kept, scores, np.inf).min(-1, initial=np.inf)
    best_dropped = np.where(visible & ~kept, scores, -np.inf).max(-1, initial=-np.inf)
    slack = eps * np.abs(scores).max(initial=0)
    assert (worst_kept >= best_dropped - slack).all()
