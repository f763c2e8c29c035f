"""The rows that a cache keeps, as a value: how they grow, are forgotten, cut back and chosen.

Nothing here changes a ``Held`` but for the free rows of its buffers: each function gives the next
one, so that whoever holds the old one has lost nothing when an error comes.

Where a spec tells what rows to come may see (``Variant.keep``), the rest is forgotten. Then there
are the first ``pinned`` keys and behind them the newest ones, from position ``start`` on: the plan
of a row is the same as over all keys, because a window counts back from the end and pinned keys
stand in front.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparseattn import _core
from sparseattn.half import is_half, kind_of, storage_type, widen
from sparseattn.inputs import empty

if TYPE_CHECKING:
    from sparseattn.variants.base import Array

GRAIN = 64  # buffers have a multiple of as many rows


class Held(NamedTuple):
    """What a cache holds."""

    k: Array  # (batch, kv_heads, capacity, dim): the kept rows, then free ones
    v: Array  # (batch, kv_heads, capacity, dim_v)
    there: Array | None  # bool (batch, kept): which kept keys are no padding; None: all
    stored: str  # dtype's name; bfloat16 is held as its bits
    total: int  # tokens that came and were not cropped
    start: int  # position of the first key behind the pinned ones; those between are forgotten
    kept: int  # rows


class Staged(NamedTuple):
    """What an append comes to: rows to attend to now, and what to hold from then on."""

    k: Array  # (batch, kv_heads, kept and new rows, dim) as stored
    v: Array
    there: Array | None  # of these rows
    start: int  # as in Held, of these rows
    held: Held


class Policy(NamedTuple):
    """What to keep. Where the newest keys begin moves on by ``step`` and is a function of the
    number of tokens alone, so that it does not matter how they came."""

    pinned: int
    left: int | None  # keys that a row sees before its own; None: all
    need: int  # of the newest keys before the next token
    step: int
    limit: int  # rows of a buffer

    @classmethod
    def of(cls, keep: tuple[int, int] | None, rollback: int) -> Policy:
        """``keep`` as ``Variant.keep`` gives it; two windows and the rollback behind the pinned."""
        if keep is None:
            return cls(0, None, 0, 1, 0)
        pinned, left = keep
        limit = whole(pinned + 2 * (left + 1) + rollback)
        need = left + rollback
        return cls(pinned, left, need, limit - pinned - need, limit)

    def start(self, total: int) -> int:
        """Where the newest keys begin before the next token."""
        if self.left is None:
            return 0
        return self.pinned + max(0, (total - self.pinned - self.need) // self.step * self.step)

    def shortest(self, held: Held) -> int:
        """The least length above ``pinned`` that the rows can be cut back to."""
        forgot = self.left is not None and held.start > self.pinned
        return held.start + (self.left or 0) if forgot else 0


def whole(rows: int) -> int:
    return -(-rows // GRAIN) * GRAIN


def nothing(k: Array, v: Array, stored: str, policy: Policy) -> Held:
    """No rows yet, for keys and values of these sizes."""
    k, v = (np.empty((*x.shape[:2], 0, x.shape[3]), storage_type(stored)) for x in (k, v))
    return Held(k, v, None, stored, 0, policy.pinned, 0)


def append(policy: Policy, held: Held, k: Array, v: Array, there: Array | None) -> Staged:
    """The kept rows with these behind them; ``there`` is of both."""
    k, v = rounded(k, held.k.dtype), rounded(v, held.v.dtype)
    kept, start, rows = held.kept, held.start, held.kept + k.shape[2]
    total = held.total + k.shape[2]
    if policy.left is None or rows <= policy.limit:
        kb, vb = room(held.k, kept, rows, policy), room(held.v, kept, rows, policy)
        kb[:, :, kept:rows], vb[:, :, kept:rows] = k, v
        grown = Held(kb, vb, there, held.stored, total, start, rows)
        return Staged(kb[:, :, :rows], vb[:, :, :rows], there, start, grown)
    if kept:
        k, v = joined(held.k[:, :, :kept], k), joined(held.v[:, :, :kept], v)
    long = Held(k, v, there, held.stored, total, start, rows)
    return Staged(k, v, there, start, settled(policy, long))


def joined(front: Array, back: Array) -> Array:
    """Both one after the other, in rows without gaps whatever the strides."""
    batch, heads, rows, width = front.shape
    fresh = empty("the cache", (batch, heads, rows + back.shape[2], width), front.dtype)
    fresh[:, :, :rows], fresh[:, :, rows:] = front, back
    return fresh


def room(buffer: Array, kept: int, rows: int, policy: Policy) -> Array:
    """The buffer, or one of at least twice its size with the same rows in front."""
    if rows <= buffer.shape[2]:
        return buffer
    capacity = whole(max(rows, 2 * buffer.shape[2]))
    return moved(buffer, capacity if policy.left is None else min(capacity, policy.limit), kept)


def moved(buffer: Array, capacity: int, front: int, low: int = 0, high: int = 0) -> Array:
    """A new buffer with rows [0, front) and, behind them, [low, high)."""
    batch, heads, _, width = buffer.shape
    fresh = empty("the cache", (batch, heads, capacity, width), buffer.dtype)
    fresh[:, :, :front] = buffer[:, :, :front]
    fresh[:, :, front : front + high - low] = buffer[:, :, low:high]
    return fresh


def settled(policy: Policy, held: Held) -> Held:
    """The same without the rows that no token to come may see, once they are enough of them."""
    start = policy.start(held.total)
    if start <= held.start:
        return held
    pinned, low = policy.pinned, policy.pinned + start - held.start
    capacity = min(held.k.shape[2], policy.limit)
    k, v = (moved(x, capacity, pinned, low, held.kept) for x in (held.k, held.v))
    there = held.there
    if there is not None:
        there = unless_all(np.concatenate([there[:, :pinned], there[:, low:]], 1))
    return Held(k, v, there, held.stored, held.total, start, held.kept - low + pinned)


def cut_back(policy: Policy, held: Held, length: int) -> Held | None:
    """The first ``length`` tokens; None where too much is forgotten to go on from there."""
    start, kept = held.start, length
    if length <= policy.pinned:  # all of them are there
        start = policy.pinned
    elif length < policy.shortest(held):
        return None
    elif policy.left is not None:
        kept = policy.pinned + length - start
    there = None if held.there is None else unless_all(held.there[:, :kept])
    return held._replace(there=there, total=length, start=start, kept=kept)


def chosen(held: Held, index: Array) -> Held:
    """Batch entries ``index``."""
    k, v = (empty("the cache", (index.size, *old.shape[1:]), old.dtype) for old in (held.k, held.v))
    k[:, :, : held.kept] = held.k[index, :, : held.kept]
    v[:, :, : held.kept] = held.v[index, :, : held.kept]
    there = None if held.there is None else unless_all(held.there[index])
    return held._replace(k=k, v=v, there=there)


def copied(held: Held | None) -> Held | None:
    """The same in memory of its own, without free rows."""
    if held is None:
        return None
    k, v = (moved(x, held.kept, held.kept) for x in (held.k, held.v))
    return held._replace(k=k, v=v)


def size_of(held: Held | None) -> int:
    """Bytes."""
    if held is None:
        return 0
    return held.k.nbytes + held.v.nbytes + (0 if held.there is None else held.there.nbytes)


def unless_all(there: Array) -> Array | None:
    """A mask that hides nothing is none."""
    return None if there.all() else there


def columns(x: Array, pinned: int, start: int) -> Array:
    """Of an array with a column a token, those of the first ``pinned`` and from ``start`` on."""
    if start <= pinned:
        return x
    return x[..., start:] if pinned == 0 else np.concatenate([x[..., :pinned], x[..., start:]], -1)


def rounded(x: Array, dtype: np.dtype[Any]) -> Array:
    """``x`` in a storage type: itself, or a copy."""
    if x.dtype == dtype:
        return x
    real = widen(x) if is_half(x) else x
    if dtype.kind == "f" and dtype.itemsize >= 4:
        return real
    half = np.empty(x.shape, dtype)  # half.narrow has work for any layout, which takes longer
    _core.narrow(np.ascontiguousarray(real).reshape(-1), kind_of(dtype), half.reshape(-1))
    return half
