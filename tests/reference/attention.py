"""Attention by its definitions in plain float64 NumPy; never optimised, nothing of the package.

``compute`` runs the same lines in another precision: the naive run that ours is compared with,
every sum term by term in order (a BLAS splits sums, which no tolerance should hang on).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def repeat_heads(x: Array, heads: int) -> Array:
    """Query head h reads kv head floor(h kv_heads / heads)."""
    return x[..., np.arange(heads) * x.shape[-3] // heads, :, :]


def product(a: Array, b: Array) -> Array:
    """a @ b, each sum term by term in the type of a."""
    total = np.zeros((*a.shape[:-1], b.shape[-1]), a.dtype)
    for c in range(a.shape[-1]):
        total += a[..., :, c, None] * b[..., None, c, :]
    return total


def scores(
    q: Array,
    k: Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
    compute: type = np.float64,
) -> Array:
    """s_ij = softcap(scale q_i.k_j) + bias_ij, shape (..., heads, n_q, n_k)."""
    q = q.astype(compute)
    k = repeat_heads(k, q.shape[-3]).astype(compute)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = compute(scale) * product(q, k.swapaxes(-1, -2))
    if softcap:
        s = compute(softcap) * np.tanh(s / compute(softcap))
    return s if bias is None else s + bias.astype(compute)


def causal_mask(n_q: int, n_k: int, align: str = "bottom_right") -> Array:
    """Query i sees key j iff j <= i + n_k - n_q (bottom-right), or j <= i (top-left)."""
    offset = n_k - n_q if align == "bottom_right" else 0
    return np.arange(n_k) <= np.arange(n_q)[:, None] + offset


def visible(
    batch: int,
    heads: int,
    n_q: int,
    n_k: int,
    *,
    causal: bool | str = False,
    mask: Array | None = None,
    key_mask: Array | None = None,
) -> Array:
    """Who may see whom before any variant chooses: (batch, heads, n_q, n_k)."""
    see = np.ones((batch, heads, n_q, n_k), bool)
    if causal:
        see &= causal_mask(n_q, n_k, "bottom_right" if causal is True else causal)
    if mask is not None:
        see &= mask
    if key_mask is not None:
        see &= key_mask[:, None, None, :]
    return see


def softmax(s: Array, see: Array) -> tuple[Array, Array]:
    """Weights and log-sum-exp over the seen keys of each row; nothing seen: zeros and -inf."""
    s = np.where(see, s, -np.inf)
    top = s.max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), s.dtype.type(0), top)
    with np.errstate(divide="ignore", invalid="ignore"):
        e = np.exp(s - top)
        total = e.sum(-1, keepdims=True)
        weights = np.where(total == 0, s.dtype.type(0), e / total)
        lse = (top + np.log(total))[..., 0]
    return weights, lse


def weights(
    q: Array,
    k: Array,
    see: Array,
    *,
    full: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
    compute: type = np.float64,
) -> Array:
    """Attention weights; ``full``: the keys of the normaliser where it is not ``see``."""
    s = scores(q, k, scale=scale, softcap=softcap, bias=bias, compute=compute)
    return np.where(see, softmax(s, see if full is None else full)[0], s.dtype.type(0))


def attention(
    q: Array,
    k: Array,
    v: Array,
    see: Array,
    *,
    full: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
    compute: type = np.float64,
) -> tuple[Array, Array]:
    """out and lse of softmax attention over the keys that ``see`` (..., heads, n_q, n_k) shows.

    ``full``: the keys of the normaliser where it is not ``see`` (selection after the softmax,
    algorithms 4.1); lse is then the full row's.
    """
    terms = {"scale": scale, "softcap": softcap, "bias": bias, "compute": compute}
    w, lse = softmax(scores(q, k, **terms), see if full is None else full)
    w = np.where(see, w, w.dtype.type(0))
    v = repeat_heads(v, q.shape[-3]).astype(compute)
    # An unseen value counts nothing, whatever it holds: 0 * NaN is not 0.
    used = see.any(-2)
    v = np.where(used[..., None], v, v.dtype.type(0))
    return product(w, v), lse


def merge(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """L = logsumexp_a L_a, o = sum_a exp(L_a - L) o_a over disjoint key sets (algorithms 0.8)."""
    outs = np.stack([np.asarray(out, np.float64) for out, _ in parts])
    lses = np.stack([np.asarray(lse, np.float64) for _, lse in parts], -1)
    weights, lse = softmax(lses, np.True_)
    return np.einsum("...a,a...d->...d", weights, outs), lse
