"""The largest of a row by sorting: NaN first, ties by index; -inf is no candidate."""

from __future__ import annotations

import numpy as np


def largest(s: np.ndarray, count: int) -> np.ndarray:
    candidates = np.flatnonzero(~np.isneginf(s))
    values = s[candidates]
    keys = np.where(np.isnan(values), 0.0, values)
    order = np.lexsort((candidates, -keys, ~np.isnan(values)))
    return np.sort(candidates[order[:count]])
