"""``return_weights`` as people ask for it: words, results, memory, and what the core refuses."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import core_calls
import numpy as np
import pytest
from conftest import make_qkv
from reference import received

import sparseattn as sa
from sparseattn import _core
from sparseattn.weights import TopWeights

SHAPE = (2, 4, 2, 9, 31, 16, 8)


@pytest.mark.parametrize("word", ["mass", "Mass", " mass "])
def test_mass_as_asked_for(word: str) -> None:
    q, k, v = make_qkv(SHAPE)
    dense = sa.attention(q, k, v, "window:7", causal=True, return_weights=True).weights
    got = sa.attention(q, k, v, "window:7", causal=True, return_weights=word)
    assert (
        got.lse is None
        and got.out.tobytes() == sa.attention(q, k, v, "window:7", causal=True).tobytes()
    )
    np.testing.assert_allclose(got.weights, received.mass(dense), rtol=2e-6)
    three = sa.attention(q, k, v, "window:7", causal=True, return_weights=word, return_lse=True)
    assert three._fields == ("out", "lse", "weights") and three.lse.shape == (2, 4, 9)
    assert three.weights.tobytes() == got.weights.tobytes()


@pytest.mark.parametrize("word", ["topn:3", "TopN:03", "topn:3 "])
def test_largest_as_asked_for(word: str) -> None:
    q, k, v = make_qkv(SHAPE)
    out, (values, indices) = sa.attention(q, k, v, causal=True, return_weights=word)
    assert out.shape == (2, 4, 9, 8)
    dense = sa.attention(q, k, v, causal=True, return_weights=True).weights
    want = received.largest(dense, dense > 0, 3)
    np.testing.assert_array_equal(indices, want[1])
    np.testing.assert_allclose(values, want[0], rtol=2e-6)
    plan = sa.plan(q, k, causal=True)
    again = sa.attention(q, k, v, plan, return_weights=word).weights
    assert type(again) is TopWeights and again._fields == ("values", "indices")
    assert again.indices.tobytes() == indices.tobytes()


def test_leading_axes_come_back() -> None:
    q, k, v = make_qkv((6, 4, 2, 9, 31, 16, 8))
    flat = sa.attention(q, k, v, return_weights="topn:2").weights
    split = [x.reshape(2, 3, *x.shape[1:]) for x in (q, k, v)]
    deep = sa.attention(*split, return_weights="topn:2").weights
    assert deep.values.shape == deep.indices.shape == (2, 3, 4, 9, 2)
    assert deep.values.tobytes() == flat.values.tobytes()
    assert sa.attention(*split, return_weights="mass").weights.shape == (2, 3, 4, 31)
    assert sa.attention(q[0], k[0], v[0], return_weights="mass").weights.shape == (4, 31)


def test_half_precision_gives_float32() -> None:
    """As the log-sum-exp: 65,536 rows would overflow float16."""
    q, k, v = (x.astype(np.float16) for x in make_qkv(SHAPE))
    wide = [x.astype(np.float32) for x in (q, k, v)]
    got, want = (sa.attention(*x, return_weights="mass").weights for x in ((q, k, v), wide))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)
    got, want = (sa.attention(*x, return_weights="topn:3").weights for x in ((q, k, v), wide))
    assert got.values.dtype == np.float32
    np.testing.assert_array_equal(got.values, want.values)
    np.testing.assert_array_equal(got.indices, want.indices)


def test_tensors(torch: ModuleType) -> None:
    q, k, v = make_qkv(SHAPE, strided=False)
    tensors = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    got = sa.attention(*tensors, causal=True, return_weights="topn:3")
    assert got.out.requires_grad and not got.weights.values.requires_grad
    want = sa.attention(q, k, v, causal=True, return_weights="topn:3").weights
    for a, b in zip(got.weights, want, strict=True):
        assert isinstance(a, torch.Tensor)
        np.testing.assert_array_equal(a.numpy(), b)
    mass = sa.attention(*tensors, return_weights="mass").weights
    np.testing.assert_allclose(mass.sum(-1).numpy(), 9, rtol=1e-6)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("topn:0", r"'topn:0' must say how many.*from 1 on: pass 'topn:16'"),
        ("topn:-3", "'topn:-3' must say how many"),
        ("topn:3.5", "how many"),
        ("topn:many", "how many"),
        ("topn", "how many"),
        ("topn:" + "9" * 5000, "how many"),
        ("top:16", "'topn:16' .*or 'mass' .*got 'top:16'"),
        ("mass:16", "'topn:16' .*or 'mass'"),
        ("", "False, True, 'topn:16'"),
        (16, "got 16"),
        (None, "got None"),
        (b"mass", "got b'mass'"),
    ],
)
def test_wrong_words_are_answered(word: Any, says: str) -> None:
    q, k, v = make_qkv(SHAPE)
    with pytest.raises(sa.ArgumentError, match=says) as error:
        sa.attention(q, k, v, return_weights=word)
    assert len(str(error.value)) < 250


def test_more_than_fits_is_one_sentence() -> None:
    q, k, v = make_qkv(SHAPE)
    with pytest.raises(sa.OutOfMemory, match=r"largest weights of shape .*, 99999999999999999\)"):
        sa.attention(q, k, v, return_weights="topn:" + "9" * 17)


# ---- memory --------------------------------------------------------------------------------------


def extra(n: int, word: str, spec: str) -> int:
    """Peak bytes of the core that one causal head of n tokens takes beside inputs and outputs."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, n, 4), dtype=np.float32) for _ in range(3))
    _core.trim()
    before = _core.live_bytes()
    _core.peak_reset()
    sa.attention(q, k, v, spec, causal=True, return_weights=word)
    return _core.peak_bytes() - before


@pytest.mark.usefixtures("clean_memory")
@pytest.mark.parametrize("word", ["mass", "topn:16"])
def test_long_rows_take_linear_memory(word: str, with_threads: Callable[[int], None]) -> None:
    """N = 65,536: at most 48 bytes a key and thread; N x N weights would be 16 GiB."""
    with_threads(2)
    short, long = extra(16_384, word, "dense"), extra(65_536, word, "dense")
    assert long <= 4 * short
    assert long <= 2 * 48 * 65_536
    assert extra(65_536, word, "window:64") <= long + (1 << 20)


# ---- the core ------------------------------------------------------------------------------------


def core_call(**changed: Any) -> dict[str, Any]:
    q, k, v = core_calls.make()
    batch, heads, n_q, n_k, n = core_calls.B, core_calls.H, core_calls.NQ, core_calls.NK, 3
    _, lse = core_calls.attend(q, k, v)
    call = {
        "lse": lse,
        "mass": np.zeros((batch, heads, n_k), np.float32),
        "values": np.zeros((batch, heads, n_q, n), np.float32),
        "indices": np.zeros((batch, heads, n_q, n), np.int64),
    }
    return {"q": q, "k": k, "v": v, "parts": core_calls.build("dense", q, k)} | call | changed


def run_mass(call: dict[str, Any]) -> None:
    args = [call[x] for x in ("q", "k", "v", "parts")]
    _core.attend_mass(*args, core_calls.problem(), call["lse"], call["mass"])


def run_topn(call: dict[str, Any]) -> None:
    args = [call[x] for x in ("q", "k", "v", "parts")]
    _core.attend_topn(*args, core_calls.problem(), call["lse"], call["values"], call["indices"])


def test_parts_and_strided_outputs() -> None:
    """Several plans in one call; outputs with gaps."""
    q, k, v = core_calls.make()
    dense, few = core_calls.build("dense", q, k), core_calls.build("topk", q, k)
    parts = ((dense, 0, 2), (few, 2, core_calls.H))
    _, lse = core_calls.attend(q, k, v, parts)
    wide = np.full((core_calls.B, core_calls.NK, core_calls.H), np.nan, np.float32)
    call = core_call(parts=parts, lse=lse, mass=wide.transpose(0, 2, 1))
    run_mass(call)
    run_topn(call)
    for heads, plan in ((slice(0, 2), dense), (slice(2, None), few)):
        _, lse = core_calls.attend(q, k, v, plan)
        alone = core_call(parts=plan, lse=lse)
        run_mass(alone)
        run_topn(alone)
        for name in ("mass", "values", "indices"):
            np.testing.assert_array_equal(call[name][:, heads], alone[name][:, heads])


def wrong_calls() -> list[tuple[Callable[[dict[str, Any]], None], dict[str, Any], str]]:
    call = core_call()
    return [
        (run_mass, {"mass": call["mass"][:, :, 1:]}, "mass"),
        (run_mass, {"mass": call["mass"].astype("f8")}, "mass must be float32"),
        (run_mass, {"mass": np.broadcast_to(np.float32(0), call["mass"].shape)}, "mass"),
        (run_mass, {"lse": call["lse"][:1]}, "lse"),
        (run_mass, {"lse": call["lse"].astype("f8")}, "lse must be float32"),
        (run_topn, {"values": call["values"][:, 1:]}, "values"),
        (run_topn, {"indices": call["indices"][..., :2]}, "indices"),
        (run_topn, {"indices": call["indices"].astype("i4")}, "indices must be int64"),
        (run_topn, {"values": call["values"][..., ::2]}, "values"),
        (run_topn, {"q": call["q"][:, :, 1:]}, "plan|lse"),
    ]


@pytest.mark.parametrize("at", range(len(wrong_calls())))
def test_the_core_refuses(at: int) -> None:
    run, changed, says = wrong_calls()[at]
    with pytest.raises(sa.SparseAttnError, match=says):
        run(core_call(**changed))


def test_outputs_apart_from_inputs() -> None:
    call = core_call()
    buffer = np.zeros(call["mass"].size, np.float32)
    lse = buffer[: call["lse"].size].reshape(call["lse"].shape)
    with pytest.raises(sa.ArgumentError, match="mass shares memory with lse"):
        run_mass(call | {"lse": lse, "mass": buffer.reshape(call["mass"].shape)})
    keys = call["indices"].view(np.float32)[..., :3]
    with pytest.raises(sa.ArgumentError, match="indices shares memory with values"):
        run_topn(call | {"values": keys})
