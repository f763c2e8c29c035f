"""Attention over a cache: append, then attend to what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparseattn.attention import Eager, OutLse
from sparseattn.cache import Cache, refuse_gradients
from sparseattn.errors import ArgumentError, NotSupported
from sparseattn.half import store, widen
from sparseattn.inputs import (
    Operands,
    check_params,
    make_target,
    read_causal,
    read_operands,
    read_problem,
    sink_of,
    to_array,
)
from sparseattn.kept import columns
from sparseattn.variants.base import PAST

if TYPE_CHECKING:
    from sparseattn.variants.base import Array


def attend_cached(
    cache: Any,
    q: Any,
    k: Any,
    v: Any,
    spec: Any,
    *,
    params: Any = None,
    causal: Any = False,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    return_lse: bool = False,
    out: Any = None,
    dropout_p: Any = 0.0,
    cu_seqlens: Any = None,
    return_weights: Any = False,
    **terms: Any,
) -> Any:
    """``attention(..., cache=cache)``; ``terms`` are ``scale`` and ``softcap``."""
    if not isinstance(cache, Cache):
        raise ArgumentError(f"cache must be a sa.Cache, got {type(cache).__name__}")
    cache.accept(spec)
    refuse_others(dropout_p, cu_seqlens, return_weights)
    refuse_gradients(q=q, k=k, v=v, bias=bias, sink=sink_of(params))
    check_causal(cache, causal)
    ops = read_operands(q, k, v)
    with cache.alone:
        staged = cache.stage(ops.k, ops.v, ops.stored, key_mask, ops.lead)
        n_q, total = ops.q.shape[2], staged.held.total
        low = cache.reach(staged, n_q)
        kept = Operands(
            ops.q, staged.k[:, :, low:], staged.v[:, :, low:], ops.lead, ops.stored, ops.torch
        )
        first = staged.start + low
        mask, bias = (
            None if x is None else cut(name, x, cache.policy.pinned, first, total)
            for name, x in (("mask", mask), ("bias", bias))
        )
        problem = read_problem(kept, causal=causal, mask=mask, bias=bias, params=params, **terms)
        if staged.there is not None:
            problem = problem._replace(key_mask=staged.there[:, low:])
        target = make_target(out, kept, problem)
        taken = check_params(params, cache.spec.arrays, cache.spec)
        if cache.spec.arrays:
            taken = {**(taken or {}), PAST: total - n_q}
        eager = Eager(kept, problem, target.array, return_lse)
        result, lse = cache.spec.apply(eager, kept.q, kept.k, kept.v, taken)
        if result is not target.array:
            store(target.array, result)
        given = target.finish(kept)
        cache.commit(staged)
    return OutLse(given, kept.give(lse)) if return_lse else given


def check_causal(cache: Cache, causal: Any) -> None:
    align = 1 if causal is True else read_causal(causal)
    if align == 2:
        raise ArgumentError(
            f"causal={causal!r} counts rows from the first key, and with a cache the queries stand "
            "at the last: pass causal=True"
        )
    if align == 0 and cache.policy.left is not None:
        raise ArgumentError(
            f"causal=False may show any key, and a cache of {cache.spec} forgets keys: "
            "pass causal=True"
        )


def refuse_others(dropout_p: Any, cu_seqlens: Any, return_weights: Any) -> None:
    if dropout_p != 0:
        raise ArgumentError(f"dropout_p is for training and a cache is not, got {dropout_p!r:.80}")
    if cu_seqlens is not None:
        raise ArgumentError(
            "cu_seqlens packs whole sequences and a cache grows a batch of them: pad them and "
            "pass key_mask="
        )
    if return_weights:
        raise NotSupported(
            "return_weights comes in a later version with a cache: pass all keys and values so far "
            "as k and v"
        )


def cut(name: str, x: Any, pinned: int, first: int, total: int) -> Array:
    """The columns of the kept keys, of an array for all ``total`` keys or for one column."""
    array, stored = to_array(name, x)
    if stored == "bfloat16":  # whose bits would go without their name
        array = widen(array)
    if array.ndim == 0 or array.shape[-1] == 1 != total:
        return array
    if array.shape[-1] != total:
        raise ArgumentError(
            f"{name} must have one column or {total}, one a token so far, got shape {array.shape}"
        )
    return columns(array, pinned, first)
