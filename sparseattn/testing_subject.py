"""What the contract checks run: a spec with the calls that it takes, inputs, a float64 definition.

Every check of ``sparseattn.testing`` gets a :class:`Subject`. It raises :class:`Fault` with what
was seen and expected, or :class:`Skip` where the contract says nothing about this spec.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from sparseattn import _core
from sparseattn.attention import OutLse, attention
from sparseattn.config import get_num_threads, set_num_threads
from sparseattn.errors import ArgumentError
from sparseattn.plan import Plan, plan
from sparseattn.variants.base import Variant
from sparseattn.variants.combine import PerHead

if TYPE_CHECKING:
    from sparseattn.variants.base import Array, Params

Shape: TypeAlias = tuple[int, int, int, int, int, int, int]
QKV: TypeAlias = "tuple[Array, Array, Array]"
MakeParams: TypeAlias = Callable[[Variant, Shape], "Params | None"]
Reference: TypeAlias = (
    "Callable[[Array, Array, Array, Array, bool | str, Params | None], tuple[Array, Array]]"
)

# batch, n_q, n_k, dim, dim_v: one token, decode, odd lengths about a tile's 64 rows
SMALL = [(1, 1, 1, 3, 2), (2, 1, 40, 8, 5), (2, 33, 47, 8, 5), (1, 66, 66, 16, 8)]
LONG = [*SMALL, (1, 130, 257, 40, 33), (3, 65, 65, 16, 16), (1, 257, 257, 64, 64), (2, 70, 9, 5, 7)]
CEILING = {"float32": 1e-5, "float64": 1e-12}  # of |error| / (1 + |value|)
HEADS = (6, 2)


class Fault(Exception):
    """A promise that did not hold: where, what was seen, what was expected."""

    def __init__(self, where: str, seen: object, expected: str) -> None:
        super().__init__(f"{where}: got {seen}, expected {expected}")


class Skip(Exception):
    """The contract says nothing about this spec, for the reason given."""


class Check(NamedTuple):
    """One promise, and the function that tries to break it."""

    name: str
    promise: str  # its id in the reliability notes
    line: str  # what it states
    run: Callable[[Subject], None]


CHECKS: list[Check] = []  # in the order in which they run


def check(promise: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Decorator: the function's name and first line are the check's."""

    def add(run: Callable[[Subject], None]) -> Callable[[Subject], None]:
        line = (run.__doc__ or "").strip().splitlines()[0]
        CHECKS.append(Check(run.__name__, promise, line, run))
        return run

    return add


class Subject:
    """A spec, the shapes and alignments that it takes, and its calls."""

    def __init__(
        self,
        spec: Variant,
        params: MakeParams | None = None,
        reference: Reference | None = None,
        heads: tuple[int, int] | None = None,
        long: bool = False,
    ) -> None:
        self.spec, self.make_params, self.reference = spec, params, reference
        own = (len(spec.specs), 1) if isinstance(spec, PerHead) else HEADS
        if isinstance(spec, PerHead) and len(spec.specs) % 2 == 0:
            own = (len(spec.specs), 2)
        self.heads, self.kv_heads = own if heads is None else heads
        self.long = long
        self._alignments: tuple[bool | str, ...] | None = None

    # ---- inputs ---------------------------------------------------------------------------------

    @property
    def shapes(self) -> list[Shape]:
        return [self.shape(*sizes) for sizes in (LONG if self.long else SMALL)]

    def shape(self, batch: int, n_q: int, n_k: int, dim: int = 16, dim_v: int = 5) -> Shape:
        return batch, self.heads, self.kv_heads, n_q, n_k, dim, dim_v

    def inputs(self, shape: Shape, dtype: Any = np.float64, seed: int = 0) -> QKV:
        """q, k, v; where keys are chosen by score, q and k are so coarse that scores are exact
        (with a dim of 16, whose scale is too), and two orders of summation choose alike."""
        batch, heads, kv_heads, n_q, n_k, dim, dim_v = shape
        rng = np.random.default_rng([seed, *shape])
        sizes = [(heads, n_q, dim), (kv_heads, n_k, dim), (kv_heads, n_k, dim_v)]
        q, k, v = (rng.standard_normal((batch, *size)) for size in sizes)
        if self.spec.reads_keys:
            q, k = (np.round(x * 64).clip(-127, 127) / 64 for x in (q, k))
        return q.astype(dtype), k.astype(dtype), v.astype(dtype)

    def params(self, shape: Shape) -> Params | None:
        return None if self.make_params is None else self.make_params(self.spec, shape)

    def masks(self, shape: Shape, seed: int = 1) -> dict[str, Array]:
        """A mask with an empty row, and padding that takes a whole batch entry where there are
        several."""
        batch, heads, _, n_q, n_k, *_ = shape
        rng = np.random.default_rng([seed, *shape])
        mask = rng.random((batch, heads, n_q, n_k)) < 0.7
        mask[..., n_q // 2, :] = False
        key_mask = rng.random((batch, n_k)) < 0.8
        key_mask[batch - 1] = batch == 1
        return {"mask": mask, "key_mask": key_mask}

    # ---- calls ----------------------------------------------------------------------------------

    @property
    def alignments(self) -> tuple[bool | str, ...]:
        """Values of ``causal`` that the spec takes; it may refuse others by name."""
        if self.spec.layer(0) is not self.spec:
            raise Skip("it says one spec a layer: check those of its layers")
        if self._alignments is None:
            taken: list[bool | str] = []
            for causal in (True, False, "top_left"):
                try:
                    self.try_one(causal)
                    taken.append(causal)
                except ArgumentError as error:
                    if "causal" not in str(error):
                        raise
            self._alignments = tuple(taken)
        return self._alignments

    def try_one(self, causal: bool | str) -> None:
        """A call as far as the spec's own code goes: the core's word against a plan that was built
        otherwise is no refusal by the spec."""
        shape = self.shape(1, 2, 3)
        q, k, v = self.inputs(shape)
        params = self.params(shape)
        if self.composed:
            attention(q, k, v, self.spec, params=params, causal=causal)
        else:
            plan(q, k, self.spec, params=params, causal=causal)

    @property
    def causal(self) -> bool | str:
        """The alignment of checks that need only one: causal where it may be."""
        return self.alignments[0]

    def need_causal(self) -> None:
        if True not in self.alignments:
            raise Skip("it takes no causal=True")

    def call(self, shape: Shape, causal: Any = None) -> dict[str, Any]:
        """The arguments of every call: params and causal."""
        return {"params": self.params(shape), "causal": self.causal if causal is None else causal}

    def run(self, arrays: Any, shape: Shape, causal: Any = None, **terms: Any) -> OutLse:
        """out and lse of q, k, v, without a warning of NumPy's on the way."""
        call = self.call(shape, causal)
        with np.errstate(all="raise"):
            q, k, v = arrays
            result: OutLse = attention(q, k, v, self.spec, return_lse=True, **call | terms)
        return result

    def plan(self, arrays: Any, shape: Shape, causal: Any = None, **terms: Any) -> Plan:
        if self.composed and type(self.spec).build is Variant.build:
            raise Skip("it composes operators and has no plan of its own")
        call = self.call(shape, causal)
        with np.errstate(all="raise"):
            return plan(arrays[0], arrays[1], self.spec, **call | terms)

    @property
    def composed(self) -> bool:
        return type(self.spec).apply is not Variant.apply

    def full_row(self, made: Plan) -> bool:
        """Some weights are normalised over keys that are not kept."""
        return any(piece.full_row for piece in made.pieces)

    def where(self, shape: Shape, causal: Any = None, extra: str = "") -> str:
        names = ("batch", "heads", "kv_heads", "n_q", "n_k", "dim", "dim_v")
        sizes = ", ".join(f"{name} {size}" for name, size in zip(names, shape, strict=True))
        aligned = self.causal if causal is None else causal
        return f"{sizes}, causal={aligned!r}{', ' + extra if extra else ''}"

    def cases(self) -> Iterator[tuple[Shape, bool | str]]:
        """Every shape, the alignments in turn; in the long form every pair."""
        for at, shape in enumerate(self.shapes):
            turns = self.alignments
            for causal in turns if self.long else (turns[at % len(turns)],):
                yield shape, causal

    # ---- the definition -------------------------------------------------------------------------

    def see(self, shape: Shape, causal: Any = None, **masks: Array) -> Array:
        """Who may see whom before the spec chooses."""
        batch, heads, _, n_q, n_k, *_ = shape
        causal = self.causal if causal is None else causal
        see = np.ones((batch, heads, n_q, n_k), bool)
        if causal is not False:
            offset = 0 if causal == "top_left" else n_k - n_q
            see &= np.arange(n_k) <= np.arange(n_q)[:, None] + offset
        if "mask" in masks:
            see &= masks["mask"]
        if "key_mask" in masks:
            see &= masks["key_mask"][:, None, None]
        return see

    def want(
        self, arrays: Any, shape: Shape, causal: Any = None, **terms: Any
    ) -> tuple[Array, Array]:
        """out and lse in plain float64: the caller's definition, or softmax over the plan."""
        masks = {name: terms[name] for name in ("mask", "key_mask") if name in terms}
        see = self.see(shape, causal, **masks)
        if self.reference is not None:
            q, k, v = (x.astype(np.float64) for x in arrays)
            aligned = self.causal if causal is None else causal
            return self.reference(q, k, v, see, aligned, self.params(shape))
        if self.composed:
            raise Skip("it composes operators: pass reference= to check its numbers")
        made = self.plan(arrays, shape, causal, **terms)
        kept = made.to_mask()
        full = kept.copy()
        for piece in made.pieces:
            if piece.full_row:
                full[:, piece.begin : piece.end] = see[:, piece.begin : piece.end]
        scoring = {n: terms[n] for n in ("scale", "softcap", "bias") if n in terms}
        q, k, v = arrays
        return softmax_attention(q, k, v, kept, full, **scoring)


def softmax_attention(
    q: Array,
    k: Array,
    v: Array,
    kept: Array,
    full: Array,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    """out and lse in float64 over the keys ``kept``, normalised over those of ``full``."""
    of = np.arange(q.shape[1]) * k.shape[1] // q.shape[1]
    q, k, v = (x.astype(np.float64) for x in (q, k[:, of], v[:, of]))
    s = (q.shape[3] ** -0.5 if scale is None else scale) * (q @ k.swapaxes(2, 3))
    s = softcap * np.tanh(s / softcap) if softcap else s
    s = s if bias is None else s + bias
    s = np.where(full, s, -np.inf)
    top = s.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(s - np.where(np.isneginf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(total == 0, -np.inf, top + np.log(total))[..., 0]
    return np.where(kept, weights / np.where(total == 0, 1, total), 0) @ v, lse


# ---- what checks say ----------------------------------------------------------------------------


def near(where: str, name: str, got: Array, want: Array, bound: float) -> None:
    """|error| / (1 + |value|) is at most ``bound``; infinities and shapes are equal."""
    if got.shape != want.shape:
        raise Fault(where, f"{name} of shape {got.shape}", f"{want.shape}")
    finite = np.isfinite(want)
    with np.errstate(invalid="ignore"):
        error = np.abs(got.astype(np.float64) - want) / (1 + np.abs(want))
    bad = np.where(finite, ~(error <= bound), got != want)
    if bad.any():
        at = first(bad)
        raise Fault(where, f"{name}{at} = {got[at]!s}", f"{want[at]!s} to within {bound:g}")


def same(where: str, name: str, got: Array, want: Array, why: str) -> None:
    """The same bits."""
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Fault(where, f"{name} {got.dtype}{got.shape}", f"{want.dtype}{want.shape}, {why}")
    if got.tobytes() != want.tobytes():
        size = got.dtype.itemsize
        one, two = (
            np.ascontiguousarray(x).view(np.uint8).reshape(*x.shape, size) for x in (got, want)
        )
        at = first((one != two).any(-1))
        raise Fault(where, f"{name}{at} = {got[at]!s}", f"the bits of {want[at]!s}, {why}")


def same_rows(where: str, got: OutLse, want: OutLse, rows: Any, why: str) -> None:
    """out and lse of some rows keep their bits."""
    same(where, "out", got.out[rows], want.out[rows], why)
    same(where, "lse", got.lse[rows], want.lse[rows], why)


def first(bad: Array) -> tuple[int, ...]:
    return tuple(int(i[0]) for i in np.nonzero(bad))


def refused(where: str, call: Callable[[], Any], word: str) -> None:
    """The call is an ArgumentError that has ``word`` in its message."""
    try:
        call()
    except ArgumentError as error:
        if word not in str(error):
            raise Fault(where, f"the message {str(error)!r}", f"one that names {word!r}") from None
        return
    raise Fault(where, "a result", f"an ArgumentError that names {word!r}")


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = get_num_threads()
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(before)


def has_record(spec: Variant) -> bool:
    """Whether the core has a record of this kind, so that ranges of fields are its to check."""
    return spec.kind in _core.variants()
