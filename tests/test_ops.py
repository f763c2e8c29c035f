"""Operators of models against float64 definitions: norms, activations, positions, losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import assert_no_worse
from reference import ops as reference

import sparseattn as sa
from sparseattn import _core

Array = np.ndarray
KINDS = ["gelu_tanh", "gelu", "silu", "relu"]
DTYPES = [np.float32, np.float64]
WIDTHS = [1, 3, 8, 16, 37, 257]
EPS = 1e-5


def random(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def norm(
    kind: str, x: Array, weight: Array | None, bias: Array | None, out: Array | None = None
) -> Array:
    out = np.full_like(x, np.nan) if out is None else out
    if kind == "rms":
        _core.rms_norm(x, weight, EPS, out)
    else:
        _core.layer_norm(x, weight, bias, EPS, out)
    return out


def activate(kind: str, x: Array, gate: Array | None = None) -> Array:
    out = np.full_like(x, np.nan)
    _core.activate(kind, x, gate, out)
    return out


# ---- norms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("kind", ["rms", "layer", "plain layer"])
def test_norm_matches_reference(kind: str, dim: int, dtype: Any, isa: str) -> None:
    x = random(65, dim, dtype=dtype) * 3 + 1
    weight = None if kind == "plain layer" else random(dim, dtype=dtype, seed=1)
    bias = random(dim, dtype=dtype, seed=2) if kind == "layer" else None

    def by_hand(compute: Any) -> Array:
        if kind == "rms":
            return reference.rms_norm(x, weight, EPS, compute=compute)
        return reference.layer_norm(x, weight, bias, EPS, compute=compute)

    ours = norm(kind, x, weight, bias)
    assert_no_worse(ours, by_hand(np.float64), than=by_hand(dtype))
    again = x.copy()
    assert np.array_equal(norm(kind, again, weight, bias, out=again), ours), "in place"


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_far_from_zero(kind: str, isa: str) -> None:
    """A mean 10,000 times the deviation, and rows whose squares leave float32."""
    weight, bias = np.ones(300, np.float32), np.zeros(300, np.float32)
    for x in (random(4, 300) + np.float32(1e4), random(4, 300) * np.float32(1e30)):
        if kind == "rms":
            want = reference.rms_norm(x, weight, EPS)
        else:
            want = reference.layer_norm(x, weight, bias, EPS)
        np.testing.assert_allclose(norm(kind, x, weight, bias), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_keeps_nan_in_its_row(kind: str, isa: str) -> None:
    x, weight, bias = random(9, 37), random(37, seed=1), random(37, seed=2)
    want = norm(kind, x, weight, bias)
    x[4, 36] = np.nan
    ours = norm(kind, x, weight, bias)
    assert np.isnan(ours[4]).all()
    assert np.array_equal(np.delete(ours, 4, 0), np.delete(want, 4, 0))


# ---- elementwise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_activate_matches_reference(kind: str, dtype: Any, isa: str) -> None:
    """Relative to the value, tails included, down to where its neighbours are subnormal."""
    x = np.concatenate([np.linspace(-12, 12, 20011), 3 * random(500, 1)[:, 0]]).astype(dtype)
    gate = random(1, len(x), dtype=dtype)
    bound = 1.5e-7 if dtype == np.float32 else 1e-13
    for g in (None, gate):
        ours, want = activate(kind, x[None], g), reference.activate(kind, x[None], g)
        error = np.abs(ours - want)
        assert (error <= bound * np.abs(want) + np.finfo(dtype).tiny).all(), error.max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_activate_at_the_ends(kind: str, dtype: Any, isa: str) -> None:
    big = np.sqrt(np.finfo(dtype).max)
    x = np.array([[0.0, 1000.0, big, np.inf, -1000.0, -big, np.nan]], dtype)
    y = activate(kind, x)[0]
    assert y[0] == 0 and (y[1:4] == x[0, 1:4]).all()
    assert (y[4:6] == 0).all()
    assert np.isnan(y[6])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_activate_any_width_and_in_place(width: int, dtype: Any, isa: str) -> None:
    x, gate = random(3, width, dtype=dtype), random(3, width, dtype=dtype, seed=1)
    want = activate("silu", x, gate)
    np.testing.assert_allclose(want, reference.activate("silu", x, gate), rtol=3e-7, atol=0)
    for place in (0, 1):
        arrays = [x.copy(), gate.copy()]
        _core.activate("silu", arrays[0], arrays[1], arrays[place])
        assert np.array_equal(arrays[place], want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add(dtype: Any) -> None:
    x, z = random(70, 257, dtype=dtype), random(70, 257, dtype=dtype, seed=1)
    for out in (np.empty_like(x), x.copy(), z.copy()):
        a, b = (out if np.array_equal(out, given) else given for given in (x, z))
        _core.add(a, b, out)
        assert np.array_equal(out, x + z)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_widen_every_pattern(kind: str, isa: str) -> None:
    src = np.arange(2**16, dtype=np.uint16)
    out = np.zeros(2**16, np.float32)
    _core.widen(src, kind, out)
    want = reference.widen(src, kind)
    assert np.array_equal(np.isnan(out), np.isnan(want))
    numbers = ~np.isnan(want)
    assert np.array_equal(out[numbers].view(np.uint32), want[numbers].view(np.uint32))


# ---- positions -----------------------------------------------------------------------------------


def angles(positions: int, half: int, dtype: Any) -> tuple[Array, Array]:
    angle = np.outer(np.arange(positions), 10000.0 ** (-np.arange(half) / half))
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "half"), [(16, 8), (40, 20), (6, 3), (16, 4), (5, 1), (8, 0)])
def test_rope_matches_reference(dim: int, half: int, dtype: Any) -> None:
    x, (cos, sin) = random(65, 3, dim, dtype=dtype), angles(40, half, dtype)
    pos = np.random.default_rng(3).integers(0, 40, 65).astype(np.int32)
    want = reference.rope(x, cos, sin, pos)
    ours = x.copy()
    _core.rope(ours, cos, sin, pos)
    np.testing.assert_allclose(ours, want, rtol=0, atol=4 * np.finfo(dtype).eps * np.abs(x).max())
    assert np.array_equal(ours[..., 2 * half :], x[..., 2 * half :])


def test_rope_scores_depend_on_distance() -> None:
    (cos, sin), q, k = angles(200, 8, np.float64), random(1, 1, 16), random(1, 1, 16, seed=1)

    def score(i: int, j: int) -> float:
        a, b = q.astype(np.float64), k.astype(np.float64)
        _core.rope(a, cos, sin, np.array([i], np.int32))
        _core.rope(b, cos, sin, np.array([j], np.int32))
        return float((a * b).sum())

    assert score(17, 5) == pytest.approx(score(190, 178), abs=1e-12)
    assert score(17, 5) != pytest.approx(score(17, 6), abs=1e-3)


# ---- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 33, 257, 5003])
def test_losses_match_reference(vocab: int, dtype: Any, isa: str) -> None:
    base, other = random(33, vocab, dtype=dtype) * 4, random(33, vocab, dtype=dtype, seed=1) * 4
    target = np.random.default_rng(5).integers(0, vocab, 33).astype(np.int32)
    nll, best = _core.nll(base, target)
    assert (nll.dtype, best.dtype) == (np.float64, np.int32)
    np.testing.assert_allclose(nll, reference.nll(base, target), rtol=1e-14, atol=1e-14)
    assert np.array_equal(best, base.argmax(-1))
    np.testing.assert_allclose(
        _core.kl(base, other), reference.kl(base, other), rtol=1e-13, atol=1e-14
    )


def test_a_large_vocabulary(isa: str) -> None:
    base = random(2, 200_003) * 5
    base[1] -= 1000
    other = base + np.float32(1e-3) * random(2, 200_003, seed=1)
    target = np.array([200_002, 0], np.int32)
    np.testing.assert_allclose(_core.nll(base, target)[0], reference.nll(base, target), rtol=1e-13)
    np.testing.assert_allclose(_core.kl(base, other), reference.kl(base, other), rtol=0, atol=1e-13)


def test_tiny_divergence(isa: str) -> None:
    """Differences of 1e-6 in the logits: divergences near 1e-13, known to 1 %."""
    base = random(20, 500, dtype=np.float64) * 3
    other = base + 1e-6 * random(20, 500, dtype=np.float64, seed=1)
    want = reference.kl(base, other)
    assert want.max() < 1e-11
    np.testing.assert_allclose(_core.kl(base, other), want, rtol=0.01, atol=1e-15)
    assert (_core.kl(base, base) == 0).all()
    assert (_core.kl(base, other) >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_impossible_tokens(dtype: Any, isa: str) -> None:
    base, other = random(4, 37, dtype=dtype), random(4, 37, dtype=dtype, seed=1)
    base[:, 5] = -np.inf
    other[1:, 5] = -np.inf
    other[2, 9] = -np.inf
    target = np.array([5, 0, 9, 36], np.int32)
    nll, best = _core.nll(base, target)
    assert nll[0] == np.inf and np.isfinite(nll[1:]).all()
    assert np.array_equal(best, base.argmax(-1))
    kl = _core.kl(base, other)
    assert kl[2] == np.inf
    np.testing.assert_allclose(kl[[0, 1, 3]], reference.kl(base, other)[[0, 1, 3]], rtol=1e-13)


@pytest.mark.parametrize("at", [0, 20, 36])
def test_losses_keep_nan_in_its_row(at: int, isa: str) -> None:
    base, other, target = random(5, 37), random(5, 37, seed=1), np.zeros(5, np.int32)
    (nll, best), kl = _core.nll(base, target), _core.kl(base, other)
    base[2, at] = np.nan
    (nll2, best2), kl2 = _core.nll(base, target), _core.kl(base, other)
    assert np.isnan(nll2[2]) and np.isnan(kl2[2]) and best2[2] == at
    rest = [0, 1, 3, 4]
    assert np.array_equal(nll2[rest], nll[rest]) and np.array_equal(kl2[rest], kl[rest])
    assert np.array_equal(best2[rest], best[rest])
    assert np.isnan(_core.kl(other, base)[2])


def test_ties_go_to_the_lower_index(isa: str) -> None:
    logits = np.zeros((5, 100), np.float32)
    logits[1, [40, 70]] = 1
    logits[2, [97, 99]] = 1
    logits[3] = -np.inf
    logits[4, 99] = 1
    assert _core.nll(logits, np.zeros(5, np.int32))[1].tolist() == [0, 40, 97, 0, 99]


# ---- all of them ---------------------------------------------------------------------------------


def calls() -> dict[str, Callable[[], Array]]:
    x, z = random(300, 257), random(300, 257, seed=1)
    weight, bias = random(257, seed=2), random(257, seed=3)
    target = np.arange(300, dtype=np.int32) % 257

    def rope() -> Array:
        a = x[:, :256].copy().reshape(300, 16, 16)
        _core.rope(a, *angles(300, 8, np.float32), np.arange(300, dtype=np.int32))
        return a

    def add() -> Array:
        out = np.empty_like(x)
        _core.add(x, z, out)
        return out

    named = {kind: lambda kind=kind: activate(kind, x, z) for kind in KINDS}
    return {
        **named,
        "rms": lambda: norm("rms", x, weight, None),
        "layer": lambda: norm("layer", x, weight, bias),
        "rope": rope,
        "add": add,
        "nll": lambda: np.stack(_core.nll(x, target)),
        "kl": lambda: _core.kl(x, z),
    }


@pytest.mark.parametrize("name", calls())
def test_threads_change_no_bit(name: str, isa: str, with_threads: Callable[[int], None]) -> None:
    call = calls()[name]
    with_threads(1)
    want = call()
    for count in (2, 3, 5):
        with_threads(count)
        assert np.array_equal(call(), want)


def test_no_rows() -> None:
    x, weight = np.zeros((0, 8), np.float32), np.ones(8, np.float32)
    none = np.zeros(0, np.int32)
    assert norm("rms", x, weight, None).shape == (0, 8)
    assert activate("gelu", x).shape == (0, 8)
    assert norm("layer", np.zeros((3, 0), np.float32), None, None).shape == (3, 0)
    _core.rope(x.reshape(0, 1, 8), *angles(0, 4, np.float32), none)
    assert _core.nll(x, none)[0].shape == _core.kl(x, x).shape == (0,)
    _core.widen(np.zeros(0, np.uint16), "f16", np.zeros(0, np.float32))


def errors() -> dict[str, tuple[str, tuple[Any, ...], type[Exception], str]]:
    x, out, w = random(4, 6), np.empty((4, 6), np.float32), np.ones(6, np.float32)
    wide, value, kind = x.astype(np.float64), sa.errors.ArgumentError, sa.errors.DtypeError
    rope, (cos, sin), pos = random(4, 1, 6), angles(9, 3, np.float32), np.zeros(4, np.int32)
    return {
        "count": ("add", (x, x), TypeError, "takes 3 positional"),
        "not an array": ("add", (1.0, x, out), kind, "x must be a NumPy array"),
        "axes": ("add", (x[0], x, out), value, "x must have 2 axes, got 1"),
        "shape": ("add", (x, x[:3], out), value, "z must have 4 entries on axis -2, got 3"),
        "out shape": ("add", (x, x, out[:, :5].copy()), value, "out must have 6 entries"),
        "layout": ("add", (x, x, np.empty((6, 4), "f4").T), value, "out must be C-contiguous"),
        "dtype": ("add", (x, wide, out), kind, "z must have the dtype of x, float32"),
        "half overlap": ("add", (x[:3], x[:3], x[1:]), value, "out shares memory with x"),
        "kind": ("activate", ("gelu_new", x, None, out), value, "kind must be .* got 'gelu_new'"),
        "no kind": ("activate", (None, x, None, out), value, "kind must be .* got None"),
        "gate": ("activate", ("silu", x, x[:2], out), value, "gate must have 4"),
        "weight": ("rms_norm", (x, w[:5], EPS, out), value, "weight must have 6 .* got 5"),
        "no weight": ("rms_norm", (x, None, EPS, out), kind, "weight must be a NumPy array"),
        "eps": ("rms_norm", (x, w, -1.0, out), value, "eps must be in"),
        "eps nan": ("rms_norm", (x, w, float("nan"), out), value, "eps must be in"),
        "bias": ("layer_norm", (x, w, w[:1], EPS, out), value, "bias must have 6"),
        "norm dtype": ("layer_norm", (x, w.astype("f8"), None, EPS, out), kind, "weight must have"),
        "pos high": ("rope", (rope, cos, sin, pos + 9), value, r"pos\[0\] .* \[0, 9\).* got 9"),
        "pos low": ("rope", (rope, cos, sin, pos - 1), value, r"pos\[0\] must be in .* got -1"),
        "pos dtype": ("rope", (rope, cos, sin, pos.astype("i8")), kind, "pos must be int32"),
        "pos count": ("rope", (rope, cos, sin, pos[:2]), value, "pos must have 4"),
        "sin": ("rope", (rope, cos, sin[:3], pos), value, "sin must have 9"),
        "pairs": ("rope", (rope, *angles(9, 4, np.float32), pos), value, "cos turns 4 pairs"),
        "target high": ("nll", (x, pos + 6), value, r"target\[0\] must be in \[0, 6\), got 6"),
        "target low": ("nll", (x, pos - 1), value, "got -1"),
        "target dtype": ("nll", (x, pos.astype("i8")), kind, "target must be int32"),
        "no vocabulary": ("nll", (x[:, :0], pos), value, "logits must have between 1 and"),
        "kl shape": ("kl", (x, x[:, :3].copy()), value, "other must have 6"),
        "kl dtype": ("kl", (x, wide), kind, "other must have the dtype of x"),
        "widen kind": ("widen", (np.zeros(3, "u2"), "f8", w[:3].copy()), value, "kind must be"),
        "widen size": ("widen", (np.zeros(3, "u2"), "f16", w), value, "out must have 3"),
        "widen dtype": ("widen", (np.zeros(6, "f2"), "f16", w), kind, "src must be uint16"),
    }


@pytest.mark.parametrize("case", errors())
def test_errors(case: str) -> None:
    name, args, kind, words = errors()[case]
    with pytest.raises(kind, match=words) as raised:
        getattr(_core, name)(*args)
    assert "\n" not in str(raised.value)
