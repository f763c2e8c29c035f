"""What becomes of NaN, infinities and empty rows: one policy for all variants (promise A6).

The case of a tiny linear denominator waits for feature maps; there is none to run it on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import EVERY_SPEC, causals, fit, full_row, make_params, make_qkv, once
from reference import attention as ref

import sparseattn as sa
from sparseattn.variants import Variant

pytestmark = [
    pytest.mark.promise("A6"),
    pytest.mark.parametrize("spec", EVERY_SPEC, ids=str),
    pytest.mark.parametrize("n_q", [70, 1], ids=["prefill", "decode"]),
]
N_K = 90
BAD = [np.nan, np.inf, -np.inf]


def setting(spec: Variant, n_q: int, seed: int, causal: bool = True) -> tuple[Any, ...]:
    shape = fit(spec, (2, 6, 2, n_q, N_K, 16, 24))
    q, k, v = make_qkv(shape, seed=seed, strided=False)
    causal = causal if causal in causals(spec) else not causal
    return shape, q, k, v, {"causal": causal, "params": make_params(spec, shape)}


def run(q: Any, k: Any, v: Any, spec: Variant, call: dict[str, Any]) -> Any:
    with np.errstate(all="raise"):  # no warning of NumPy's reaches the caller either
        return sa.attention(q, k, v, spec, return_lse=True, **call)


def assert_same_bits(a: Any, b: Any, rows: np.ndarray) -> None:
    assert a.out[rows].tobytes() == b.out[rows].tobytes()
    assert a.lse[rows].tobytes() == b.lse[rows].tobytes()


def test_a_row_that_sees_nothing(spec: Variant, n_q: int, isa: str) -> None:
    _, q, k, v, call = setting(spec, n_q, seed=0)
    mask = np.ones((*q.shape[:3], N_K), bool)
    mask[0, :, n_q // 2] = False
    mask[1, 0] = False
    before = run(q, k, v, spec, call)
    got = run(q, k, v, spec, {**call, "mask": mask})
    empty = ~mask.any(-1)
    assert not got.out[empty].any() and np.isneginf(got.lse[empty]).all()
    assert not np.isnan(got.out).any() and not np.isnan(got.lse).any()
    np.testing.assert_allclose(got.out[~empty], before.out[~empty], atol=2e-6)
    key_mask = np.ones((2, N_K), bool)
    key_mask[1] = False
    got = run(q, k, v, spec, {**call, "key_mask": key_mask})
    assert not got.out[1].any() and np.isneginf(got.lse[1]).all()


@pytest.mark.parametrize("bad", BAD)
def test_what_is_masked_has_no_effect(spec: Variant, n_q: int, bad: float, isa: str) -> None:
    """Keys and values that a mask, padding or causality hides are never touched."""
    _, q, k, v, call = setting(spec, n_q, seed=1)
    rng = np.random.default_rng(2)
    key_mask = rng.random((2, N_K)) < 0.8
    mask = rng.random((N_K,)) < 0.8
    for masks in ({"key_mask": key_mask}, {"mask": mask}):
        hidden = ~np.broadcast_to(masks.get("key_mask", mask), (2, N_K))
        before = run(q, k, v, spec, {**call, **masks})
        k2, v2 = k.copy(), v.copy()
        k2.swapaxes(1, 2)[hidden] = bad
        v2.swapaxes(1, 2)[hidden] = bad
        got = run(q, k2, v2, spec, {**call, **masks})
        assert_same_bits(got, before, np.ones(q.shape[:3], bool))
    before = run(q, k, v, spec, call)
    if n_q > 1 and call["causal"]:
        k2, v2 = k.copy(), v.copy()
        k2[:, :, -5:], v2[:, :, -5:] = bad, bad
        got = run(q, k2, v2, spec, call)
        assert_same_bits(got, before, np.broadcast_to(np.arange(n_q) < n_q - 5, q.shape[:3]))


@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_selected_has_no_effect(spec: Variant, n_q: int, bad: float, isa: str) -> None:
    """Values that a row does not keep; keys too, where keys are not read to select."""
    _, q, k, v, call = setting(spec, n_q, seed=3, causal=False)
    kept = sa.plan(q, k, spec, **call).to_mask()
    before = run(q, k, v, spec, call)
    for j in (0, 17, N_K - 1):
        k2, v2 = k.copy(), v.copy()
        v2[:, :, j] = bad
        if not spec.reads_keys:
            k2[:, :, j] = bad
        got = run(q, k2, v2, spec, call)
        assert_same_bits(got, before, ~kept[..., j])


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_in_use_stays_in_its_rows(spec: Variant, n_q: int, where: str, isa: str) -> None:
    shape, q, k, v, call = setting(spec, n_q, seed=4, causal=False)
    heads, kv_heads = shape[1:3]
    before = run(q, k, v, spec, call)
    arrays = {"q": q.copy(), "k": k.copy(), "v": v.copy()}
    h, i = heads - 1, n_q // 2
    j = int(sa.plan(q, k, spec, **call).to_mask()[1, -1].any(0).argmax())  # a key in use
    touched = np.zeros(q.shape[:3], bool)
    if where == "q":
        arrays["q"][1, h, i, 3] = np.nan
        touched[1, h, i] = True
        seen = sa.plan(arrays["q"], k, spec, **call).to_mask().any(-1)
    else:
        arrays[where][1, -1, j, 3] = np.nan
        group = np.arange(heads) * kv_heads // heads == kv_heads - 1
        kept = sa.plan(arrays["q"], arrays["k"], spec, **call).to_mask()
        touched[1] = group[:, None]
        seen = kept[..., j]
    got = run(*arrays.values(), spec, call)
    hit = touched & seen
    assert hit.any() or (where == "q" and spec.kind == "intersection")  # parts need not meet
    assert_same_bits(got, before, ~touched | ~seen if where == "v" else ~touched)
    if where == "v":
        assert np.isnan(got.out[hit][:, 3]).all()
        others = np.delete(np.arange(24), 3)
        assert got.out[hit][:, others].tobytes() == before.out[hit][:, others].tobytes()
    else:
        assert np.isnan(got.out[hit]).all()


def test_a_score_of_plus_infinity(spec: Variant, n_q: int, isa: str) -> None:
    """The row is NaN where it keeps the key, as in PyTorch; other rows keep their bits."""
    _, q, k, v, call = setting(spec, n_q, seed=5, causal=False)
    before = run(q, k, v, spec, {**call, "bias": np.zeros((n_q, N_K), np.float32)})
    bias = np.zeros((n_q, N_K), np.float32)
    bias[n_q // 2, 7] = np.inf
    got = run(q, k, v, spec, {**call, "bias": bias})
    kept = sa.plan(q, k, spec, **call, bias=bias).to_mask()[..., 7]
    hit = kept & (np.arange(n_q) == n_q // 2)
    assert np.isnan(got.out[hit]).all()
    assert_same_bits(got, before, np.broadcast_to(np.arange(n_q) != n_q // 2, q.shape[:3]))


@pytest.mark.parametrize(
    "size", [3e38, pytest.param(1e30, marks=pytest.mark.nightly), 1e4, 1e-40, 0.0]
)
def test_huge_equal_and_denormal_scores(spec: Variant, n_q: int, size: float, isa: str) -> None:
    shape, q, k, v, call = setting(spec, n_q, seed=6)
    size = np.float32(size)
    bias = np.where(np.arange(N_K) % 3 == 0, size, -size).astype(np.float32)
    for terms in ({"bias": bias}, {"bias": np.full(1, size)}, {"bias": np.full(1, -size)}):
        tiny = q * np.float32(1e-40)  # all scores alike, or denormal
        got = run(tiny, k, v, spec, {**call, **terms})
        kept = sa.plan(tiny, k, spec, **call, **terms).to_mask()
        see = ref.visible(*kept.shape, causal=call["causal"])
        full = np.where(full_row(spec, shape[1])[:, None, None], see, kept)
        wide = {name: x.astype(np.float64) for name, x in terms.items()}
        want = once(ref.attention, tiny, k, v, kept, full=full, **wide)
        assert np.isfinite(got.out).all()
        np.testing.assert_allclose(got.out, want[0], atol=4e-6)
        np.testing.assert_allclose(got.lse, want[1], rtol=1e-6, atol=4e-6)
    tiny_v = np.full_like(v, 1e-40)  # denormal values are not flushed to zero
    got = run(q, k, tiny_v, spec, call)
    seen = sa.plan(q, k, spec, **call).to_mask().any(-1)
    post = full_row(spec, shape[1])
    rows = seen & ~post[:, None]
    np.testing.assert_allclose(got.out[rows], 1e-40, rtol=1e-3)


def test_a_bias_of_minus_infinity_hides(spec: Variant, n_q: int, isa: str) -> None:
    _, q, k, v, call = setting(spec, n_q, seed=7)
    got = run(q, k, v, spec, {**call, "bias": np.full((1, 1), -np.inf, np.float32)})
    assert not got.out.any() and np.isneginf(got.lse).all()
    bias = np.zeros((n_q, N_K), np.float32)
    bias[n_q // 2] = -np.inf
    got = run(q, k, v, spec, {**call, "bias": bias})
    assert not got.out[:, :, n_q // 2].any() and np.isneginf(got.lse[:, :, n_q // 2]).all()
    assert np.isfinite(got.out).all()
