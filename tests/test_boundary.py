"""What crosses into C: arrays as they are, options, outputs; either right or clearly refused."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from core_calls import DV, NK, NQ, Array, B, D, H, attend, build, make, problem, spec_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from sparseattn import _core

# ---- dtypes and layouts ----


@pytest.mark.parametrize("which", range(3), ids="qkv")
@pytest.mark.parametrize("dtype", ["i8", "i4", "c8", "?", "O", "U1", "S1", "M8[s]", ">f4"])
def test_wrong_dtypes_are_refused(which: int, dtype: str) -> None:
    arrays = list(make())
    arrays[which] = np.zeros(arrays[which].shape, dtype)
    plan = build("dense", *make()[:2])
    with pytest.raises(_core.DtypeError, match=rf"^{'qkv'[which]} must be float32 or float64"):
        attend(*arrays, parts=plan, out=np.empty((B, H, NQ, DV), "f4"))


def test_mixed_dtypes_are_refused() -> None:
    q, k, v = make()
    with pytest.raises(_core.DtypeError, match="v is float64 but q is float32"):
        attend(q, k, v.astype("f8"))


@pytest.mark.parametrize("thing", [None, [[1.0]], "q", 3, memoryview(b"1234")], ids=repr)
def test_no_array_is_refused(thing: Any) -> None:
    _, k, _ = make()
    with pytest.raises(_core.DtypeError, match=r"q must be a NumPy array, got .*; use np.asarray"):
        _core.plan_build("dense", *spec_of("dense"), thing, k, problem())


@pytest.mark.parametrize("axes", [0, 1, 3, 5])
def test_wrong_number_of_axes_is_refused(axes: int) -> None:
    _, k, _ = make()
    with pytest.raises(_core.ArgumentError, match=f"q must have 4 axes, got {axes}"):
        _core.plan_build("dense", *spec_of("dense"), np.ones((1,) * axes, "f4"), k, problem())


@pytest.mark.parametrize("step", [2, -1, 0])
def test_last_axis_must_be_contiguous(step: int) -> None:
    q, k, v = make()
    bad = as_strided(np.zeros(2 * D, "f4")[D:], q.shape, (0, 0, 0, 4 * step))
    with pytest.raises(_core.ArgumentError, match=rf"last axis of q .*{step} elements.*ascontig"):
        attend(bad, k, v, parts=build("dense", q, k))


def test_misaligned_arrays_are_refused() -> None:
    q, k, v = make()
    raw = np.zeros(q.nbytes + 1, np.uint8)
    bad = raw[1:].view("f4").reshape(q.shape)
    with pytest.raises(_core.ArgumentError, match="q must be aligned"):
        attend(bad, k, v, parts=build("dense", q, k))


def test_odd_strides_are_refused() -> None:
    q, k, v = make()
    packed = np.zeros((B, H, NQ), np.dtype([("row", "f4", (D,)), ("tail", "i2")]))["row"]
    assert packed.strides[2] % 4
    with pytest.raises(_core.ArgumentError, match="q "):
        attend(packed, k, v, parts=build("dense", q, k))


@st.composite
def layouts(draw: st.DrawFn, axes: int = 3) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """An order of the leading axes in memory and a step of each: backwards, spread, repeated."""
    order = draw(st.permutations(range(axes)))
    steps = draw(st.tuples(*[st.sampled_from([1, -1, 2, -3, 0])] * axes))
    return tuple(order), steps


def laid_out(array: Array, layout: tuple[tuple[int, ...], tuple[int, ...]], bits: int) -> Array:
    """The same values (those of index 0 along repeated axes) behind other strides."""
    order, steps = layout
    for axis, step in enumerate(steps):
        if step == 0:
            array = np.repeat(array.take([0], axis), array.shape[axis], axis)
    tail = array.ndim - len(order)
    spread = [n * max(abs(s), 1) for n, s in zip(array.shape, steps, strict=False)]
    rest = array.shape[len(order) :]
    memory = np.full([spread[a] for a in order] + list(rest), bits, np.uint8).astype(array.dtype)
    view = memory.transpose(*np.argsort(order), *range(len(order), len(order) + tail))
    view = view[tuple(slice(None, None, s or None) for s in steps)]
    view[...] = array
    for axis, step in enumerate(steps):
        if step == 0:
            first = view.take([0], axis)
            view = np.broadcast_to(first, view.shape)
    return view


@pytest.mark.promise("B1")
@settings(max_examples=60, deadline=None)
@given(st.tuples(*[layouts()] * 3), layouts(2), st.sampled_from(["f4", "f8"]), st.integers(0, 9))
def test_any_layout_gives_the_same_bits(views: Any, out_layout: Any, dtype: str, seed: int) -> None:
    arrays = [laid_out(a, view, 77) for a, view in zip(make(dtype, seed), views, strict=True)]
    plain = [np.ascontiguousarray(a) for a in arrays]
    before = [a.copy() for a in plain]
    bias = np.broadcast_to(np.linspace(0, 1, NQ, dtype=dtype)[:, None], (B, H, NQ, NK))
    out = np.empty((H, NQ, 2, B, DV), dtype)[:, ::-1, 1].transpose(2, 0, 1, 3)
    got = attend(*arrays, of=problem(bias=bias), out=out)
    want = attend(*plain, of=problem(bias=np.ascontiguousarray(bias)))
    assert got[0].tobytes() == want[0].tobytes()
    assert got[1].tobytes() == want[1].tobytes()
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))
    scores = [_core.score_rows(x[0], x[1], problem(), 1, 3, 5, 69) for x in (arrays, plain)]
    assert scores[0].tobytes() == scores[1].tobytes()


def test_masks_take_any_strides() -> None:
    q, k, v = make()
    rng = np.random.default_rng(1)
    mask = rng.random((H, NK, NQ, B)) < 0.5
    key_mask = np.asfortranarray(rng.random((B, NK)) < 0.8)
    views = problem(mask=mask.transpose(3, 0, 2, 1), key_mask=key_mask)
    copies = [np.ascontiguousarray(x) for x in (views[3], key_mask)]
    got, want = (
        attend(q, k, v, of=views),
        attend(q, k, v, of=problem(1, copies[0], None, copies[1])),
    )
    assert got[0].tobytes() == want[0].tobytes()
    assert not np.array_equal(got[0], attend(q, k, v)[0])


# ---- outputs ----


def test_out_must_fit() -> None:
    q, k, v = make()
    for shape, axis in [((B, H, NQ, DV + 1), -1), ((B, H, NQ - 1, DV), -2), ((1, H, NQ, DV), -4)]:
        with pytest.raises(_core.ArgumentError, match=f"out must have .* axis {axis}, got"):
            attend(q, k, v, out=np.empty(shape, "f4"))
    with pytest.raises(_core.DtypeError, match="out must be float32"):
        attend(q, k, v, out=np.empty((B, H, NQ, DV), "f8"))
    with pytest.raises(_core.DtypeError, match="lse must be float32"):
        plan, out = build("dense", q, k), np.empty((B, H, NQ, DV), "f4")
        _core.attend(q, k, v, plan, problem(), out, np.empty((B, H, NQ), "f8"))


def test_read_only_out_is_refused() -> None:
    q, k, v = make()
    out = np.zeros((B, H, NQ, DV), "f4")
    out.flags.writeable = False
    with pytest.raises(_core.ArgumentError, match="out is read-only"):
        attend(q, k, v, out=out)
    assert not out.any()


def test_out_that_overlaps_itself_is_refused() -> None:
    q, k, v = make()
    memory = np.empty((B, H, NQ, DV), "f4")
    for strides in [(0, *memory.strides[1:]), (*memory.strides[:2], 4 * (DV - 1), 4)]:
        with pytest.raises(_core.ArgumentError, match="out overlaps itself"):
            attend(q, k, v, out=as_strided(memory, memory.shape, strides))


@pytest.mark.promise("B2")
@pytest.mark.parametrize("which", ["q", "k", "v", "bias", "lse"])
def test_out_that_overlaps_an_input_is_refused(which: str) -> None:
    n, d = 64, 16
    memory = np.zeros((2, n + 1, d), "f4")
    arrays = {name: np.ones((1, 1, n, d), "f4") for name in "qkv"}
    bias, lse = np.ones((1, 1, n, n), "f4"), np.ones((1, 1, n), "f4")
    if which in arrays:
        arrays[which] = memory[None, :1, 1:]
    elif which == "bias":
        bias = memory.reshape(-1)[: n * n // 2]
        bias = as_strided(bias, (1, 1, n, n), (0, 0, 64, 4))
    else:
        lse = memory[None, :1, 5:, 3][:, :, :n] if n <= n - 4 else memory.reshape(1, 1, -1)[..., :n]
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    plan = build("dense", q, k, problem(0))
    before = memory.copy()
    with pytest.raises(_core.ArgumentError, match=f"out shares memory with {which}; pass a new"):
        _core.attend(q, k, v, plan, problem(0, bias=bias), memory[None, :1, :n], lse)
    assert np.array_equal(memory, before)


def test_out_interleaved_with_an_input_is_taken() -> None:
    q, k, v = make()
    memory = np.zeros((B, H, NQ, D + DV), "f4")
    memory[..., :D] = q
    got = attend(memory[..., :D], k, v, out=memory[..., D:])
    assert got[0].tobytes() == attend(q, k, v)[0].tobytes()
    assert np.array_equal(memory[..., :D], q)


# ---- sizes ----

HUGE = [
    (1, 1, 2**40, 64),
    (1, 1, 2**31, 64),
    (2**40, 1, 1, 1),
    (1, 2**40, 1, 1),
    (1, 1, 1, 2**40),
    (2**31 + 1, 1, 1, 16),
    (2**30, 2**20, 2**8, 1),
    (2**20, 2**10, 2**29, 1),
]


@pytest.mark.promise("B3")
@pytest.mark.parametrize("shape", HUGE, ids=str)
@pytest.mark.parametrize("which", ["q", "k", "both"])
def test_huge_shapes_are_refused_at_once(shape: tuple[int, ...], which: str) -> None:
    wide = shape[3] > 64  # no memory is that wide: its stride is 0, which is a fault of its own
    row = np.zeros(1 if wide else 64, "f4")
    huge = as_strided(row, shape, (0, 0, 0, 0 if wide else 4))
    small = np.zeros((1, 1, 1, 1 if wide else shape[3]), "f4")
    q, k = {"q": (huge, small), "k": (small, huge), "both": (huge, huge)}[which]
    plan = build("dense", small, small)
    _core.trim()
    _core.peak_reset()
    start, live = time.perf_counter(), _core.live_bytes()
    for name in _core.variants():
        with pytest.raises((ValueError, MemoryError)):
            build(name, q, k)
    with pytest.raises((ValueError, MemoryError)):
        _core.attend(q, k, k, plan, problem(), np.empty((1, 1, 1, 1), "f4"), None)
    with pytest.raises((ValueError, MemoryError)):
        _core.score_rows(q, k, problem(), 0, 0, 0, 1)
    assert time.perf_counter() - start < 0.05 * (len(_core.variants()) + 2)
    assert _core.peak_bytes() - live < 20e6


def test_empty_arrays_give_empty_results() -> None:
    q, k, v = make()
    out, lse = attend(q[:, :, :0], k, v)
    assert out.shape == (B, H, 0, DV)
    out, lse = attend(q[:0], k[:0], v[:0])
    assert out.shape == (0, H, NQ, DV)
    out, lse = attend(q, k[:, :, :0], v[:, :, :0])
    assert not out.any() and (lse == -np.inf).all()


# ---- problems and options ----


def test_problem_faults_are_named() -> None:
    q, k, _ = make()
    mask = np.ones((B, H, NQ, NK), bool)
    cases = [
        ((1, 0.25), "problem must be a tuple"),
        ([*problem()], "problem must be a tuple"),
        ((3, 0.25, 0.0, None, None, None), r"causal must be in \[0, 2\], got 3"),
        ((0, np.nan, 0.0, None, None, None), "scale must be finite"),
        ((0, "a", 0.0, None, None, None), "scale must be a number, got 'a'"),
        ((0, 0.25, -1.0, None, None, None), "softcap"),
        (problem(mask=mask[..., 1:]), "mask has shape .* axis 3"),
        (problem(mask=mask.astype("i4")), "mask must be bool"),
        (problem(mask=mask[0]), "mask must have 4 axes, got 3"),
        (problem(bias=mask), "bias must be float32 or float64"),
        (problem(bias=np.ones(mask.shape)), "bias must be float32 as q is"),
        (problem(key_mask=mask[0, 0, :1, 1:]), "key_mask has shape"),
    ]
    for bad, words in cases:
        with pytest.raises(_core.SparseAttnError, match=words):
            _core.plan_build("dense", *spec_of("dense"), q, k, bad)


class TopK:
    def __init__(self, k: object, placement: object = "pre") -> None:
        self.k, self.placement = k, placement


def test_option_faults_name_class_field_range_and_value() -> None:
    q, k, _ = make()

    def message(name: str, spec: object, params: Any = None) -> str:
        with pytest.raises(_core.SparseAttnError) as caught:
            _core.plan_build(name, spec, params, q, k, problem())
        return str(caught.value)

    assert message("topk", TopK(0)) == "TopK.k must be in [1, 1073741824], got 0"
    assert message("topk", TopK(10**30)).endswith(f"got {10**30}")
    assert message("topk", TopK(2.5)) == "TopK.k must be an integer, got 2.5"
    spec, _ = spec_of("blockmask")
    assert 'pass params={"layout": ...} with a bool array' in message("blockmask", spec)
    assert "layout" in message("blockmask", spec, {"layout": [[True]]})
    assert "layout must be bool" in message("blockmask", spec, {"layout": np.ones((1, 2, 3))})
    spec, _ = spec_of("window")
    spec.globals = tuple(range(65))  # type: ignore[attr-defined]
    assert message("window", spec).endswith(".globals must have at most 64 entries, got 65")
    spec.globals = 3  # type: ignore[attr-defined]
    assert message("window", spec).endswith(".globals must be a tuple of integers, got 3")
    spec.globals = (1, "b")  # type: ignore[attr-defined]
    assert message("window", spec).endswith(".globals must be an integer, got 'b'")
    words = message("tpok", TopK(1))
    assert words.startswith("name must be one of ['dense'") and words.endswith("got 'tpok'")


def test_describe_names_types_and_ranges() -> None:
    described = {field: rest for field, *rest in _core.describe("topk")}
    assert described["k"] == ["int", 1, 2**30, None]
    for name in _core.variants():
        for _, kind, low, high, words in _core.describe(name):
            assert kind in {"int", "float", "bool", "enum", "ints", "array"}
            assert (low is not None and low <= high) == (kind in {"int", "float", "ints"})
            assert (words is not None) == (kind == "enum")


def test_positional_only_with_the_right_count() -> None:
    with pytest.raises(TypeError, match=r"attend\(\) takes 7 positional arguments but 1 were"):
        _core.attend(None)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="keyword"):
        _core.select_largest(s=np.zeros(3), count=1)  # type: ignore[call-arg]


def test_parts_are_checked() -> None:
    q, k, v = make()
    plan = build("dense", q, k)
    good = ((plan, 0, 2), (plan, 2, H))
    assert attend(q, k, v, good)[0].tobytes() == attend(q, k, v, plan)[0].tobytes()
    for parts, error in [
        (None, _core.DtypeError),
        ((), _core.ArgumentError),
        (((plan, 0, 2),), _core.ArgumentError),
        (((plan, 0, 2), (plan, 3, 4)), _core.ArgumentError),
        (((plan, 2, 4), (plan, 0, 2)), _core.ArgumentError),
        (((plan, 0, H + 1),), _core.ArgumentError),
        (((plan, 0),), _core.DtypeError),
        (((q, 0, H),), _core.DtypeError),
        ((plan,) * (H + 1), _core.ArgumentError),
        (build("dense", q[:, :, 1:], k), _core.ArgumentError),
        (build("dense", q, k[:, :, 1:]), _core.ArgumentError),
        (build("dense", q[:, :2], k), _core.ArgumentError),
    ]:
        out, lse = np.empty((B, H, NQ, DV), "f4"), np.empty((B, H, NQ), "f4")
        with pytest.raises(error):
            _core.attend(q, k, v, parts, problem(), out, lse)
