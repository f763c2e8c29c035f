"""Attention and its gradients in float64 NumPy: what the gate and the accuracy rows go by."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def weights(q: np.ndarray, k: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Softmax over the keys of the mask (batch, heads, n_q, n_k); rows that see nothing are 0."""
    s = np.where(mask, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), -np.inf)
    top = s.max(-1, keepdims=True)
    p = np.exp(s - np.where(np.isfinite(top), top, 0.0))
    total = p.sum(-1, keepdims=True)
    return np.divide(p, total, out=np.zeros_like(p), where=total > 0)


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, dout: np.ndarray
) -> tuple[np.ndarray, Arrays]:
    """The output, and the gradients of q, k, v. Shapes as sparseattn.attention takes them."""
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    p = weights(q, k, mask)
    out = p @ v
    dv = p.swapaxes(-1, -2) @ dout
    # fwd: p = softmax(s), s = scale q k^T, out = p v
    ds = p * (dout @ v.swapaxes(-1, -2) - (dout * out).sum(-1, keepdims=True))
    dk = scale * (ds.swapaxes(-1, -2) @ q)
    dk, dv = (x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(2) for x in (dk, dv))
    return out, (scale * (ds @ k), dk, dv)


def largest_error(ours: Iterable[np.ndarray], want: Iterable[np.ndarray]) -> float:
    """Largest |ours - want| over all arrays; NaN where one holds NaN."""
    return float(np.max([np.abs(x - y).max() for x, y in zip(ours, want, strict=True)]))
