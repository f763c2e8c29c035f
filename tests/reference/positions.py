"""Rotary frequencies in plain float64, one pair of channels at a time.

`scaling` is the checkpoint's ``rope_scaling`` or ``rope_parameters`` as a dictionary, `context` its
``max_position_embeddings``. Su et al. 2021 (default), Chen et al. 2023 (linear), bloc97 2023
(dynamic NTK), Peng et al. 2023 (YaRN), the reference code of Llama 3.1 (llama3).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def frequencies(
    scaling: dict[str, Any], theta: float, dim: int, context: int, length: int = 0
) -> np.ndarray:
    """Radians a token of every pair of the first `dim` channels, for a text of `length` tokens."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    original = scaling.get("original_max_position_embeddings") or context
    factor = scaling.get("factor")
    if kind == "yarn" and factor is None:
        factor = context / original
    result = []
    for t in range((dim + 1) // 2):
        base = theta
        if kind == "dynamic" and length > context:
            base = theta * (factor * length / context - (factor - 1)) ** (dim / (dim - 2))
        w = 1.0 / base ** (2 * t / dim)
        if kind == "linear":
            w /= factor
        if kind == "yarn":
            w = yarn(w, t, scaling, theta, dim, original, factor)
        if kind == "llama3":
            w = llama3(w, scaling, original)
        result.append(w)
    return np.array(result)


def yarn(
    w: float, t: int, scaling: dict[str, Any], theta: float, dim: int, original: int, factor: float
) -> float:
    """Which pair makes r turns in the original context: 2 pi r theta^(2t / dim) = original."""

    def pair(turns: float) -> float:
        return dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = pair(scaling.get("beta_fast", 32)), pair(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high = low + 0.001
    ramp = min(max((t - low) / (high - low), 0.0), 1.0)
    return w * (1 - ramp) + w / factor * ramp


def llama3(w: float, scaling: dict[str, Any], original: int) -> float:
    """Three ranges of wavelengths, as the reference code writes them."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / w
    if wavelength < original / high:
        return w
    if wavelength > original / low:
        return w / scaling["factor"]
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * w / scaling["factor"] + smooth * w


def attention(scaling: dict[str, Any], context: int) -> float:
    """What queries and keys are multiplied by: YaRN's sqrt(1 / t)."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    original = scaling.get("original_max_position_embeddings") or context
    log = math.log(scaling.get("factor") or context / original)
    mscale, whole = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and whole:
        return (0.1 * mscale * log + 1) / (0.1 * whole * log + 1)
    return 0.1 * log + 1
