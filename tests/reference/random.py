"""k visible keys of each row, drawn uniformly without replacement.

Floyd's algorithm over the ranks of the visible keys; draw d of a row is Philox4x64-10 with key
(seed, 1) at counter (d, row, head, batch), brought below n by Lemire's method (arXiv:1805.10941).
With bottom-right causality rows count from the first key.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ROWS = 40  # rows redrawn in full; NumPy makes a generator a draw


def below(n: int, seed: int, draw: int, row: int, head: int, batch: int) -> int:
    words = np.random.Philox(key=[seed, 1], counter=[draw, row, head, batch]).random_raw(4)
    for word in map(int, words):
        high, low = divmod(word * n, 1 << 64)
        if low >= (1 << 64) % n:
            break
    return high


def ranks(n: int, k: int, seed: int, row: int, head: int, batch: int) -> set[int]:
    chosen: set[int] = set()
    for draw, top in enumerate(range(n - k, n)):
        key = below(top + 1, seed, draw, row, head, batch)
        chosen.add(top if key in chosen else key)
    return chosen


def check(
    kept: np.ndarray,
    visible: np.ndarray,
    scores: np.ndarray,
    *,
    k: int,
    seed: int,
    causal: Any,
    **_: Any,
) -> None:
    assert not (kept & ~visible).any()
    np.testing.assert_array_equal(kept.sum(-1), np.minimum(k, visible.sum(-1)))
    n_q, n_k = kept.shape[-2:]
    rng = np.random.default_rng(0)
    for _ in range(ROWS):
        b, h, i = (int(rng.integers(size)) for size in kept.shape[:3])
        keys = np.flatnonzero(visible[b, h, i])
        if keys.size > k:
            row = i + n_k - n_q if causal is True else i
            if row >= 0:
                want = keys[sorted(ranks(keys.size, k, seed, row, h, b))]
                np.testing.assert_array_equal(np.flatnonzero(kept[b, h, i]), want)
