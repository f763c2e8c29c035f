"""All visible keys."""

from __future__ import annotations

from typing import Any

import numpy as np


def check(kept: np.ndarray, visible: np.ndarray, scores: np.ndarray, **_: Any) -> None:
    np.testing.assert_array_equal(kept, visible)
