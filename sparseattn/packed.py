"""Packed sequences: several on one length axis, each with a plan of its own (``cu_seqlens``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparseattn import _core
from sparseattn.errors import ArgumentError, DtypeError
from sparseattn.inputs import MOST_ENTRIES, cast, enough_memory, to_array
from sparseattn.variants.base import Piece, Problem, Variant

if TYPE_CHECKING:
    from sparseattn.variants.base import Array, Params


def read_cu_seqlens(cu_seqlens: Any, n_q: int, n_k: int) -> tuple[Array, Array]:
    """Offsets of the queries and of the keys of each sequence, checked: int64 copies (n + 1,)."""
    given = cu_seqlens
    if isinstance(given, tuple | list) and len(given) == 2 and all(map(is_row, given)):
        cu_q = read_offsets("cu_seqlens[0]", given[0], "n_q", n_q)
        cu_k = read_offsets("cu_seqlens[1]", given[1], "n_k", n_k)
        if cu_q.size != cu_k.size:
            raise ArgumentError(
                f"cu_seqlens has {cu_q.size} offsets of queries and {cu_k.size} of keys: give as "
                "many of both"
            )
        return cu_q, cu_k
    if n_q != n_k:
        raise ArgumentError(
            f"cu_seqlens must be a pair (cu_q, cu_k) where queries and keys differ in length, got "
            f"one for n_q = {n_q} and n_k = {n_k}"
        )
    offsets = read_offsets("cu_seqlens", given, "the length", n_q)
    return offsets, offsets


def is_row(x: Any) -> bool:
    return isinstance(x, tuple | list) or getattr(x, "ndim", 0) > 0


def read_ints(name: str, given: Any) -> Array:
    """A private int64 copy of an array of integers."""
    array, stored = to_array(name, given)
    if array.dtype.kind not in "iu" and array.size:
        raise DtypeError(
            f"{name} has dtype {stored}, not integers: pass {cast(name, given, 'np.int64', 'long')}"
        )
    if array.size > MOST_ENTRIES:
        raise ArgumentError(f"{name} must have at most {MOST_ENTRIES} entries, got {array.shape}")
    with enough_memory(f"a copy of {name}", array.shape, np.int64):
        return array.astype(np.int64)


def read_offsets(name: str, given: Any, axis: str, length: int) -> Array:
    offsets = read_ints(name, given)
    if offsets.ndim != 1 or offsets.size == 0:
        raise ArgumentError(
            f"{name} must be where each sequence begins, then the length: shape (sequences + 1,), "
            f"got shape {offsets.shape}"
        )
    if offsets[0] != 0:
        raise ArgumentError(
            f"{name} must start at 0, where the first sequence does, got {given!r:.80}"
        )
    falls = np.flatnonzero(offsets[1:] < offsets[:-1])
    if falls.size:
        at = int(falls[0])
        raise ArgumentError(
            f"{name} must not decrease, got {offsets[at + 1]} after {offsets[at]} as entry "
            f"{at + 1}: it holds where each sequence begins, then the length"
        )
    if offsets[-1] != length:
        raise ArgumentError(
            f"{name} must end at {axis} = {length}, got {offsets[-1]}: it holds where each "
            "sequence begins, then the length"
        )
    return offsets


def build(
    spec: Variant, q: Array, k: Array, problem: Problem, params: Params | None
) -> tuple[Piece, ...]:
    """The plan of a call: of its one sequence, or those of all its sequences in one."""
    if problem.cu_seqlens is None:
        return spec.build(q, k, problem, params)
    if spec.arrays:
        raise ArgumentError(
            f"{spec} takes {', '.join(spec.arrays)} for one sequence and cu_seqlens packs several: "
            "call it once a sequence"
        )
    one = problem._replace(cu_seqlens=None)
    cu_q, cu_k = (offsets.tolist() for offsets in problem.cu_seqlens)
    if len(cu_q) == 1:
        return spec.build(q, k, one, params)
    alike, which = groups(spec, problem)
    built = []
    for s in alike:
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        own = one.of_block(rows, keys)
        built.append(spec.build(q[:, :, rows], k[:, :, keys], own, params))
    pieces = []
    for at, piece in enumerate(built[0]):
        own = problem.of_heads(piece.begin, piece.end)
        cores = tuple(built[s][at].core for s in which)
        pieces.append(piece._replace(core=_core.plan_pack(cores, own.mask, own.key_mask)))
    return tuple(pieces)


def groups(spec: Variant, problem: Problem) -> tuple[list[int], list[int]]:
    """Sequences that a plan is made of, and which of these plans each sequence has: where neither
    keys nor masks are read, sequences of one length share theirs."""
    assert problem.cu_seqlens is not None
    cu_q, cu_k = problem.cu_seqlens
    if spec.reads_keys or problem.mask is not None or problem.key_mask is not None:
        every = list(range(cu_q.size - 1))
        return every, every
    sizes = np.diff(cu_q) * (cu_k[-1] + 1) + np.diff(cu_k)  # both below 2**30
    _, first, which = np.unique(sizes, return_index=True, return_inverse=True)
    return first.tolist(), which.tolist()
