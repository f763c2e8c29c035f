"""Joining attention outputs over disjoint key sets, and the gradient of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparseattn import _core
from sparseattn.attention import OutLse
from sparseattn.errors import ArgumentError, door
from sparseattn.gradients import Like, like, read_gradients
from sparseattn.inputs import (
    Operands,
    collapse,
    empty,
    is_torch,
    make_operands,
    needs_grad,
    read_alike,
    to_array,
    to_real,
)

if TYPE_CHECKING:
    from sparseattn.variants.base import Array

__all__ = ["merge", "merge_vjp"]


@door
def merge(parts: Sequence[Any]) -> OutLse:
    """Join attention outputs over disjoint key sets as if over all keys at once.

    ``L = logsumexp_a L_a``, ``out = sum_a exp(L_a - L) out_a``; parts that are ``-inf`` everywhere
    add nothing.

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
    taken = read_parts(parts)
    if needs_grad(*taken.given):
        return OutLse(*record_merge(taken))
    out, lse = join(taken)
    return OutLse(taken.ops.give(out, stored=True), taken.ops.give(lse))


@door
def merge_vjp(parts: Sequence[Any]) -> MergeVJP:
    """``merge`` and its vector-Jacobian product.

    ``dout_a = w_a dout``, ``dlse_a = w_a (<dout, out_a - out> + dlse)`` with
    ``w_a = exp(lse_a - lse)``; parts that are ``-inf`` get 0.

    Parameters
    ----------
    parts : list of (out, lse)
        As in :func:`merge`. The arrays are read again by the pullback: leave them unchanged until
        its last call.

    Returns
    -------
    MergeVJP
        NamedTuple of ``out``, ``lse`` and ``pullback(dout, dlse=None)``, which gives a list of
        (dout_a, dlse_a), one a part, in the shapes and dtypes of the parts.

    Raises
    ------
    ArgumentError, DtypeError
        As :func:`merge`; the pullback if a gradient has another shape or dtype than what it
        belongs to.

    References
    ----------
    Dao, "FlashAttention-2", 2023, arXiv:2307.08691.

    >>> import numpy as np, sparseattn as sa
    >>> x = np.random.default_rng(0).standard_normal((2, 9, 4))
    >>> ab = [sa.attention(x, x[:, s], x[:, s], return_lse=True) for s in np.s_[:5, 5:]]
    >>> [dout.shape for dout, dlse in sa.merge_vjp(ab).pullback(x)]
    [(2, 9, 4), (2, 9, 4)]
    """
    taken = read_parts(parts)
    out, lse = join(taken)

    @door
    def pullback(dout: Any, dlse: Any = None) -> list[tuple[Any, Any]]:
        grads = split(taken, out, lse, *read_gradients(taken.ops, dout, dlse))
        pairs = iter(give(taken, grads))
        return list(zip(pairs, pairs, strict=True))

    return MergeVJP(taken.ops.give(out, stored=True), taken.ops.give(lse), pullback)


class MergeVJP(NamedTuple):
    """Output and log-sum-exp of a merge, and the function from their gradients to its parts'."""

    out: Any
    lse: Any
    pullback: Callable[..., list[tuple[Any, Any]]]


class Parts(NamedTuple):
    """Parts that have passed the door."""

    given: tuple[Any, ...]  # out_0, lse_0, out_1, ... as the caller has them
    likes: tuple[Like, ...]
    ops: Operands  # the first part's out, three times
    outs: tuple[Array, ...]  # (batch, heads, n_q, dim_v)
    lses: tuple[Array, ...]  # (batch, heads, n_q) in the real type


def read_parts(parts: Sequence[Any]) -> Parts:
    listed = isinstance(parts, list | tuple) and not hasattr(parts, "lse")
    if not listed or not parts:
        got = "0 parts" if listed else type(parts).__name__
        raise ArgumentError(f"parts must be a list, got {got}: pass [(out, lse), (out, lse)]")
    pairs = [read_pair(f"parts[{i}]", part) for i, part in enumerate(parts)]
    check_shapes(pairs)
    given = {f"parts[{i}][0]": pair[0] for i, pair in enumerate(pairs)}
    outs, stored = read_alike(given, "(..., heads, n_q, dim_v)")
    lses = [to_real(f"parts[{i}][1]", pair[1])[0] for i, pair in enumerate(pairs)]
    ops = make_operands([outs[0]] * 3, ("parts", "parts", "parts"), stored, is_torch(pairs[0][0]))
    flat = tuple(x for pair in pairs for x in pair)
    return Parts(
        flat,
        tuple(like("parts", x) for x in flat),
        ops,
        tuple(collapse(o, ops.lead) for o in outs),
        tuple(np.ascontiguousarray(x, dtype=ops.real).reshape(ops.q.shape[:3]) for x in lses),
    )


def check_shapes(pairs: list[tuple[Any, Any]]) -> None:
    """One shape for all, known before anything is copied."""
    shapes = [
        tuple(to_array(f"parts[{i}][{at}]", x)[0].shape for at, x in enumerate(pair))
        for i, pair in enumerate(pairs)
    ]
    first = shapes[0][0]
    for i, (out, lse) in enumerate(shapes):
        if out != first or lse != first[:-1]:
            raise ArgumentError(
                f"parts[{i}] has shapes {out} and {lse}: all must have {first} and {first[:-1]}"
            )


def read_pair(name: str, part: Any) -> tuple[Any, Any]:
    """out and lse of a pair, or of what attention() gave."""
    pair = (part.out, part.lse) if hasattr(part, "lse") else part
    if not isinstance(pair, list | tuple) or len(pair) != 2 or pair[1] is None:
        raise ArgumentError(
            f"{name} must be (out, lse), got {type(part).__name__}: pass what "
            "attention(..., return_lse=True) gives"
        )
    return pair[0], pair[1]


def join(parts: Parts) -> tuple[Array, Array]:
    like_out = parts.ops.q
    out = empty("the output", like_out.shape, like_out.dtype)
    lse = np.empty(like_out.shape[:3], parts.ops.real)
    _core.merge(parts.outs, parts.lses, out, lse)
    return out, lse


def split(
    parts: Parts, out: Array, lse: Array, dout: Array | None, dlse: Array | None
) -> list[Array]:
    """dout_0, dlse_0, dout_1, ..."""
    grads = []
    for out_a, lse_a in zip(parts.outs, parts.lses, strict=True):
        grads += [empty("dout", out.shape, out.dtype), np.empty_like(lse)]
        _core.merge_grad(out_a, lse_a, out, lse, dout, dlse, *grads[-2:])
    return grads


def give(parts: Parts, grads: list[Array]) -> list[Any]:
    return [kind.give(x, parts.ops.lead) for kind, x in zip(parts.likes, grads, strict=True)]


def record_merge(parts: Parts) -> Any:
    """out and lse of tensors, as nodes of PyTorch's graph."""
    from sparseattn.integrations.torch import record

    def run() -> Any:
        out, lse = join(parts)
        return (parts.ops.give(out, stored=True), parts.ops.give(lse)), pull_merge

    tensors = parts.given
    if not all(map(is_torch, tensors)):
        raise ArgumentError(
            "some of parts are tensors and others are not: convert those to tensors"
        )
    return record(run, *tensors)


def pull_merge(inputs: Any, outputs: Any, grads: Any, wanted: Any) -> Any:
    parts = read_parts(list(zip(inputs[::2], inputs[1::2], strict=True)))
    out, lse = outputs
    shape = parts.ops.q.shape
    out, lse = to_array("out", out)[0].reshape(shape), to_array("lse", lse)[0].reshape(shape[:3])
    found = give(parts, split(parts, out, lse, *read_gradients(parts.ops, *grads)))
    return [x if want else None for x, want in zip(found, wanted, strict=True)]
