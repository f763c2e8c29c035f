"""Live blocks of a layout (algorithms 1.5)."""

from __future__ import annotations

from typing import Any

import numpy as np


def check(
    kept: np.ndarray,
    visible: np.ndarray,
    scores: np.ndarray,
    *,
    block: int,
    params: dict[str, np.ndarray],
    **_: Any,
) -> None:
    n_q, n_k = visible.shape[-2:]
    layout = params["layout"]
    live = layout.repeat(block, -2).repeat(block, -1)[..., :n_q, :n_k]
    np.testing.assert_array_equal(kept, visible & live)
