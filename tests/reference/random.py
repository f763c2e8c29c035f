"""k visible keys of each row, drawn uniformly without replacement."""

from __future__ import annotations

from typing import Any

import numpy as np


def check(
    kept: np.ndarray, visible: np.ndarray, scores: np.ndarray, *, k: int, **_: Any
) -> None:
    """Right counts, visible keys only; that draws are uniform and differ is tested apart."""
    assert not (kept & ~visible).any()
    np.testing.assert_array_equal(kept.sum(-1), np.minimum(k, visible.sum(-1)))
