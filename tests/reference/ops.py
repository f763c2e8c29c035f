"""Operators of models by their definitions in plain NumPy; never optimised, nothing of the package.

``compute`` runs the same lines in another precision: the naive run that ours is compared with.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def linear(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    transposed: bool = False,
    compute: type = np.float64,
) -> Array:
    """x w + bias, or x w^T + bias."""
    w = w.astype(compute)
    y = x.astype(compute) @ (w.T if transposed else w)
    return y if bias is None else y + bias.astype(compute)


def rms_norm(x: Array, weight: Array, eps: float, *, compute: type = np.float64) -> Array:
    """x weight / sqrt(mean(x^2) + eps) [Zhang, Sennrich 2019]."""
    x = x.astype(compute)
    scale = np.sqrt((x * x).mean(-1, keepdims=True) + compute(eps))
    return x / scale * weight.astype(compute)


def layer_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    *,
    compute: type = np.float64,
) -> Array:
    """(x - mean) / sqrt(var + eps) weight + bias [Ba, Kiros, Hinton 2016]."""
    x = x.astype(compute)
    d = x - x.mean(-1, keepdims=True)
    y = d / np.sqrt((d * d).mean(-1, keepdims=True) + compute(eps))
    if weight is not None:
        y = y * weight.astype(compute)
    return y if bias is None else y + bias.astype(compute)


def activate(kind: str, x: Array, gate: Array | None = None) -> Array:
    """The exact function in float64; the normal distribution's tail by erfc, which keeps it."""
    x = x.astype(np.float64)
    with np.errstate(over="ignore"):
        if kind == "gelu":
            y = x * 0.5 * np.vectorize(math.erfc, otypes=[float])(-x / math.sqrt(2))
        elif kind == "gelu_tanh":  # x (1 + tanh u) / 2 without its cancellation
            y = x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        elif kind == "silu":
            y = x / (1 + np.exp(-x))
        else:
            y = np.where(x < 0, 0, x)
    return y if gate is None else y * gate.astype(np.float64)


def rope(x: Array, cos: Array, sin: Array, pos: Array) -> Array:
    """Channels c and c + half of x (rows, heads, dim) turn by the angle of (pos[row], c)."""
    x = x.astype(np.float64)
    half = cos.shape[1]
    c, s = (t.astype(np.float64)[pos][:, None] for t in (cos, sin))
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * c - b * s, b * c + a * s, x[..., 2 * half :]], -1)


def log_softmax(x: Array) -> Array:
    """In long double, so that tiny divergences are known to many digits."""
    x = x.astype(np.longdouble)
    d = x - x.max(-1, keepdims=True)
    return d - np.log(np.exp(d).sum(-1, keepdims=True))


def nll(logits: Array, target: Array) -> Array:
    """-log softmax(row)[target]."""
    return -log_softmax(logits)[np.arange(len(target)), target]


def kl(base: Array, other: Array) -> Array:
    """sum_v p (log p - log q); p = 0 adds nothing."""
    log_p, log_q = log_softmax(base), log_softmax(other)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        return np.where(p == 0, 0, p * (log_p - log_q)).sum(-1)


def widen(src: Array, kind: str) -> Array:
    """Bit patterns of half precision as float32."""
    if kind == "f16":
        return src.view(np.float16).astype(np.float32)
    return (src.astype(np.uint32) << 16).view(np.float32)


def narrow(src: Array, kind: str) -> Array:
    """Bit patterns of float32 values, NaN apart, rounded to the nearest half, ties to even."""
    if kind == "f16":
        with np.errstate(over="ignore"):
            return src.astype(np.float16).view(np.uint16)
    # A bfloat16 is a float32 without its lower 16 bits; what is above the largest goes to infinity.
    bits = src.view(np.uint32).astype(np.uint64)
    low, kept = bits & 0xFFFF, bits >> 16
    up = (low > 0x8000) | ((low == 0x8000) & (kept & 1 == 1))
    return (kept + up).astype(np.uint16)
