"""Attention and plans of every registered variant: structure first, arithmetic second."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import (
    CAUSAL_SPECS,
    EVERY_SPEC,
    MIDDLE,
    SHAPES,
    SPECS,
    assert_no_worse,
    assert_within_ceiling,
    causal_ids,
    causals,
    expected_rows,
    fit,
    make_params,
    make_qkv,
    once,
    random_masks,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import attention as ref
from reference.combine import join

import sparseattn as sa
from sparseattn.variants import Variant

DTYPES = [np.float32, np.float64]


def check_kept(
    spec: Variant, kept: np.ndarray, see: np.ndarray, scores: np.ndarray, q: Any, k: Any, call: Any
) -> None:
    """What a spec keeps, against the definition in tests/reference of its name."""
    if isinstance(spec, sa.PerHead):
        group = q.shape[1] // k.shape[1]
        for begin, end in spec.ranges(group):
            g = slice(begin // group, (end - 1) // group + 1)
            at = slice(begin, end)
            inner = {n: x[:, at] if n in ("mask", "bias") else x for n, x in call.items()}
            one = spec.specs[begin].for_head(begin)
            check_kept(one, kept[:, at], see[:, at], scores[:, at], q[:, at], k[:, g], inner)
    elif isinstance(spec, sa.Union | sa.Intersection):
        parts = [sa.plan(q, k, part, **call).to_mask() for part in spec.parts]
        np.testing.assert_array_equal(kept, join(spec.kind, parts))
    else:
        module = importlib.import_module(f"reference.{type(spec).__module__.rsplit('.')[-1]}")
        fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
        eps = 4 * np.finfo(q.dtype).eps
        inputs = {"params": call.get("params"), "causal": call.get("causal", False)}
        module.check(kept, see, scores, eps=eps, **inputs, **fields)


@pytest.mark.parametrize(("spec", "causal"), CAUSAL_SPECS, ids=causal_ids)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_plan_keeps_what_the_definition_says(
    spec: Variant, causal: bool | str, masked: bool, shape: tuple[int, ...]
) -> None:
    shape = fit(spec, shape)
    q, k, _ = make_qkv(shape, seed=1)
    masks = random_masks(shape) if masked else {}
    call = {"causal": causal, "params": make_params(spec, shape), **masks}
    plan = sa.plan(q, k, spec, **call)
    batch, heads, _, n_q, n_k, *_ = shape
    see = ref.visible(batch, heads, n_q, n_k, causal=causal, **masks)
    kept = plan.to_mask()
    check_kept(spec, kept, see, once(ref.scores, q, k), q, k, call)
    counts = plan.count()
    assert (counts.kept, counts.visible) == (kept.sum(), see.sum())
    group = heads // shape[2]
    if len(plan.pieces) == 1:
        union = kept.reshape(batch, -1, group, n_q, n_k).any(2)
        assert counts.union_rows == union.sum()
    assert plan.kept_share == (counts.kept / counts.visible if counts.visible else 1.0)
    rng = np.random.default_rng(2)
    for _ in range(20):
        b, h, i = (int(rng.integers(size)) for size in (batch, heads, n_q))
        np.testing.assert_array_equal(plan.rows(h).keys(b, h, i), np.flatnonzero(kept[b, h, i]))


@pytest.mark.promise("A1")
@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
def test_attend_matches_reference(
    spec: Variant, dtype: Any, shape: tuple[int, ...], isa: str, with_threads: Callable[[int], None]
) -> None:
    with_threads(3)
    shape = fit(spec, shape)
    q, k, v = make_qkv(shape, dtype, seed=3)
    call = {"causal": causals(spec)[0], "params": make_params(spec, shape)}
    got = sa.attention(q, k, v, spec, return_lse=True, **call)
    assert got.out.dtype == got.lse.dtype == dtype
    check_numbers(got, spec, q, k, v, call)


def check_numbers(
    got: Any, spec: Variant, q: Any, k: Any, v: Any, call: dict[str, Any], **terms: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """out and lse against the float64 reference over the keys that the plan keeps."""
    kept, full = expected_rows(spec, q, k, call, **terms)
    want = once(ref.attention, q, k, v, kept, full=full, **terms)
    naive = want  # which float64 is not compared with
    if q.dtype == np.float32:
        naive = once(ref.attention, q, k, v, kept, full=full, compute=np.float32, **terms)
    # Weights of the full row carry the rounding of two log-sum-exps that took different paths.
    size = (
        0 if full is None else np.abs(once(ref.scores, q, k, **terms)).max() * np.abs(want[0]).max()
    )
    assert_no_worse(got.out, want[0], than=naive[0], plus=4 * np.finfo(q.dtype).eps * size)
    assert_no_worse(got.lse, want[1], than=naive[1])
    return kept, full


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("n_q", [65, 1], ids=["", "decode"])
def test_scores_take_scale_softcap_bias_and_masks(spec: Variant, dtype: Any, n_q: int) -> None:
    shape = fit(spec, (2, 6, 2, n_q, 131, 40, 24))
    q, k, v = make_qkv(shape, dtype, seed=4)
    bias = np.random.default_rng(5).standard_normal((6, 1, 131)).astype(dtype)
    terms = {"scale": 0.3, "softcap": 2.5, "bias": bias}
    masks = random_masks(shape)
    call = {"causal": True, "params": make_params(spec, shape), **masks}
    got = sa.attention(q, k, v, spec, return_lse=True, return_weights=True, **call, **terms)
    kept, full = check_numbers(got, spec, q, k, v, call, **terms)
    check_kept(
        spec,
        kept,
        ref.visible(*kept.shape, causal=True, **masks),
        once(ref.scores, q, k, **terms),
        q,
        k,
        {**call, **terms, "bias": bias[None]},
    )
    weights = ref.weights(q, k, kept, full=full, **terms)
    np.testing.assert_array_equal(got.weights != 0, weights != 0)
    np.testing.assert_allclose(got.weights, weights, rtol=0, atol=8 * np.finfo(dtype).eps)


@pytest.mark.promise("C5")
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("n_q", [300, 1], ids=["", "decode"])
def test_same_bits_for_any_number_of_threads(
    spec: Variant, n_q: int, isa: str, with_threads: Callable[[int], None]
) -> None:
    shape = fit(spec, (1, 6, 2, n_q, 9000 if n_q == 1 else 300, 16, 16))
    q, k, v = make_qkv(shape, seed=6)
    call = {"causal": True, "params": make_params(spec, shape)}
    first: Any = None
    for n in (1, 2, 3, 5):
        with_threads(n)
        got = sa.attention(q, k, v, spec, return_lse=True, **call)
        first = first or got
        assert got.out.tobytes() == first.out.tobytes()
        assert got.lse.tobytes() == first.lse.tobytes()


@pytest.mark.promise("A4")
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("n_q", [129, 40], ids=["square", "longer keys"])
def test_a_later_key_changes_no_earlier_bit(spec: Variant, n_q: int, isa: str) -> None:
    n_k = 129
    shape = fit(spec, (1, 6, 2, n_q, n_k, 16, 16))
    call = {"causal": True, "params": make_params(spec, shape), "return_lse": True}
    q, k, v = make_qkv(shape, seed=7)
    before = sa.attention(q, k, v, spec, **call)
    rng = np.random.default_rng(8)
    for j in rng.choice(n_k, 12, replace=False):
        k2, v2 = k.copy(), v.copy()
        k2[:, :, j] = rng.standard_normal(16) * 50
        v2[:, :, j] = np.nan if j % 2 else 1e30
        after = sa.attention(q, k2, v2, spec, **call)
        untouched = slice(0, max(0, int(j) - (n_k - n_q)))
        assert after.out[:, :, untouched].tobytes() == before.out[:, :, untouched].tobytes()
        assert after.lse[:, :, untouched].tobytes() == before.lse[:, :, untouched].tobytes()


@pytest.mark.promise("A4")
@pytest.mark.parametrize(
    ("n_q", "n_k", "causal", "table"),
    [
        (2, 5, True, ["11110", "11111"]),
        (5, 2, True, ["00", "00", "00", "10", "11"]),
        (2, 5, "top_left", ["10000", "11000"]),
        (5, 2, "top_left", ["10", "11", "11", "11", "11"]),
        (2, 5, "bottom-right", ["11110", "11111"]),
        (2, 5, False, ["11111", "11111"]),
    ],
)
def test_alignment_of_causality_literally(
    n_q: int, n_k: int, causal: bool | str, table: list[str]
) -> None:
    want = np.array([[c == "1" for c in row] for row in table])
    q, k, v = make_qkv((1, 1, 1, n_q, n_k, 4, 4))
    plan = sa.plan(q, k, causal=causal)
    np.testing.assert_array_equal(plan.to_mask()[0, 0], want)
    got = sa.attention(q, k, v, causal=causal, return_weights=True)
    np.testing.assert_array_equal(got.weights[0, 0] > 0, want)
    np.testing.assert_array_equal(got.out[0, 0][~want.any(1)], 0)


@pytest.mark.promise("B1")
def test_broadcast_views_and_leading_axes() -> None:
    q, k, v = make_qkv((6, 4, 2, 33, 47, 16, 8), seed=10)
    deep = sa.attention(q.reshape(2, 3, 4, 33, 16), *(x.reshape(2, 3, 2, 47, -1) for x in (k, v)))
    flat = sa.attention(q, k, v)
    assert deep.shape == (2, 3, 4, 33, 8)
    assert deep.tobytes() == flat.tobytes()
    one = sa.attention(q[0], k[0], v[0], return_lse=True)
    assert (one.out.shape, one.lse.shape) == ((4, 33, 8), (4, 33))
    assert one.out.tobytes() == flat[0].tobytes()
    shared = sa.attention(q, k[:1], v[:1])  # one batch of keys for all queries
    repeated = sa.attention(q, k[:1].repeat(6, 0), v[:1].repeat(6, 0))
    assert shared.tobytes() == repeated.tobytes()


@pytest.mark.promise("B1")
def test_masks_broadcast_without_copies() -> None:
    q, k, v = make_qkv((6, 4, 2, 33, 47, 16, 8), seed=11)
    full = np.random.default_rng(12).random((6, 4, 33, 47)) < 0.5
    for small in (full[0, 0], full[0], full[:, :1], full[:1, :, :1], full[0, 0, 0], full):
        wide = np.broadcast_to(small, full.shape).copy()
        got = sa.attention(q, k, v, mask=small)
        assert got.tobytes() == sa.attention(q, k, v, mask=wide).tobytes()
        deep = small.reshape(2, 3, *small.shape[1:]) if small.shape[:1] == (6,) else small
        split = [x.reshape(2, 3, *x.shape[1:]) for x in (q, k, v)]
        assert sa.attention(*split, mask=deep).tobytes() == got.tobytes()
    for small in (full[0, 0, 0], full[:1, :, :1]):  # floats of any layout and dtype likewise
        bias = np.where(small, 0.5, -0.5)
        wide = np.broadcast_to(bias, full.shape)
        got = sa.attention(q, k, v, bias=bias)
        assert got.tobytes() == sa.attention(q, k, v, bias=wide).tobytes()
        assert got.tobytes() == sa.attention(q, k, v, bias=wide.astype("f4")).tobytes()
        assert got.tobytes() == sa.attention(q, k, v, bias=np.asfortranarray(wide)).tobytes()
    key_mask = full[:, 0, 0]
    got = sa.attention(q, k, v, key_mask=key_mask)
    assert got.tobytes() == sa.attention(q, k, v, mask=key_mask[:, None, None]).tobytes()


def test_dense_is_the_widest_window_and_the_largest_k() -> None:
    q, k, v = make_qkv(MIDDLE, seed=13)
    dense = sa.attention(q, k, v, causal=True)
    for spec in ("window:100000", "topk:100000", "random:100000", "tree-less", None, sa.Dense()):
        np.testing.assert_allclose(sa.attention(q, k, v, spec, causal=True), dense, atol=2e-6)
    layout = np.ones((1, 2, 3), bool)
    got = sa.attention(q, k, v, sa.BlockMask(64), params={"layout": layout}, causal=True)
    np.testing.assert_allclose(got, dense, atol=2e-6)


def test_ties_go_to_the_lower_key(isa: str) -> None:
    rng = np.random.default_rng(14)
    q = rng.integers(-2, 3, (1, 2, 50, 4)).astype(np.float32)  # scores are exact, ties abound
    k = rng.integers(-2, 3, (1, 2, 70, 4)).astype(np.float32)
    select = importlib.import_module("reference.topk").select
    for count in (1, 2, 7, 16, 69, 70, 71):
        kept = sa.plan(q, k, sa.TopK(count), scale=1.0).to_mask()
        see = np.ones(kept.shape, bool)
        np.testing.assert_array_equal(kept, select(ref.scores(q, k, scale=1.0), see, count))


def test_random_keys_are_uniform_and_addressed() -> None:
    n, count = 40, 8
    x = np.zeros((50, 4, n, 4), np.float32)
    kept = sa.plan(x, x, sa.RandomKeys(count)).to_mask()
    assert (kept == sa.plan(x, x, sa.RandomKeys(count)).to_mask()).all()
    assert (kept != sa.plan(x, x, sa.RandomKeys(count, seed=1)).to_mask()).any()
    assert (kept[0] != kept[1]).any() and (kept[:, 0] != kept[:, 1]).any()
    share = kept.mean((0, 1))  # 200 draws an entry, each kept with probability 1/5
    assert np.abs(share - count / n).max() < 5.5 * np.sqrt(0.2 * 0.8 / 200)


# ---- any shape at all ---------------------------------------------------------------------------


@pytest.mark.promise("A1")
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_forward_on_random_shapes(data: st.DataObject) -> None:
    size = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kv_heads = size(1, 3)
    shape = (
        *(size(0, 3), kv_heads * size(1, 3), kv_heads),
        *(size(0, 130), size(0, 130), size(1, 80), size(1, 80)),
    )
    spec, causal = data.draw(st.sampled_from(CAUSAL_SPECS))
    shape = fit(spec, shape)
    dtype = data.draw(st.sampled_from(DTYPES))
    q, k, v = make_qkv(shape, dtype, seed=18, strided=data.draw(st.booleans()))
    call: dict[str, Any] = {
        "causal": causal,
        "params": make_params(spec, shape) if all(shape) else None,
    }
    if spec.arrays and not all(shape):
        return
    if all(shape) and data.draw(st.booleans()):
        call |= random_masks(shape)
    got = sa.attention(q, k, v, spec, return_lse=True, **call)
    kept, full = expected_rows(spec, q, k, call)
    want = ref.attention(q, k, v, kept, full=full)
    assert_within_ceiling(got.out, want[0])
    assert_within_ceiling(got.lse, want[1])


def test_shapes_are_awkward() -> None:
    assert {shape[3] for shape in SHAPES} >= {1, 63, 65, 257}
    assert any(shape[1] == 6 and shape[2] == 2 for shape in SHAPES)
    assert {shape[5] for shape in SHAPES} >= {16, 40, 128}
