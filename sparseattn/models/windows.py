"""Sliding windows that belong to a model: what its layers may see, whatever spec chooses among it.

A spec is a choice among the keys that a layer sees, so the model's own window is a mask of the
call and no part of the spec: ``topk:16`` takes the best 16 keys of the window, not those of all
keys that happen to lie in it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparseattn.models.fields import MAX_CONTEXT, Fields
from sparseattn.variants import Dense, Variant, Window


def read_window(fields: Fields, default: int) -> int | None:
    """The ``sliding_window`` of config.json, where null is none."""
    if "sliding_window" in fields.values and fields.values["sliding_window"] is None:
        return None
    return fields.integer("sliding_window", default, 1, MAX_CONTEXT)


def band(window: int | None, n_q: int, n_k: int) -> NDArray[np.bool_] | None:
    """What a window shows the last n_q rows of n_k keys, as a mask (n_q, n_k); None where all.

    A row is the one before it moved by one, so the mask is a view of n_q + n_k - 1 values. Plans
    turn it into intervals.
    """
    if window is None or n_k <= window:
        return None
    shown = np.zeros(n_q + n_k - 1, bool)
    shown[n_k - window :] = True
    return np.lib.stride_tricks.sliding_window_view(shown, n_k)[::-1]


def cached(spec: Variant, window: int | None) -> Variant:
    """The spec of a layer's cache: all of a window is a window, whose cache forgets."""
    return Window(window) if window is not None and isinstance(spec, Dense) else spec


def stays_inside(spec: Variant, window: int | None) -> bool:
    """Whether a causal spec never looks out of the window."""
    kept = spec.keep()
    return window is None or (kept is not None and kept[0] == 0 and kept[1] < window)
