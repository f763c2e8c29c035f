"""float16 and bfloat16: stored so, computed in float32 to the bit, without float32 copies."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import SHAPES, SPECS, causals, fit, make_params, make_qkv, random_masks, requires
from core_calls import build, problem, spec_of
from reference import ops as reference

import sparseattn as sa
from sparseattn import _core
from sparseattn.half import is_half, narrow, store, widen
from sparseattn.weights import Weights

Array = np.ndarray
HALVES = ["float16", "bfloat16"]
MORE = ((2, 6, 2, 65, 131, 40, 24), (6, 3, 3, 5, 130, 16, 16), (2, 6, 2, 1, 4200, 16, 24))


def half_type(name: str) -> Any:
    """The dtype of that name; bfloat16 is of ml_dtypes, as users have it."""
    return np.float16 if name == "float16" else requires("ml_dtypes").bfloat16


@pytest.fixture(params=HALVES)
def half(request: pytest.FixtureRequest) -> Any:
    return half_type(request.param)


def bits(x: Array) -> Array:
    """Bit patterns, all NaN alike."""
    return np.where(np.isnan(x.astype(np.float32)), 0x7FFF, x.view(np.uint16))


def assert_same_half(got: Any, wide: Any) -> None:
    """``got`` is ``wide``, which was computed in float32, rounded once."""
    with np.errstate(over="ignore", invalid="ignore"):
        want = np.asarray(wide).astype(got.dtype)
    np.testing.assert_array_equal(bits(got), bits(want))


def both(half: Any, shape: tuple[int, ...], seed: int = 0) -> tuple[list[Array], list[Array]]:
    """q, k, v in half precision, and the same values in float32."""
    stored = [x.astype(half) for x in make_qkv(shape, seed=seed)]
    return stored, [x.astype(np.float32) for x in stored]


# ---- rounding -----------------------------------------------------------------------------------


def samples() -> Array:
    """Every half of both kinds, the middles between neighbours, and the floats beside those."""
    values = []
    for kind in ("f16", "bf16"):
        with np.errstate(all="ignore"):
            grid = np.sort(reference.widen(np.arange(0x7C00, dtype=np.uint16), kind))
            middle = (grid[:-1].astype(np.float64) + grid[1:]) / 2
            near = middle.astype(np.float32)
            values += [grid, near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.inf)]
    values.append(np.array([np.inf, 3.4e38, 65519.996, 65520, 2.0**-25, 2.0**-149], np.float32))
    both_signs = np.concatenate(values).astype(np.float32)
    return np.concatenate([both_signs, -both_signs])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_narrow_rounds_to_the_nearest_even(kind: str, isa: str) -> None:
    src = samples()
    out = np.zeros(src.shape, np.uint16)
    _core.narrow(src, kind, out)  # type: ignore[arg-type]
    np.testing.assert_array_equal(out, reference.narrow(src, kind))
    if kind == "f16":
        typed = np.zeros(src.shape, np.float16)
        _core.narrow(src, kind, typed)
        np.testing.assert_array_equal(typed.view(np.uint16), out)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_narrow_inverts_widen(kind: str, isa: str) -> None:
    """Infinities, subnormals and zeros of both signs; NaN keep sign and payload, made quiet."""
    src = np.arange(2**16, dtype=np.uint16)
    wide, back = np.zeros(2**16, np.float32), np.zeros(2**16, np.uint16)
    _core.widen(src, kind, wide)  # type: ignore[arg-type]
    _core.narrow(wide, kind, back)  # type: ignore[arg-type]
    quiet = 0x0200 if kind == "f16" else 0x0040
    np.testing.assert_array_equal(back, np.where(np.isnan(wide), src | quiet, src))


def test_narrow_refuses_what_does_not_fit() -> None:
    x, out = np.zeros(3, np.float32), np.zeros(3, np.uint16)
    wrong: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((x, "f8", out), ValueError, "kind must be 'f16' or 'bf16'"),
        ((x, None, out), ValueError, "kind must be 'f16' or 'bf16'"),
        ((x.astype("f8"), "f16", out), TypeError, "src must be float32"),
        ((x, "bf16", out.view("f2")), TypeError, r"out must be uint16 \(bfloat16\)"),
        ((x, "f16", out[:2]), ValueError, "out must have 3 entries"),
        ((x, "f16", x.view("u2")[:3]), ValueError, "out shares memory with src"),
    ]
    for args, error, words in wrong:
        with pytest.raises(error, match=words):
            _core.narrow(*args)
    _core.narrow(x[:0], "f16", out[:0])


def test_python_conversions_take_any_layout(half: Any) -> None:
    x = np.random.default_rng(0).standard_normal((6, 5, 4)).astype(np.float32)
    stored = x.astype(half).view(np.uint16 if half is not np.float16 else half)
    for cut in (np.s_[:], np.s_[::2, :, ::-1], np.s_[:0], np.s_[2:3, 3, 1]):
        values, wanted = x.T[cut], stored.T[cut]
        assert is_half(wanted) and not is_half(values)
        np.testing.assert_array_equal(narrow(values, stored.dtype), wanted)
        np.testing.assert_array_equal(widen(wanted), wanted_values := x.astype(half).T[cut])
        target = np.zeros_like(stored.T)
        store(target[cut], wanted_values.astype(np.float32))
        np.testing.assert_array_equal(target[cut], wanted)
        store(target[cut], wanted)
        np.testing.assert_array_equal(target[cut], wanted)
    store(target, np.ones(1, np.float32))
    np.testing.assert_array_equal(widen(target), np.ones_like(x.T))


# ---- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MORE, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_variant_is_float32_rounded_once(
    spec: Any, shape: tuple[int, ...], half: Any, isa: str
) -> None:
    """Out and lse for both kinds, whatever keys are selected, over paths of many and few rows."""
    shape = fit(spec, shape)
    stored, wide = both(half, shape, seed=3)
    bias = np.random.default_rng(9).standard_normal((shape[3], shape[4])).astype(half)
    terms: list[dict[str, Any]] = [{}, {"softcap": 3.0, "scale": 0.4, **random_masks(shape)}]
    params = make_params(spec, shape)
    for causal, more in zip(causals(spec)[-2:], terms, strict=True):
        call = {"params": params, "causal": causal, "return_lse": True, **more}
        got = sa.attention(*stored, spec, **call, bias=bias)
        want = sa.attention(*wide, spec, **call, bias=bias.astype(np.float32))
        assert got.out.dtype == half and got.lse.dtype == np.float32
        assert_same_half(got.out, want.out)
        np.testing.assert_array_equal(got.lse, want.lse)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_plan_is_that_of_float32(spec: Any, half: Any) -> None:
    shape = fit(spec, MORE[0])
    stored, wide = both(half, shape)
    call = {"params": make_params(spec, shape), "causal": True}
    plans = [sa.plan(q, k, spec, **call) for q, k in (stored[:2], wide[:2])]
    np.testing.assert_array_equal(*(plan.to_mask() for plan in plans))
    assert plans[0].count() == plans[1].count()
    out = sa.attention(*stored, plans[0])
    assert_same_half(out, sa.attention(*wide, plans[1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_for_any_threads(shape: tuple[int, ...], half: Any, with_threads: Any) -> None:
    stored, wide = both(half, shape)
    outs = []
    for n in (1, 2, 3, 5):
        with_threads(n)
        outs.append(sa.attention(*stored))
    assert all(out.tobytes() == outs[0].tobytes() for out in outs)
    assert_same_half(outs[0], sa.attention(*wide))


def odd_layouts(x: Array) -> dict[str, Array]:
    """The same values in other memory."""
    raw = np.zeros(x.nbytes + 1, np.uint8)
    misaligned = np.ndarray(x.shape, x.dtype, raw, 1)
    misaligned[...] = x
    spread_out = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    spread_out[..., ::2] = x
    wide_rows = np.zeros((*x.shape[:-1], x.shape[-1] + 5), x.dtype)
    wide_rows[..., 3:-2] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    return {
        "misaligned": misaligned,
        "gaps in the last axis": spread_out[..., ::2],
        "gaps after rows": wide_rows[..., 3:-2],
        "backward": np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1],
        "reversed last axis": np.ascontiguousarray(x[..., ::-1])[..., ::-1],
        "length first": np.ascontiguousarray(x.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3),
        "big-endian": x.astype(x.dtype.newbyteorder(">")),
        "read-only": frozen,
    }


def test_any_layout(half: Any, isa: str) -> None:
    stored, wide = both(half, (2, 4, 2, 33, 40, 16, 24))
    want = sa.attention(*wide, "topk:7", causal=True)
    layouts = [odd_layouts(x) for x in stored]
    for name in layouts[0]:
        out = sa.attention(*(each[name] for each in layouts), "topk:7", causal=True)
        assert_same_half(out, want)
    one = [np.broadcast_to(x[:1, :1], x.shape) for x in stored]
    assert_same_half(sa.attention(*one), sa.attention(*(x.astype(np.float32) for x in one)))


@pytest.mark.parametrize("zero", range(7))
def test_empty_sizes(zero: int, half: Any) -> None:
    shape = [2, 4, 2, 5, 9, 16, 8]
    shape[zero] = 0
    if zero in (1, 2, 5, 6):  # no heads, no width
        with pytest.raises(sa.ArgumentError):
            sa.attention(*both(half, tuple(shape))[0])
        return
    out, lse = sa.attention(*both(half, tuple(shape))[0], return_lse=True)
    assert out.shape == (shape[0], 4, shape[3], 8) and out.dtype == half
    if zero == 4:
        assert not out.astype(bool).any() and (lse == -np.inf).all()


# ---- special values -----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["dense", "window:20:sinks=3", "topk:9"])
def test_every_kind_of_value_passes(spec: str, half: Any, isa: str) -> None:
    """Bit patterns below 2 drawn at random, subnormals alone, and a few NaN and infinities."""
    rng = np.random.default_rng(5)
    shapes = [(1, 2, 70, 16), (1, 2, 90, 16), (1, 2, 90, 24)]
    tiny = 0x83FF if half is np.float16 else 0x807F
    for mask in (0xBFFF, tiny):
        patterns = (rng.integers(0, 2**16, shape, np.uint16) & np.uint16(mask) for shape in shapes)
        q, k, v = stored = [x.view(half) for x in patterns]
        for special in (False, True):
            if special:
                v[0, 0, 30, 3], v[0, 0, 50, 4], v[0, 1, 60, 0] = np.nan, np.inf, -np.inf
                v.view(np.uint16)[0, 1, 20, 7] = 0xFFFF
                q[0, 1, 55, 2], k[0, 1, 80, 5] = np.inf, np.nan
            wide = [x.astype(np.float32) for x in stored]
            got = sa.attention(*stored, spec, causal=True, scale=1.0)
            assert_same_half(got, sa.attention(*wide, spec, causal=True, scale=1.0))
            assert np.isnan(got.astype(np.float32)).any() == special


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_seen_changes_no_bit(bad: float, half: Any, isa: str) -> None:
    for n_q in (1, 40):
        q, k, v = both(half, (1, 2, 1, n_q, 60, 16, 24))[0]
        key_mask = np.arange(60)[None] < 50
        want = sa.attention(q, k, v, key_mask=key_mask)
        k[:, :, 50:], v[:, :, 50:] = bad, bad
        assert sa.attention(q, k, v, key_mask=key_mask).tobytes() == want.tobytes()
        assert np.isnan(sa.attention(q, k, v).astype(np.float32)).all()


def test_outputs_round_and_overflow_as_the_type_does(half: Any, isa: str) -> None:
    """One key: out is its value; two of equal weight: their mean, a tie on purpose. No warning."""
    one = np.ones((1, 1, 1, 16), half)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        v = np.array([1, 2, 0x3C00, 0x3C01, 0x7BFF, 0x0001, 0x8000], np.uint16).view(half)
        v = np.resize(v, (1, 1, 1, 40))
        assert_same_half(sa.attention(one, one, v), v.astype(np.float32) + np.float32(0))
        pair = np.stack([v, np.roll(v, 1, -1)], 2)[:, :, :, 0]
        two = np.ones((1, 1, 2, 16), half)
        mean = (pair[:, :, :1].astype(np.float32) + pair[:, :, 1:].astype(np.float32)) / 2
        assert_same_half(sa.attention(one, two, pair), mean + np.float32(0))
        big = np.full((1, 1, 2, 8), np.finfo(np.float16).max, half)
        wide = sa.attention(*(x.astype(np.float32) for x in (one, two, big)), scale=-0.5)
        assert_same_half(sa.attention(one, two, big, scale=-0.5), wide)


# ---- outputs ------------------------------------------------------------------------------------


def test_out_is_written_where_it_lies(half: Any, isa: str) -> None:
    stored, wide = both(half, (2, 4, 2, 33, 40, 16, 24))
    want = sa.attention(*wide, "topk:7:placement=post", causal=True)
    plain = np.zeros(want.shape, half)
    for name, out in {"plain": plain, **odd_layouts(plain)}.items():
        if name == "read-only":
            with pytest.raises(sa.ArgumentError, match="read-only"):
                sa.attention(*stored, out=out)
            continue
        out[...] = 7
        got = sa.attention(*stored, "topk:7:placement=post", causal=True, out=out)
        assert got is out and got.dtype == out.dtype
        assert_same_half(out.astype(half), want)


def test_out_must_fit(half: Any) -> None:
    q, k, v = both(half, (1, 2, 2, 5, 6, 16, 16))[0]
    wrong = [
        (np.zeros((1, 2, 5, 16), np.float32), sa.DtypeError, f"must have dtype {q.dtype.name}"),
        (np.zeros((1, 2, 5, 16), np.uint16), sa.DtypeError, "got uint16"),
        (q, sa.ArgumentError, "out must not overlap q"),
        (v[:, :, 1:], sa.ArgumentError, "out must not overlap v"),
    ]
    for out, error, words in wrong:
        with pytest.raises(error, match=words):
            sa.attention(q, k, v, out=out)


@pytest.mark.parametrize("spec", [None, "topk:3:placement=post"])
def test_weights_come_in_the_type_of_the_output(spec: Any, half: Any) -> None:
    stored, wide = both(half, (1, 2, 1, 9, 12, 16, 16))
    got = sa.attention(*stored, spec, return_weights=True, return_lse=True)
    want = sa.attention(*wide, spec, return_weights=True, return_lse=True)
    assert got.weights.dtype == half and got.lse.dtype == np.float32
    assert_same_half(got.weights, want.weights)


def test_rows_of_large_weights_are_float32(half: Any) -> None:
    stored, wide = both(half, (1, 1, 1, 2100, 2100, 16, 16))
    got, want = (sa.attention(*x, "topk:5", return_weights=True).weights for x in (stored, wide))
    assert type(got) is type(want) is Weights
    for a, b in zip(got.rows(0, 0, 1000, 1003), want.rows(0, 0, 1000, 1003), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


EXTRAS: dict[str, Any] = {
    "dropout": {"dropout_p": 0.3, "seed": 5},
    "sinks": {"params": {"sink": np.linspace(-2, 2, 6).astype(np.float32)}},
    "packed": {"cu_seqlens": (np.array([0, 30, 65]), np.array([0, 70, 131]))},
    "mass": {"return_weights": "mass"},
    "top weights": {"return_weights": "topn:4"},
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_else_a_call_does(extra: str, half: Any) -> None:
    stored, wide = both(half, MORE[0])
    for spec in ("dense", "window:20", "topk:9:placement=post"):
        call = {"causal": True, "return_lse": True, **EXTRAS[extra]}
        got, want = (sa.attention(*x, spec, **call) for x in (stored, wide))
        assert_same_half(got.out, want.out)
        np.testing.assert_array_equal(got.lse, want.lse)
        if got.weights is not None:  # counts and shares: computed, so float32
            for a, b in zip(np.atleast_1d(got.weights), np.atleast_1d(want.weights), strict=True):
                assert a.dtype == b.dtype != half
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["sink", "layout"])
def test_arrays_of_params_may_be_half(name: str, half: Any) -> None:
    """As any array they are widened; the core takes only what it asks for."""
    q, k, v = both(half, MORE[0])[0]
    values = np.linspace(-2, 2, 6).astype(half)
    if name == "layout":
        with pytest.raises(sa.DtypeError, match="layout must be bool"):
            sa.attention(q, k, v, "blockmask:64", params={name: np.ones((1, 2, 3), half)})
        return
    got = sa.attention(q, k, v, params={name: values})
    want = sa.attention(q, k, v, params={name: values.astype(np.float32)})
    assert got.tobytes() == want.tobytes()


def test_scaled_dot_product_attention(half: Any) -> None:
    (q, k, v), (wide_q, wide_k, wide_v) = both(half, MORE[0])
    mask = np.random.default_rng(4).standard_normal((65, 131)).astype(half)
    got = sa.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    wide = (wide_q, wide_k, wide_v, mask.astype(np.float32))
    assert_same_half(got, sa.scaled_dot_product_attention(*wide, enable_gqa=True))


@pytest.mark.parametrize("shape", (MORE[0], (2, 6, 2, 1, 131, 40, 24)), ids=str)
def test_the_backward_reads_halves(shape: tuple[int, ...], half: Any, isa: str) -> None:
    """The core's gradients are float32, and those of the widened arrays to the bit."""
    dout = np.random.default_rng(8).standard_normal((*shape[:2], shape[3], shape[6])).astype(half)
    for spec in ("dense", "window:20", "topk:9"):
        grads = []
        for arrays in both(half, shape):
            out, lse = sa.attention(*arrays, spec, causal=True, return_lse=True)
            made = sa.plan(*arrays[:2], spec, causal=True)
            out = out.astype(half)  # the same, rounded
            given = [*arrays, out, dout]
            if arrays[0].dtype != half:
                given = [x.astype(np.float32) for x in given]
            q, k, v, out, d = (x.view("u2") if x.dtype.name == "bfloat16" else x for x in given)
            delta = np.empty(lse.shape, np.float32)
            _core.attend_delta(out, d, None, delta)
            into = [np.empty(x.shape, np.float32) for x in (q, k, v)]
            core = made.pieces[0].core
            _core.attend_grad(q, k, v, core, made.problem, d, lse, delta, *into, None)
            grads.append([delta, *into])
        for a, b in zip(*grads, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_come_in_half(spec: Any, half: Any) -> None:
    """As of the widened arrays but for two roundings: of out, which delta reads, and their own."""
    shape = fit(spec, (2, 6, 2, 33, 40, 16, 24))
    stored, wide = both(half, shape)
    call = {"causal": True, "params": make_params(spec, shape)}
    got, want = (sa.attention_vjp(*x, spec, **call) for x in (stored, wide))
    dout = np.random.default_rng(8).standard_normal(got.out.shape).astype(half)
    ours, theirs = got.pullback(dout, None), want.pullback(dout.astype(np.float32), None)
    eps, least = (2.0**-11, 2.0**-24) if half is np.float16 else (2.0**-8, 2.0**-133)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert a.dtype == half
        error = np.abs(a.astype(np.float32) - b)
        assert (error <= eps * (np.abs(b) + 2 * np.abs(b).max()) + least).all()


def test_merge_of_halves(half: Any) -> None:
    (q, k, v), _ = both(half, (2, 4, 2, 33, 70, 16, 24))
    cuts = [slice(0, 30), slice(30, 31), slice(31, 70)]
    parts = [sa.attention(q, k[:, :, c], v[:, :, c], return_lse=True) for c in cuts]
    wide = [(part.out.astype(np.float32), part.lse) for part in parts]
    got, want = sa.merge(parts), sa.merge(wide)
    assert got.out.dtype == half and got.lse.dtype == np.float32
    assert_same_half(got.out, want.out)
    np.testing.assert_array_equal(got.lse, want.lse)


# ---- what may meet ------------------------------------------------------------------------------


def core_run(q: Array, k: Array, v: Array, out: Array) -> tuple[Array, Array]:
    lse = np.empty(q.shape[:3], np.float32)
    plan = build("topk", q, k)
    _core.attend(q, k, v, plan, problem(), out, lse)
    return out, lse


def test_the_core_takes_caches_of_another_type(half: Any, isa: str) -> None:
    """q and out of one type or out of the real one; k and v float32 or either half."""
    stored, wide = both(half, (2, 4, 2, 70, 130, 16, 24))
    q, k, v = (x.view(np.uint16) if half is not np.float16 else x for x in stored)
    shape = (2, 4, 70, 24)
    want, lse = core_run(*wide, np.empty(shape, np.float32))
    for a, b, c in [(q, k, v), (wide[0], k, v), (wide[0], wide[1], v), (q, wide[1], wide[2])]:
        for dtype in {a.dtype, np.dtype(np.float32)}:
            out, got_lse = core_run(a, b, c, np.empty(shape, dtype))
            np.testing.assert_array_equal(got_lse, lse)
            assert out.tobytes() == (want if dtype == np.float32 else narrow(want, dtype)).tobytes()
    other = v.view(np.uint16 if v.dtype == np.float16 else np.float16)
    np.testing.assert_array_equal(
        core_run(wide[0], k, other, np.empty(shape, np.float32))[0],
        core_run(wide[0], wide[1], widen(other), np.empty(shape, np.float32))[0],
    )
    scores = _core.score_rows(q, k, problem(), 1, 2, 3, 50)
    np.testing.assert_array_equal(scores, _core.score_rows(*wide[:2], problem(), 1, 2, 3, 50))


def test_float64_goes_alone() -> None:
    q, k, v = make_qkv((2, 4, 2, 5, 9, 16, 24))
    out = np.empty((2, 4, 5, 24), np.float32)
    f2, f4, f8 = (lambda x: x.astype("f2")), (lambda x: x), (lambda x: x.astype("f8"))
    cases = [
        ((f8, f2, f8), "k is float16 but q is float64"),
        ((f8, f8, f4), "v is float32 but q is float64"),
        ((f2, f2, f8), "v is float64 but q is float16"),
    ]
    for casts, words in cases:
        a, b, c = (cast(x) for cast, x in zip(casts, (q, k, v), strict=True))
        with pytest.raises(_core.DtypeError, match=words):
            _core.attend(a, b, c, build("dense", q, k), problem(), out, None)
        with pytest.raises(sa.DtypeError, match="convert one of them"):
            sa.attention(a, b, c)
    with pytest.raises(_core.DtypeError, match="k is float64 but q is float16"):
        _core.plan_build("topk", *spec_of("topk"), f2(q), f8(k), problem())


def test_the_core_refuses_other_outputs() -> None:
    q, k, v = (x.astype("f2") for x in make_qkv((2, 4, 2, 5, 9, 16, 24)))
    plan = build("dense", q, k)
    for dtype in ("u2", "f8"):
        with pytest.raises(_core.DtypeError, match="out must be float32 or float16"):
            _core.attend(q, k, v, plan, problem(), np.empty((2, 4, 5, 24), dtype), None)
    with pytest.raises(_core.DtypeError, match="bias must be float32"):
        bias = np.zeros((2, 4, 5, 9), "f2")
        _core.attend(q, k, v, plan, problem(1, bias=bias), np.empty((2, 4, 5, 24), "f2"), None)


def test_plain_uint16_is_not_bfloat16() -> None:
    q, k, v = (x.astype(np.uint16) for x in make_qkv((1, 2, 2, 5, 9, 16, 16)))
    with pytest.raises(sa.DtypeError, match="q has dtype uint16, not float32"):
        sa.attention(q, k, v)


def test_halves_of_two_kinds_do_not_meet_at_the_door() -> None:
    q, k, v = (x.astype(np.float16) for x in make_qkv((1, 2, 2, 5, 9, 16, 16)))
    other = half_type("bfloat16")
    with pytest.raises(sa.DtypeError, match="v is bfloat16 and q is float16"):
        sa.attention(q, k, v.astype(other))
    with pytest.raises(sa.DtypeError, match="k is float16 and q is float32"):
        sa.attention(q.astype(np.float32), k, v)
    with pytest.raises(sa.DtypeError, match="mask has dtype bfloat16, not bool"):
        sa.attention(q, k, v, mask=np.ones((5, 9), other))


def test_no_package_of_bfloat16_is_imported() -> None:
    code = (
        "import sys, numpy as np, sparseattn as sa\n"
        "x = np.ones((1, 2, 9, 16), np.float16)\n"
        "sa.attention(x, x, x, 'topk:3')\n"
        "assert 'ml_dtypes' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["dense", "window:64", "topk:8", "topk:8:placement=post"])
def test_no_float32_copy_of_the_keys(spec: str, half: Any, clean_memory: None) -> None:
    """Beside the output NumPy's side takes less than k, not to speak of k in float32, and the core
    what it takes for float32. Selection after the softmax adds a column to k in k's own type."""
    stored, wide = both(half, (1, 1, 1, 64, 65_536, 64, 64))
    (python, core), (_, usual) = (peaks(spec, *x) for x in (stored, wide))
    assert python <= stored[1].nbytes * (5 if "post" in spec else 1) // 4
    assert core <= usual


def peaks(spec: str, q: Array, k: Array, v: Array) -> tuple[int, int]:
    """Most bytes held during a call by NumPy and by the core, beside what was there before."""
    sa.attention(q, k[:, :, :256], v[:, :, :256], spec, causal=True)
    _core.trim()
    before = _core.live_bytes()
    _core.peak_reset()
    tracemalloc.start()
    sa.attention(q, k, v, spec, causal=True)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return python, _core.peak_bytes() - before


# ---- PyTorch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HALVES)
def test_tensors_are_read_and_written_in_place(torch: ModuleType, name: str) -> None:
    from sparseattn.inputs import to_array

    dtype = getattr(torch, name)
    wide = [torch.from_numpy(np.ascontiguousarray(x)) for x in make_qkv((2, 4, 2, 9, 11, 16, 8))]
    q, k, v = stored = [x.to(dtype) for x in wide]
    for x in stored:
        array, stored_name = to_array("x", x)
        assert stored_name == name and array.ctypes.data == x.data_ptr()
    wide = [x.float() for x in stored]
    want = sa.attention(*wide, "topk:5", causal=True)
    out = sa.attention(*stored, "topk:5", causal=True)
    assert out.dtype == dtype and torch.equal(out, want.to(dtype))
    for target in (torch.empty_like(out), torch.empty(9, 4, 2, 8, dtype=dtype).permute(2, 1, 0, 3)):
        assert sa.attention(*stored, "topk:5", causal=True, out=target) is target
        assert torch.equal(target, out)
    gaps = torch.empty(2, 4, 9, 16, dtype=dtype)[..., ::2]
    assert torch.equal(sa.attention(*stored, "topk:5", causal=True, out=gaps), out)
    parts = [sa.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in np.s_[:5, 5:]]
    joined = sa.merge(parts)
    assert joined.out.dtype == dtype and joined.lse.dtype == torch.float32
    bias = torch.randn(9, 11, dtype=dtype)
    biased = sa.attention(*wide, bias=bias.float()).to(dtype)
    assert torch.equal(sa.attention(*stored, bias=bias), biased)
    assert torch.equal(sa.scaled_dot_product_attention(q, q, q, bias[:, :9]), biased_sdpa(q, bias))


def biased_sdpa(q: Any, bias: Any) -> Any:
    x = q.float()
    return sa.scaled_dot_product_attention(x, x, x, bias[:, :9].float()).to(q.dtype)
