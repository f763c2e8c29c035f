"""Joining attention outputs over disjoint key sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparseattn import _core
from sparseattn.attention import OutLse
from sparseattn.errors import ArgumentError
from sparseattn.inputs import collapse, is_torch, make_operands, read_alike, to_real

__all__ = ["merge"]


def merge(parts: Sequence[Any]) -> OutLse:
    """Join attention outputs over disjoint key sets as if over all keys at once.

    ``L = logsumexp_a L_a``, ``out = sum_a exp(L_a - L) out_a`` (algorithms 0.8); parts that are
    ``-inf`` everywhere add nothing.

    Parameters
    ----------
    parts : list of (out, lse)
        out (..., heads, n_q, dim_v), lse (..., heads, n_q) in natural units, of one shape and
        dtype; results of ``attention(..., return_lse=True)`` or of ``merge``.

    Returns
    -------
    OutLse
        NamedTuple of ``out`` and ``lse``.

    Raises
    ------
    ArgumentError, DtypeError
        If there is no part, or shapes or dtypes differ.

    References
    ----------
    Dao, "FlashAttention-2", 2023, arXiv:2307.08691 (split keys); Milakov and Gimelshein, 2018.

    >>> import numpy as np, sparseattn as sa
    >>> x = np.random.default_rng(0).standard_normal((2, 9, 4))
    >>> ab = [sa.attention(x, x[:, s], x[:, s], return_lse=True) for s in np.s_[:5, 5:]]
    >>> bool(np.allclose(sa.merge(ab).out, sa.attention(x, x, x)))
    True
    """
    pairs = [tuple(part) for part in parts]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ArgumentError(f"merge takes a list of (out, lse), got {len(pairs)} parts not so made")
    given = {f"parts[{i}][0]": pair[0] for i, pair in enumerate(pairs)}
    outs, stored = read_alike(given, "(..., heads, n_q, dim_v)")
    lses = [to_real(f"parts[{i}][1]", pair[1])[0] for i, pair in enumerate(pairs)]
    shape = outs[0].shape
    for i, (o, lse) in enumerate(zip(outs, lses, strict=True)):
        if o.shape != shape or lse.shape != shape[:-1]:
            raise ArgumentError(
                f"parts[{i}] has shapes {o.shape} and {lse.shape}: "
                f"all must have {shape} and {shape[:-1]}"
            )
    ops = make_operands([outs[0]] * 3, ("parts", "parts", "parts"), stored, is_torch(pairs[0][0]))
    out, lse = np.empty(ops.q.shape, ops.q.dtype), np.empty(ops.q.shape[:3], ops.real)
    lead = ops.lead
    flat_outs = tuple(collapse(o, lead) for o in outs)
    flat_lses = tuple(np.ascontiguousarray(x, dtype=lse.dtype).reshape(lse.shape) for x in lses)
    _core.merge(flat_outs, flat_lses, out, lse)
    return OutLse(ops.give(out, stored=True), ops.give(lse))
