"""Keys and values kept between calls, so that decoding appends to them: ``Cache``.

A cache is a lock and one value (kept.py). What changes it makes the next value and puts it in place
by one assignment at the end: an error or an interrupt at any moment leaves the cache as it was.
"""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparseattn import kept
from sparseattn.errors import ArgumentError, CacheInUse, DtypeError, NotSupported
from sparseattn.half import HALF, REAL, real_type
from sparseattn.inputs import MOST_BATCHES, collapse, needs_grad, read_alike, read_bool, to_array
from sparseattn.kept import Held, Policy, Staged
from sparseattn.plan import Plan
from sparseattn.variants.base import Variant, coerce, parse

if TYPE_CHECKING:
    from sparseattn.variants.base import Array


class Snapshot(NamedTuple):
    """A copy of what a cache held, for :meth:`Cache.restore`."""

    spec: Variant
    rollback: int
    dtype: str | None  # that the cache was made with
    held: Held | None

    @property
    def nbytes(self) -> int:
        """Bytes of the copied rows."""
        return kept.size_of(self.held)


class Alone:
    """One thread at a time; a second one is refused, not kept waiting."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            raise CacheInUse(
                "the cache is in use by another thread: give every thread a cache of its own, as "
                "sa.Cache(...).restore(cache.snapshot()) makes one"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.lock.release()


class Cache:
    """Keys and values of the tokens so far: ``attention(..., cache=cache)`` appends, then attends.

    Parameters
    ----------
    spec : spec or str
        The spec of the calls to come; None is dense. It says what may be forgotten: a window's
        cache holds two windows of keys, its sinks and the keys up to its last global column.
    dtype : str or dtype
        How keys and values are held: float32, float64, float16 or bfloat16 (by name; no package is
        needed for it). None is the dtype of the first keys. Calls are computed in float64 for
        float64 and in float32 else; float16 makes infinities of values beyond 65504.
    rollback : int
        Tokens that :meth:`crop` may drop at any time. Only caches that forget keep more for it.

    Attributes
    ----------
    spec : Variant
    dtype : str or None
        None until the first append.
    rollback : int
    nbytes : int
        Bytes of the buffers, free rows included.
    key_mask : ndarray of bool, shape (batch, kept), or None
        Which of the kept keys are no padding; None: all.

    Raises
    ------
    ArgumentError, DtypeError
        If a spec, dtype or rollback makes no sense; later calls that do not fit say so and leave
        the cache as it was.
    CacheInUse
        A RuntimeError: two threads used one cache at once.

    References
    ----------
    Method names are those of ``transformers.Cache``; pinned sinks: Xiao et al., "Efficient
    streaming language models with attention sinks", 2023, arXiv:2309.17453.

    >>> import numpy as np, sparseattn as sa
    >>> x, cache = np.ones((1, 2, 9, 4), np.float32), sa.Cache("window:4")
    >>> parts = [sa.attention(t, t, t, causal=True, cache=cache) for t in np.split(x, 9, 2)]
    >>> cache.get_seq_length()
    9
    """

    def __init__(self, spec: Any = None, dtype: Any = None, rollback: int = 0) -> None:
        self.spec = read_spec(spec)
        self._said = spec  # accepted again without reading
        self._wanted = None if dtype is None else read_dtype(dtype)
        self.rollback = coerce(int, rollback, "rollback")
        if self.rollback < 0:
            raise ArgumentError(f"rollback must be a number of tokens from 0 on, got {rollback}")
        self.alone = Alone()
        self._held: Held | None = None
        self.policy = Policy.of(self.spec.keep(), self.rollback)

    # ---- what is there --------------------------------------------------------------------------

    @property
    def dtype(self) -> str | None:
        return self._wanted if self._held is None else self._held.stored

    @property
    def nbytes(self) -> int:
        return kept.size_of(self._held)

    @property
    def key_mask(self) -> Array | None:
        return None if self._held is None else self._held.there

    def get_seq_length(self) -> int:
        """Tokens appended and not cropped, padding and forgotten ones included."""
        return 0 if self._held is None else self._held.total

    def __repr__(self) -> str:
        held = self._held
        if held is None:
            return f"<Cache of {self.spec}: empty>"
        batch, kv_heads, _, dim = held.k.shape
        return (
            f"<Cache of {self.spec}: batch {batch}, kv_heads {kv_heads}, dim {dim}, "
            f"{held.total} tokens, {held.kept} kept as {held.stored}, {self.nbytes:,} bytes>"
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: free rows, which two caches must not share, are left out."""
        with self.alone:
            state = {**self.__dict__, "_held": kept.copied(self._held)}
        del state["alone"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, alone=Alone())

    # ---- growing --------------------------------------------------------------------------------

    def append(self, k: Any, v: Any, key_mask: Any = None) -> tuple[Array, Array]:
        """Append without attending.

        Parameters
        ----------
        k, v : array, shape (..., kv_heads, length, dim) and (..., kv_heads, length, dim_v)
        key_mask : array of bool, shape (..., length) or (..., all tokens so far)
            True for the tokens that are there; remembered. None: all the new ones are.

        Returns
        -------
        k, v : ndarray, shape (batch, kv_heads, kept, dim) and (batch, kv_heads, kept, dim_v)
            All that is kept, in the cache's dtype (bfloat16 as uint16), and for the keys of this
            append all that their own rows may see. They are the cache's memory: to be read, until
            the next call on the cache.

        Raises
        ------
        ArgumentError, DtypeError
            If sizes or dtype differ from those of the first append.

        >>> import numpy as np, sparseattn as sa
        >>> k, v = sa.Cache().append(np.ones((1, 2, 5, 4)), np.ones((1, 2, 5, 3)))
        >>> k.shape, v.shape
        ((1, 2, 5, 4), (1, 2, 5, 3))
        """
        refuse_gradients(k=k, v=v)
        (k, v), stored = read_alike({"k": k, "v": v}, "(..., heads, length, dim)")
        lead = k.shape[:-3]
        if lead != v.shape[:-3]:
            raise ArgumentError(f"k and v must have one batch, got {k.shape} and {v.shape}")
        with self.alone:
            staged = self.stage(collapse(k, lead), collapse(v, lead), stored, key_mask, lead)
            self.commit(staged)
        return staged.k, staged.v

    def stage(
        self, k: Array, v: Array, stored: str, key_mask: Any, lead: tuple[int, ...]
    ) -> Staged:
        """What appending these would come to; nothing counts before :meth:`commit`."""
        held = self._held
        if held is None:
            held = kept.nothing(k, v, self._wanted or stored, self.policy)
        else:
            held = kept.settled(self.policy, held)
        self._check(held, k, v, stored)
        there = None
        if key_mask is not None or held.there is not None:
            there = self._there(held, key_mask, k.shape[2], lead)
        return kept.append(self.policy, held, k, v, there)

    def commit(self, staged: Staged) -> None:
        self._held = staged.held

    def _check(self, held: Held, k: Array, v: Array, stored: str) -> None:
        sizes = [(*x.shape[:2], x.shape[3]) for x in (held.k, held.v, k, v)]
        for name, have, got in zip("kv", sizes[:2], sizes[2:], strict=True):
            if have != got:
                raise ArgumentError(
                    f"{name} has (batch, heads, dim) = {got} and the cache holds {have}: use "
                    "another sa.Cache for it, or batch_select_indices() to change the batch"
                )
        if k.shape[2] != v.shape[2]:
            raise ArgumentError(f"k has {k.shape[2]} tokens and v has {v.shape[2]}: give as many")
        fits = stored == held.stored
        if self._wanted is not None:  # asked for, and so rounded to
            fits = real_type(stored) == real_type(held.stored)
        if not fits:
            raise DtypeError(
                f"k and v are {stored} and the cache is {held.stored}: convert them, or make "
                f"sa.Cache(..., dtype={stored!r})"
            )

    def _there(self, held: Held, key_mask: Any, n_new: int, lead: tuple[int, ...]) -> Array | None:
        """Which of the kept and new keys are no padding."""
        batch, total = held.k.shape[0], held.total + n_new
        old = np.ones((batch, held.kept), bool) if held.there is None else held.there
        if key_mask is None:
            return np.concatenate([old, np.ones((batch, n_new), bool)], 1)
        given = read_bool("key_mask", key_mask, "it says which keys are there, and takes no floats")
        count = given.shape[-1] if given.ndim else -1
        if given.shape[:-1] not in (lead, (1, *lead)) or count not in (n_new, total):
            raise ArgumentError(
                f"key_mask must have shape {(*lead, n_new)} for the new tokens or "
                f"{(*lead, total)} for all, got {given.shape}"
            )
        given = given.reshape(batch, count)
        if count == total:
            there = kept.columns(given, self.policy.pinned, held.start).copy()
        else:
            there = np.concatenate([old, given], 1)
        return kept.unless_all(there)

    # ---- going back, choosing -------------------------------------------------------------------

    def crop(self, n: int) -> None:
        """Forget all but the first ``n`` tokens, or the last ``-n`` tokens where n is negative.

        Parameters
        ----------
        n : int
            No effect from :meth:`get_seq_length` on, as in transformers; 0 forgets all.

        Raises
        ------
        ArgumentError
            If fewer than ``-n`` tokens are there, or if the next token would need keys that a
            window's cache has forgotten: ``rollback`` tokens back is always possible.

        >>> import numpy as np, sparseattn as sa
        >>> cache = sa.Cache()
        >>> _ = cache.append(np.ones((1, 2, 5, 4)), np.ones((1, 2, 5, 4)))
        >>> cache.crop(-2), cache.get_seq_length()
        (None, 3)
        """
        n = coerce(int, n, "n of crop(n)")
        with self.alone:
            held = self._held
            total = 0 if held is None else held.total
            length = n if n >= 0 else total + n
            if length < 0:
                raise ArgumentError(f"crop({n}) drops {-n} tokens and the cache has {total}")
            if held is None or length >= total:
                return
            short = kept.cut_back(self.policy, held, length)
            if short is None:
                raise ArgumentError(
                    f"crop({n}) goes back to {length} of {total} tokens, and the cache of "
                    f"{self.spec} has forgotten keys needed there: crop to "
                    f"{self.policy.shortest(held)} or more, or make it with "
                    f"rollback={total - length}"
                )
            self._held = short

    def reorder_cache(self, index: Any) -> None:
        """Put batch entries in another order, as beam search does; entries may repeat.

        Parameters
        ----------
        index : array of int, shape (batch,)
            Entry ``b`` continues what entry ``index[b]`` was.

        Raises
        ------
        ArgumentError
            If it has another length or an entry out of range.

        >>> import numpy as np, sparseattn as sa
        >>> cache = sa.Cache()
        >>> k, v = cache.append(*np.arange(4.0).reshape(2, 2, 1, 1, 1))
        >>> cache.reorder_cache([1, 1]), float(cache.snapshot().held.k[0, 0, 0, 0])
        (None, 1.0)
        """
        self._select("reorder_cache", index, same=True)

    def batch_select_indices(self, index: Any) -> None:
        """Keep the batch entries ``index``, in its order; the batch becomes as long as it is.

        Parameters
        ----------
        index : array of int, shape (n,)
            Entries may repeat.

        Raises
        ------
        ArgumentError
            If an entry is out of range.

        >>> import numpy as np, sparseattn as sa
        >>> cache = sa.Cache()
        >>> _ = cache.append(np.ones((3, 2, 5, 4)), np.ones((3, 2, 5, 4)))
        >>> cache.batch_select_indices([0, 2]), cache.snapshot().held.k.shape
        (None, (2, 2, 5, 4))
        """
        self._select("batch_select_indices", index, same=False)

    def _select(self, method: str, index: Any, same: bool) -> None:
        array, _ = to_array("index", index)
        if array.size == 0:
            array = array.astype(np.intp)
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise ArgumentError(
                f"{method} takes integers, a list of batch entries, got {array.dtype} of shape "
                f"{array.shape}"
            )
        with self.alone:
            held = self._held
            if held is None:
                raise ArgumentError(f"{method}: the cache is empty: append to it first")
            batch = held.k.shape[0]
            if same and array.size != batch:
                raise ArgumentError(
                    f"reorder_cache needs one entry for each of the {batch} of the batch, got "
                    f"{array.size}: batch_select_indices() changes the batch"
                )
            if array.size > MOST_BATCHES:
                raise ArgumentError(
                    f"{method}: index must have at most {MOST_BATCHES} entries, got {array.size}"
                )
            array = array.copy()  # ours alone: what is checked is what is read
            wrong = array[(array < 0) | (array >= batch)]
            if wrong.size:
                raise ArgumentError(
                    f"{method}: index must name batch entries 0 to {batch - 1}, got {wrong[0]}"
                )
            if array.size == batch and (array == np.arange(batch)).all():
                return
            self._held = kept.chosen(held, array)

    # ---- saving ---------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """A copy of what is kept; it costs as much as copying those rows.

        Returns
        -------
        Snapshot
            With ``nbytes``; to be given to :meth:`restore` of this cache or of another with the
            same spec and rollback, any number of times.

        >>> import numpy as np, sparseattn as sa
        >>> cache, x = sa.Cache(), np.ones((1, 2, 5, 4))
        >>> saved, _ = cache.snapshot(), cache.append(x, x)
        >>> cache.restore(saved).get_seq_length()
        0
        """
        with self.alone:
            return Snapshot(self.spec, self.rollback, self._wanted, kept.copied(self._held))

    def restore(self, s: Snapshot) -> Cache:
        """Become what the snapshot was, to the bit.

        Parameters
        ----------
        s : Snapshot

        Returns
        -------
        Cache
            This one.

        Raises
        ------
        ArgumentError, DtypeError
            If it is of a cache with another spec, rollback or dtype.

        >>> import numpy as np, sparseattn as sa
        >>> cache, x = sa.Cache(), np.ones((1, 2, 5, 4))
        >>> _ = cache.append(x, x)
        >>> sa.Cache().restore(cache.snapshot()).get_seq_length()
        5
        """
        if not isinstance(s, Snapshot):
            raise ArgumentError(f"restore takes what snapshot() gave, got {type(s).__name__}")
        mine, theirs = ((x.spec, x.rollback) for x in (self, s))
        if mine != theirs:
            raise ArgumentError(
                f"the snapshot is of a cache of {theirs[0]} with rollback={theirs[1]} and this is "
                f"one of {mine[0]} with rollback={mine[1]}: make a cache like that"
            )
        if s.held is not None and self._wanted not in (None, s.held.stored):
            raise DtypeError(
                f"the snapshot is of a {s.held.stored} cache and this is a {self._wanted} one: "
                f"make sa.Cache(..., dtype={s.held.stored!r})"
            )
        with self.alone:
            held = kept.copied(s.held)
            self._wanted, self._held = self._wanted or s.dtype, held
        return self

    # ---- attending ------------------------------------------------------------------------------

    def accept(self, spec: Any) -> None:
        """Refuse a spec that is not the cache's own; None stands for that."""
        if spec is None or spec is self._said or spec is self.spec:
            return
        given = read_spec(spec)
        if given != self.spec:
            raise ArgumentError(
                f"the cache is made for {self.spec} and spec is {given}: "
                f"make one for that, sa.Cache({str(given)!r})"
            )
        self._said = spec

    def reach(self, staged: Staged, n_q: int) -> int:
        """The row of ``staged`` from which on ``n_q`` queries at the end need keys."""
        left, pinned = self.policy.left, self.policy.pinned
        if left is None:
            return 0
        first = staged.held.total - n_q - left
        if first < staged.start and staged.start > pinned:
            raise ArgumentError(
                f"q has {n_q} rows, and the cache of {self.spec} has forgotten keys that the first "
                "of them may see: pass as many queries as new keys"
            )
        return 0 if pinned else max(0, first - staged.start)


# ---- reading ------------------------------------------------------------------------------------


def read_spec(spec: Any) -> Variant:
    """The spec of one layer."""
    if isinstance(spec, Plan):
        of = str(spec.spec or "dense")
        raise ArgumentError(f"a plan is of one call: give the cache a spec, as in sa.Cache({of!r})")
    variant = parse("dense" if spec is None else spec)
    if variant.layer(0) is not variant:
        raise ArgumentError(
            f"{variant} says one spec a layer, and a cache is of one layer: pass spec.layer(i)"
        )
    return variant


def read_dtype(dtype: Any) -> str:
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in REAL + HALF:
        with contextlib.suppress(TypeError):  # a type such as np.float16, a code such as "f2"
            name = np.dtype(dtype).name
    if name not in REAL + HALF:
        raise DtypeError(f"dtype must be one of {', '.join(REAL + HALF)}, got {dtype!r:.80}")
    return name


def refuse_gradients(**given: Any) -> None:
    if needs_grad(*given.values()):
        name = next(name for name, x in given.items() if needs_grad(x))
        raise NotSupported(
            f"{name} requires grad, and no gradient goes through a cache: call under "
            "torch.no_grad(), or pass all keys and values so far as k and v"
        )
