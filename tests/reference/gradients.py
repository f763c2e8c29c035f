"""Gradients of attention by their definitions in plain float64 NumPy (algorithms 1.3, 0.8, 0.9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from reference.attention import Array, merge, product, repeat_heads, scores, softmax

TAG = 0x64726F70  # of dropout among the uses of the generator


class Gradients(NamedTuple):
    dq: Array
    dk: Array
    dv: Array
    dbias: Array | None
    dsink: Array | None


def keep_weights(seed: int, dropout_p: float, shape: tuple[int, ...], head: int = 0) -> Array:
    """0 or 1 / (1 - p) for each weight of (batch, heads, n_q, n_k).

    Weight j of row (b, h, i) is dropped where number j % 8 of the eight 32-bit halves, the lower
    first, of Philox4x64-10 with key (seed, TAG) at counter (j // 8, i, h, b) is below p 2^32.
    """
    batch, heads, n_q, n_k = shape
    keep = np.zeros(shape)
    for b, h, i in np.ndindex(batch, heads, n_q):
        row = np.random.Philox(key=[seed, TAG], counter=[0, i, h + head, b])
        words = row.random_raw(4 * (-(-n_k // 8)))
        halves = np.stack([words & 0xFFFFFFFF, words >> 32], -1).reshape(-1)[:n_k]
        keep[b, h, i] = (halves >= dropout_p * 2**32) / (1 - dropout_p)
    return keep


def weights_of(
    q: Array,
    k: Array,
    rows: Array,
    *,
    sink: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
    compute: type = np.float64,
) -> tuple[Array, Array | None, Array]:
    """p = exp(s - lse) over the keys of ``rows``, that of the sink, lse."""
    s = scores(q, k, scale=scale, softcap=softcap, bias=bias, compute=compute)
    if sink is not None:  # one more key that all rows see
        column = np.broadcast_to(sink.astype(compute)[:, None, None], (*s.shape[:-1], 1))
        s = np.concatenate([s, column], -1)
        rows = np.concatenate([rows, np.ones((*rows.shape[:-1], 1), bool)], -1)
    _, lse = softmax(s, rows)
    p = np.exp(np.where(rows, s, -np.inf) - np.where(np.isneginf(lse), 0, lse)[..., None])
    return (p, None, lse) if sink is None else (p[..., :-1], p[..., -1], lse)


def attend(
    q: Array,
    k: Array,
    v: Array,
    see: Array,
    *,
    full: Array | None = None,
    keep: Array | None = None,
    compute: type = np.float64,
    **terms: object,
) -> tuple[Array, Array]:
    """out and lse; ``full``: the keys of the normaliser where it is not ``see``."""
    p, _, lse = weights_of(q, k, see if full is None else full, compute=compute, **terms)
    p = np.where(see, p, p.dtype.type(0))
    p = p if keep is None else p * keep.astype(compute)
    return product(p, repeat_heads(v, q.shape[-3]).astype(compute)), lse


def gradients(
    q: Array,
    k: Array,
    v: Array,
    see: Array,
    dout: Array,
    dlse: Array | None = None,
    *,
    full: Array | None = None,
    keep: Array | None = None,
    sink: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
    compute: type = np.float64,
) -> Gradients:
    """What (dout, dlse) become at the inputs of :func:`attend`, plans held fixed."""
    terms = {"sink": sink, "scale": scale, "softcap": softcap, "bias": bias, "compute": compute}
    out, _ = attend(q, k, v, see, full=full, keep=keep, **terms)
    p, p_sink, _ = weights_of(q, k, see if full is None else full, **terms)
    kept = np.where(see, p if keep is None else p * keep.astype(compute), 0)
    heads, kv_heads = q.shape[-3], k.shape[-3]
    kh, vh = (repeat_heads(x, heads).astype(compute) for x in (k, v))
    scale = compute(q.shape[-1] ** -0.5 if scale is None else scale)
    dout = dout.astype(compute)
    delta = (dout * out).sum(-1) - (0 if dlse is None else dlse.astype(compute))
    # fwd: out = (p keep) v, summed over seen keys
    dv = product(kept.swapaxes(-1, -2), dout)
    dp = product(dout, vh.swapaxes(-1, -2))
    dp = np.where(see, dp if keep is None else dp * keep.astype(compute), 0)
    # fwd: p = exp(s - lse), out and lse both of them functions of every s of the normaliser
    ds = p * (dp - delta[..., None])
    dbias = None if bias is None else reduce_to(ds, bias.shape)
    if softcap:  # fwd: s = c tanh(x / c)
        x = scale * product(q.astype(compute), kh.swapaxes(-1, -2))
        ds = ds * (1 - np.tanh(x / compute(softcap)) ** 2)
    # fwd: x = scale q.k
    dq = scale * product(ds, kh)
    dk = scale * product(ds.swapaxes(-1, -2), q.astype(compute))
    dsink = None if p_sink is None else -(p_sink * delta).sum((0, 2))
    group = (*dk.shape[:-3], kv_heads, heads // kv_heads)
    dk, dv = (x.reshape(*group, *x.shape[-2:]).sum(-3) for x in (dk, dv))
    return Gradients(dq, dk, dv, dbias, dsink)


def reduce_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over what was broadcast from ``shape``."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    axes = tuple(i for i, size in enumerate(shape) if size == 1)
    return x.sum(axes, keepdims=True)


def merge_gradients(
    parts: Sequence[tuple[Array, Array]], dout: Array, dlse: Array
) -> list[tuple[Array, Array]]:
    """w_a = exp(L_a - L): dout_a = w_a dout, dL_a = w_a (<dout, out_a - out> + dlse)."""
    out, lse = merge(parts)
    gradients = []
    for out_a, lse_a in parts:
        with np.errstate(invalid="ignore"):
            w = np.where(np.isneginf(lse_a), 0.0, np.exp(lse_a - lse))
        gradients.append((w[..., None] * dout, w * ((dout * (out_a - out)).sum(-1) + dlse)))
    return gradients
