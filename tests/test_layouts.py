"""Any array layout gives the bits of a contiguous copy, or a clear error (promise B1).

Hypothesis draws the seed of a case, and the seed draws the case: 1,000 cases over every spec, of
which drawing each choice by itself took three quarters of the time; the nightly run has 10,000.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from conftest import EVERY_SPEC, causals, fit, make_params, make_qkv, requires
from hypothesis import given, settings
from hypothesis import strategies as st

import sparseattn as sa

pytestmark = pytest.mark.promise("B1")

Array = np.ndarray
SIZES = (2, 6, 2, 9, 13, 8, 5)  # batch, heads, kv_heads, n_q, n_k, dim, dim_v
NUMBERS = [np.float32, np.float64, np.float16]


# ---- layouts, each of the same values ------------------------------------------------------------


def strided(x: Array, rng: Random) -> Array:
    """An order of the axes in memory and a step of each: backwards, spread; the gaps hold NaN."""
    order = rng.sample(range(x.ndim), x.ndim)
    steps = rng.choices([1, 1, -1, 2, -3], k=x.ndim)
    spread = [n * abs(step) for n, step in zip(x.shape, steps, strict=True)]
    memory = np.full([spread[a] for a in order], 1, x.dtype)
    if x.dtype.kind == "f":
        memory[...] = np.nan
    view = memory.transpose(np.argsort(order))[tuple(slice(None, None, s) for s in steps)]
    view[...] = x
    return view


def repeated(x: Array, rng: Random) -> Array:
    """Strides of zero along some axes, where all have the values of the first."""
    axes = rng.sample(range(x.ndim), rng.randint(1, x.ndim))
    cut = x[tuple(slice(0, 1) if a in axes else slice(None) for a in range(x.ndim))]
    return np.broadcast_to(cut, x.shape) if all(x.shape) else x


def misaligned(x: Array, rng: Random) -> Array:
    by = rng.randint(1, 7)
    raw = np.zeros(x.nbytes + by, np.uint8)
    y: Array = np.ndarray(x.shape, x.dtype, raw, by)
    y[...] = x
    return y


def swapped(x: Array, rng: Random) -> Array:
    return x.astype(x.dtype.newbyteorder())


def records(x: Array, rng: Random) -> Array:
    """A field of records: strides that no element divides."""
    pad = rng.choice(["u1", "u2", "f4", "S3"])
    table = np.zeros(x.shape, np.dtype([("x", x.dtype), ("pad", pad)]))
    table["x"] = x
    view: Array = table["x"]
    return view


def locked(x: Array, rng: Random) -> Array:
    y = x.copy()
    y.flags.writeable = False
    return y


class Named(np.ndarray):
    """A subclass of ndarray that shows when its own operators run."""

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an operator of a subclass ran")


def subclass(x: Array, rng: Random) -> Array:
    return x.copy().view(Named)


class Wrapped:
    """What is no ndarray and has ``__array__``."""

    def __init__(self, x: Array) -> None:
        self.x = x

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        return self.x


LAYOUTS: dict[str, Callable[[Array, Random], Any]] = {
    "strided": strided,
    "repeated": repeated,
    "misaligned": misaligned,
    "swapped": swapped,
    "records": records,
    "locked": locked,
    "fortran": lambda x, rng: np.asfortranarray(x),
    "subclass": subclass,
    "wrapped": lambda x, rng: Wrapped(x.copy()),
    "lists": lambda x, rng: x,
}


def plain(name: str, x: Any) -> Array:
    """The same values, contiguous and native, of no subclass.

    A mask that strides of zero give to all heads makes one plan for all of them, whose rows go
    together through the tiles: it stays so, a copy a head is another structure.
    """
    x = np.asarray(x.x if isinstance(x, Wrapped) else x).view(np.ndarray)
    once = [name == "mask" and at < 2 and step == 0 for at, step in enumerate(x.strides)]
    cut = x[tuple(slice(0, 1) if one else slice(None) for one in once)]
    return np.broadcast_to(np.array(cut, x.dtype.newbyteorder("="), order="C"), x.shape)


def bits(x: Any) -> bytes:
    return (x.x if isinstance(x, Wrapped) else x).tobytes()


# ---- the property --------------------------------------------------------------------------------


def check_case(rng: Random) -> None:
    spec = rng.choice(EVERY_SPEC)
    zero = rng.choice([None] * 12 + list(range(7)))  # an axis of no entries
    shape = [*fit(spec, SIZES)]
    if (
        zero is not None
        and not spec.arrays
        and not (isinstance(spec, sa.PerHead) and zero in (1, 2))
    ):
        shape[zero] = 0
    dtype = rng.choice(NUMBERS)
    shape_ = tuple(shape)
    given_ = dict(zip("qkv", make_qkv(shape_, dtype, strided=False), strict=True))
    batch, heads, _, n_q, n_k, *_ = shape_
    numbers = np.random.default_rng(1)
    extra = {
        "mask": numbers.random((batch, heads, n_q, n_k)) < 0.7,
        "key_mask": numbers.random((batch, n_k)) < 0.8,
        "bias": numbers.standard_normal((heads, n_q, n_k)).astype(dtype),
        "sink": numbers.standard_normal(heads).astype(dtype),
    }
    given_ |= {name: x for name, x in extra.items() if rng.random() < 0.5}
    params = make_params(spec, shape_) if spec.arrays else None
    given_ |= params or {}
    laid = {name: any_layout(x, rng) for name, x in given_.items()}
    compare(spec, laid, tuple(params or ()))


def any_layout(x: Array, rng: Random) -> Any:
    return LAYOUTS[rng.choice(sorted(LAYOUTS))](x, rng)


def compare(spec: Any, laid: dict[str, Any], names: tuple[str, ...]) -> None:
    """The laid out arrays against contiguous copies; or both get the same error."""
    before = {name: bits(x) for name, x in laid.items()}
    copies = {name: plain(name, x) for name, x in laid.items()}
    causal = causals(spec)[0]
    results = []
    for arrays in (laid, copies):
        arrays = dict(arrays)
        inner = {n: arrays.pop(n) for n in ("sink", *names) if n in arrays}
        q, k, v = (arrays.pop(n) for n in "qkv")
        try:
            got = sa.attention(
                *(q, k, v, spec), causal=causal, params=inner or None, return_lse=True, **arrays
            )
            results.append((got.out.dtype, got.out.shape, got.out.tobytes(), got.lse.tobytes()))
        except sa.SparseAttnError as error:
            results.append((type(error), str(error)))
    assert results[0] == results[1]
    assert {name: bits(x) for name, x in laid.items()} == before


SEEDS = st.randoms(use_true_random=True)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(SEEDS)
def test_any_layout(rng: Random) -> None:
    check_case(rng)


@pytest.mark.nightly
@settings(max_examples=10_000, deadline=None)
@given(SEEDS)
def test_any_layout_of_many(rng: Random) -> None:
    check_case(rng)


# ---- dtypes and kinds ----------------------------------------------------------------------------


def small(dtype: Any = np.float32) -> tuple[Array, ...]:
    return make_qkv((2, 4, 2, 5, 7, 8, 6), dtype, strided=False)


REFUSED = [
    *("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16", "O", "U3", "S3"),
    *("M8[s]", "m8[s]", "V4", "g", np.dtype([("x", "f4")])),
]


@pytest.mark.parametrize("dtype", REFUSED, ids=str)
@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_other_dtypes_are_refused_by_name(which: int, dtype: Any) -> None:
    arrays = list(small())
    arrays[which] = np.zeros(arrays[which].shape, dtype)
    with pytest.raises(sa.DtypeError, match=rf"^{'qkv'[which]} has dtype .*astype\(np\.float32\)"):
        sa.attention(*arrays)


@pytest.mark.parametrize("dtype", REFUSED, ids=str)
def test_other_dtypes_of_masks_and_bias_are_refused(dtype: Any) -> None:
    for name in ("mask", "key_mask", "bias"):
        if (name == "bias") != (np.dtype(dtype) == bool):
            x = np.zeros((2, 7) if name == "key_mask" else (5, 7), dtype)
            if np.dtype(dtype) == bool:
                continue
            with pytest.raises(sa.DtypeError, match=rf"^{name} has dtype"):
                sa.attention(*small(), **{name: x})
        elif np.dtype(dtype) == bool:
            with pytest.raises(sa.DtypeError, match=r"^bias has dtype bool.*mask="):
                sa.attention(*small(), bias=np.zeros((5, 7), dtype))


@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_masked_arrays_are_refused(which: int) -> None:
    arrays: list[Any] = list(small())
    arrays[which] = np.ma.masked_less(arrays[which], 0)
    with pytest.raises(sa.ArgumentError, match=rf"{'qkv'[which]} is a masked array.*mask="):
        sa.attention(*arrays)


@pytest.mark.parametrize("ndim", [0, 1, 2])
@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_too_few_axes_are_refused(which: int, ndim: int) -> None:
    arrays: list[Any] = list(small())
    arrays[which] = np.zeros((3,) * ndim, np.float32)
    with pytest.raises(sa.ArgumentError, match=rf"^{'qkv'[which]} must be .*length, dim\)"):
        sa.attention(*arrays)


def test_files_mapped_to_memory(tmp_path: Path) -> None:
    arrays = small()
    want = sa.attention(*arrays, "topk:3")
    for mode in ("r", "c", "r+"):
        maps = []
        for name, x in zip("qkv", arrays, strict=True):
            x.tofile(tmp_path / name)
            maps.append(np.memmap(tmp_path / name, x.dtype, mode, shape=x.shape))  # type: ignore[call-overload]
        got = sa.attention(*maps, "topk:3")
        assert type(got) is np.ndarray and got.tobytes() == want.tobytes()
        for x, y in zip(maps, arrays, strict=True):
            assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("axis", range(7))
def test_no_entries_along_any_axis(axis: int) -> None:
    """batch, heads, kv_heads, n_q, n_k, dim, dim_v of 0: an empty result, or an error that says."""
    shape = [2, 4, 2, 5, 7, 8, 6]
    shape[axis] = 0
    q, k, v = make_qkv(tuple(shape), strided=False)
    words = {
        1: "heads",
        2: "heads",
        5: "the width of q",
        6: "the width of v must be in [1, 4096], got 0",
    }
    if axis in words:
        with pytest.raises(sa.ArgumentError) as caught:
            sa.attention(q, k, v)
        assert words[axis] in str(caught.value) and "0" in str(caught.value)
        return
    got = sa.attention(q, k, v, return_lse=True)
    assert got.out.shape == (*q.shape[:3], v.shape[3]) and not np.isnan(got.out).any()
    if axis == 4:
        assert not got.out.any() and np.isneginf(got.lse).all()
    vjp = sa.attention_vjp(q, k, v)
    grads = vjp.pullback(np.ones_like(vjp.out))
    assert [g.shape for g in grads[:3]] == [x.shape for x in (q, k, v)]


def test_bfloat16_of_any_layout() -> None:
    ml_dtypes = requires("ml_dtypes")
    arrays = [x.astype(ml_dtypes.bfloat16) for x in small()]
    want = sa.attention(*arrays, "topk:3", return_lse=True)
    assert want.out.dtype == ml_dtypes.bfloat16
    ways: dict[str, Callable[[Array], Array]] = {
        "Fortran": np.asfortranarray,
        "backwards": lambda x: x[..., ::-1].copy()[..., ::-1],
        "gaps": lambda x: np.repeat(x, 2, -1)[..., ::2],
        "misaligned": lambda x: misaligned(x, Random(1)),
    }
    for name, layout in ways.items():
        laid = [layout(x) for x in arrays]
        before = [x.tobytes() for x in laid]
        got = sa.attention(*laid, "topk:3", return_lse=True)
        assert got.out.tobytes() == want.out.tobytes(), name
        assert got.lse.tobytes() == want.lse.tobytes(), name
        assert [x.tobytes() for x in laid] == before


# ---- other calls ---------------------------------------------------------------------------------


CALLS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "plan": lambda q, k, v: (sa.plan(q, k, "topk:3").to_mask(),),
    "vjp": lambda q, k, v: (vjp := sa.attention_vjp(q, k, v, "topk:3")).pullback(
        plain("q", vjp.out)
    )[:3],
    "sdpa": lambda q, k, v: (sa.scaled_dot_product_attention(q, k, v, enable_gqa=True),),
    "cache": lambda q, k, v: (sa.attention(q, k, v, causal=True, cache=sa.Cache("window:3")),),
    "merge": lambda q, k, v: sa.merge([(q, np.asarray(q)[..., 0]), (q, np.asarray(q)[..., 1])]),
    "mass": lambda q, k, v: (sa.attention(q, k, v, return_weights="mass").weights,),
    "top": lambda q, k, v: sa.attention(q, k, v, return_weights="topn:3").weights,
}


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(rng=SEEDS)
def test_any_layout_of_other_calls(name: str, rng: Random) -> None:
    arrays = make_qkv(SIZES, np.float32, strided=False)
    laid = [any_layout(x, rng) for x in arrays]
    if name == "merge":
        laid = [plain("q", laid[0]) if isinstance(laid[0], Wrapped | Named) else laid[0], *laid[1:]]
    before = [bits(x) for x in laid]
    got = CALLS[name](*laid)
    want = CALLS[name](*(plain("q", x) for x in laid))
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape and x.tobytes() == y.tobytes()
    assert [bits(x) for x in laid] == before


@pytest.mark.parametrize("spec", ["window:3", "window:3:sinks=2", "dense"])
@pytest.mark.parametrize("first", [1, 5])
def test_a_long_chunk_of_any_layout_goes_through_a_cache(spec: str, first: int) -> None:
    """Longer than what a window's cache holds, so that it is joined to what is kept."""
    x, y = (make_qkv((1, 2, 2, n, n, 8, 8), seed=n)[0] for n in (first, 700))
    for laid in (
        np.broadcast_to(y[:, :, :1], y.shape),
        np.broadcast_to(y[:, :1], y.shape),
        np.broadcast_to(y[..., :1], y.shape),
        np.asfortranarray(y),
        y[:, :, ::-1],
    ):
        caches = [sa.Cache(spec) for _ in range(2)]
        for cache, chunk in zip(caches, (laid, plain("q", laid)), strict=True):
            sa.attention(x, x, x, causal=True, cache=cache)
            cache.got = sa.attention(chunk, chunk, chunk, causal=True, cache=cache)  # type: ignore[attr-defined]
        got, want = (cache.got for cache in caches)  # type: ignore[attr-defined]
        assert got.tobytes() == want.tobytes()


def test_selection_after_the_softmax_takes_keys_of_stride_zero() -> None:
    q, k, v = small()
    k = np.broadcast_to(k[:, :, :1], k.shape)
    for spec in ("topk:3:placement=post", "perhead(2*topk:3:placement=post|2*dense)"):
        got = sa.attention(q, k, v, spec, return_lse=True)
        want = sa.attention(q, k.copy(), v, spec, return_lse=True)
        assert got.out.tobytes() == want.out.tobytes() and got.lse.tobytes() == want.lse.tobytes()
        grads = [sa.attention_vjp(q, x, v, spec).pullback(got.out) for x in (k, k.copy())]
        for one, two in zip(grads[0][:3], grads[1][:3], strict=True):
            assert one.tobytes() == two.tobytes()
