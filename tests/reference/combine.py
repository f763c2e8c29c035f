"""Union and intersection of what the parts keep."""

from __future__ import annotations

from functools import reduce

import numpy as np

JOIN = {"union": np.logical_or, "intersection": np.logical_and}


def join(kind: str, kept: list[np.ndarray]) -> np.ndarray:
    return reduce(JOIN[kind], kept)
