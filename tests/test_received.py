"""``return_weights="mass"`` and ``"topn:16"`` by the definitions of tests/reference/received.py:
structure first, arithmetic second, every spec and instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import (
    EVERY_SPEC,
    SHAPES,
    SPECS,
    assert_no_worse,
    causals,
    expected_rows,
    fit,
    make_params,
    make_qkv,
    once,
    random_masks,
)
from reference import attention as ref
from reference import received

import sparseattn as sa
from sparseattn.variants import Variant

DTYPES = [np.float32, np.float64]
BAD = [np.nan, np.inf, -np.inf]


def both(q: Any, k: Any, v: Any, spec: Any, n: int, **call: Any) -> tuple[np.ndarray, Any]:
    """The mass of the keys, and the n largest weights of the rows."""
    mass = sa.attention(q, k, v, spec, return_weights="mass", **call).weights
    return mass, sa.attention(q, k, v, spec, return_weights=f"topn:{n}", **call).weights


def same_bits(a: tuple[np.ndarray, Any], b: tuple[np.ndarray, Any], rows: Any = ...) -> bool:
    mass = rows is not ... or a[0].tobytes() == b[0].tobytes()
    return mass and all(
        x[rows].tobytes() == y[rows].tobytes() for x, y in zip(a[1], b[1], strict=True)
    )


def check(
    spec: Variant, q: Any, k: Any, v: Any, n: int, call: dict[str, Any], **terms: Any
) -> None:
    mass, top = both(q, k, v, spec, n, **call, **terms)
    kept, full = expected_rows(spec, q, k, call, **terms)
    scores = [once(ref.scores, q, k, compute=t, **terms) for t in (np.float64, np.float32)]
    rows = kept if full is None else full
    want, naive = (np.where(kept, ref.softmax(s, rows)[0], s.dtype.type(0)) for s in scores)
    size = 1 + np.abs(scores[0]).max(initial=0)
    # Weights of the full row carry the rounding of two log-sum-exps that took different paths; all
    # weights carry that of one log-sum-exp, which the naive run never takes.
    plus = (4 if full is None else 8) * np.finfo(q.dtype).eps * size
    assert mass.dtype == top.values.dtype == q.dtype and top.indices.dtype == np.int64
    totals = received.mass(want)
    assert_no_worse(mass, totals, than=received.mass(naive), plus=plus * totals.max(initial=0))
    check_rows(top, n, kept, scores[0], 8 * np.finfo(q.dtype).eps * size)
    at, there = np.maximum(top.indices, 0), top.indices >= 0
    want, naive = (np.where(there, np.take_along_axis(x, at, -1), 0) for x in (want, naive))
    assert_no_worse(top.values, want, than=naive, plus=plus)


def check_rows(top: Any, n: int, kept: np.ndarray, scores: np.ndarray, eps: float) -> None:
    """As many as there are, each once, among those kept, downwards, none better left out."""
    values, indices = top
    there = indices >= 0
    count = np.minimum(kept.sum(-1), n)
    np.testing.assert_array_equal(there, np.arange(n) < count[..., None])
    assert (indices[~there] == -1).all() and not values[~there].any()
    listed = np.zeros((*kept.shape[:-1], kept.shape[-1] + 1), int)
    np.add.at(listed, (*np.indices(indices.shape)[:-1], indices), 1)  # column -1 is the padding
    listed = listed[..., :-1]
    assert listed.max(initial=0) <= 1 and kept[listed > 0].all()
    step = np.diff(values, axis=-1)
    assert ((step < 0) | ((step == 0) & (np.diff(indices, axis=-1) > 0)))[there[..., 1:]].all()
    worst = np.where(listed > 0, scores, np.inf).min(-1, initial=np.inf)
    best = np.where(kept & (listed == 0), scores, -np.inf).max(-1, initial=-np.inf)
    assert (worst >= best - eps).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
def test_matches_reference(spec: Variant, dtype: Any, isa: str) -> None:
    """Few of many keys are found by their groups; of short rows every key is ranked."""
    for at, shape in enumerate(SHAPES):
        shape = fit(spec, shape)
        q, k, v = make_qkv(shape, dtype, seed=1)
        call = {"causal": causals(spec)[0], "params": make_params(spec, shape)}
        check(spec, q, k, v, 3 if at % 2 else 16, call)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("n_q", [65, 1], ids=["", "decode"])
def test_takes_scale_softcap_bias_and_masks(spec: Variant, dtype: Any, n_q: int, isa: str) -> None:
    shape = fit(spec, (2, 6, 2, n_q, 190, 40, 24))
    q, k, v = make_qkv(shape, dtype, seed=2)
    bias = np.random.default_rng(3).standard_normal((6, 1, 190)).astype(dtype)
    masks = random_masks(shape)
    call = {"causal": True, "params": make_params(spec, shape), **masks}
    check(spec, q, k, v, 5, call, scale=0.3, softcap=2.5, bias=bias)
    check(spec, q, k, v, 16, call)


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
@pytest.mark.parametrize("n_q", [200, 1], ids=["", "decode"])
def test_same_bits_for_any_number_of_threads(
    spec: Variant, n_q: int, isa: str, with_threads: Callable[[int], None]
) -> None:
    shape = fit(spec, (1, 6, 2, n_q, 9000 if n_q == 1 else 400, 8, 8))
    q, k, v = make_qkv(shape, seed=4)
    call = {"causal": causals(spec)[-1], "params": make_params(spec, shape)}
    got = []
    for n in (1, 2, 3, 5):
        with_threads(n)
        got.append(both(q, k, v, spec, 16, **call))
    assert all(same_bits(x, got[0]) for x in got[1:])


@pytest.mark.parametrize(("n_q", "n_k"), [(9000, 40), (700, 5000), (3, 9000)])
@pytest.mark.parametrize("spec", ["dense", "topk:7", "window:60:sinks=2"])
def test_pieces_of_long_calls(
    spec: str, n_q: int, n_k: int, with_threads: Callable[[int], None]
) -> None:
    """One head: rows and keys are cut, so that threads have something to do."""
    q, k, v = make_qkv((1, 1, 1, n_q, n_k, 8, 8), seed=5)
    got = []
    for n in (1, 3):
        with_threads(n)
        got.append(both(q, k, v, spec, 8, causal=True))
    assert same_bits(*got)
    kept = sa.plan(q, k, spec, causal=True).to_mask()
    want = ref.weights(q, k, kept)
    mass, top = got[0]
    np.testing.assert_allclose(mass, received.mass(want), rtol=3e-6, atol=1e-6)
    check_rows(top, 8, kept, once(ref.scores, q, k), 1e-5)
    np.testing.assert_allclose(top.values, received.largest(want, kept, 8)[0], atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 16, 60, 400, 500])
def test_ties_go_to_the_lower_key(n: int, isa: str) -> None:
    rng = np.random.default_rng(6)
    q = rng.integers(-1, 2, (1, 2, 70, 3)).astype(np.float32)  # scores are exact, ties abound
    k = rng.integers(-1, 2, (1, 2, 400, 3)).astype(np.float32)
    layout = rng.random((1, 5, 25)) < 0.6
    cases: list[tuple[Any, dict[str, Any]]] = [
        ("dense", {"causal": True}),
        ("window:100:sinks=5", {"causal": True}),
        (sa.BlockMask(16), {"params": {"layout": layout}}),
        ("dense", {"mask": rng.random((70, 400)) < 0.7}),
    ]
    for spec, call in cases:
        call |= {"scale": 1.0}
        kept = sa.plan(q, k, spec, **call).to_mask()
        got = sa.attention(q, k, k, spec, return_weights=f"topn:{n}", **call).weights
        _, keys = received.largest(ref.weights(q, k, kept, scale=1.0).round(12), kept, n)
        np.testing.assert_array_equal(got.indices, keys, err_msg=str(spec))


def test_scores_that_rise_or_fall_with_the_key(isa: str) -> None:
    """Each key is better than all before it, as under a recency bias; then the other way round."""
    n = 500
    q = np.ones((1, 1, n, 4), np.float32)
    k = np.zeros((1, 1, n, 4), np.float32)
    for slope in (0.5, -0.5):
        bias = (slope * np.arange(n)).astype(np.float32)
        top = sa.attention(q, k, k, causal=True, bias=bias, return_weights="topn:4").weights
        i = np.arange(3, n)[:, None]
        want = i - np.arange(4) if slope > 0 else np.broadcast_to(np.arange(4), (n - 3, 4))
        np.testing.assert_array_equal(top.indices[0, 0, 3:], want)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_mass_adds_up_to_the_rows(spec: Variant) -> None:
    shape = fit(spec, (2, 6, 2, 300, 300, 16, 16))
    q, k, v = make_qkv(shape, seed=7)
    call = {"causal": True, "params": make_params(spec, shape), **random_masks(shape)}
    mass = sa.attention(q, k, v, spec, return_weights="mass", **call).weights
    kept, full = expected_rows(spec, q, k, call)
    if full is None:
        np.testing.assert_allclose(mass.sum(-1), kept.any(-1).sum(-1), rtol=2e-6)
    assert not mass[~kept.any(-2)].any()  # keys that nobody sees
    dropped = sa.attention(q, k, v, spec, return_weights="mass", dropout_p=0.4, seed=1, **call)
    assert dropped.weights.tobytes() == mass.tobytes()  # weights before dropout


def test_sinks_have_their_share() -> None:
    q, k, v = make_qkv((2, 3, 3, 40, 90, 16, 16), seed=8)
    sink = np.array([0.5, 3.0, -1.0], np.float32)
    call: dict[str, Any] = {"causal": True, "params": {"sink": sink}}
    got = sa.attention(q, k, v, return_lse=True, return_weights="mass", **call)
    share = np.exp(sink[:, None].astype("f8") - got.lse)
    np.testing.assert_allclose(got.weights.sum(-1), (1 - share).sum(-1), rtol=1e-5)
    top = sa.attention(q, k, v, return_weights="topn:90", **call).weights
    np.testing.assert_allclose(top.values.sum(-1), 1 - share, rtol=1e-5)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_masked_has_no_effect(spec: Variant, bad: float, isa: str) -> None:
    shape = fit(spec, (2, 6, 2, 70, 90, 16, 8))
    q, k, v = make_qkv(shape, seed=9, strided=False)
    rng = np.random.default_rng(10)
    key_mask, mask = rng.random((2, 90)) < 0.8, rng.random(90) < 0.8
    for masks in ({"key_mask": key_mask}, {"mask": mask}):
        call = {"causal": True, "params": make_params(spec, shape), **masks}
        hidden = ~np.broadcast_to(masks.get("key_mask", mask), (2, 90))
        before = both(q, k, v, spec, 6, **call)
        k2 = k.copy()
        k2.swapaxes(1, 2)[hidden] = bad
        after = both(q, k2, v, spec, 6, **call)
        assert same_bits(after, before)
        assert not after[0][np.broadcast_to(hidden[:, None], after[0].shape)].any()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_later_key_changes_no_earlier_row(spec: Variant, isa: str) -> None:
    shape = fit(spec, (1, 6, 2, 129, 129, 16, 16))
    q, k, v = make_qkv(shape, seed=11)
    call = {"causal": True, "params": make_params(spec, shape)}
    before = both(q, k, v, spec, 6, **call)
    for j, x in ((17, 50.0), (64, np.nan), (100, np.inf), (128, -50.0)):
        k2 = k.copy()
        k2[:, :, j] = x
        after = both(q, k2, v, spec, 6, **call)
        assert same_bits(after, before, np.s_[:, :, :j])


@pytest.mark.parametrize("n_q", [70, 1], ids=["", "decode"])
@pytest.mark.parametrize("spec", ["dense", "window:40", "topk:8"])
def test_nan_in_use_shows(spec: str, n_q: int, isa: str) -> None:
    """A row of NaN weights: NaN at its first keys, and in the mass of all that it sees."""
    q, k, v = make_qkv((1, 2, 2, n_q, 90, 16, 16), seed=12)
    q, i = q.copy(), n_q // 2
    before = both(q, k, v, spec, 6, causal=True)
    q[0, 1, i, 3] = np.nan
    mass, top = both(q, k, v, spec, 6, causal=True)
    kept = sa.plan(q, k, spec, causal=True).to_mask()
    row = np.flatnonzero(kept[0, 1, i])
    assert np.isnan(top.values[0, 1, i]).all()
    np.testing.assert_array_equal(top.indices[0, 1, i], row[:6])
    assert np.isnan(mass[0, 1, row]).all() and np.isnan(mass).sum() == row.size
    rest = np.ones((1, 2, n_q), bool)
    rest[0, 1, i] = False
    assert same_bits((mass, top), before, rest)
    assert mass[0, 0].tobytes() == before[0][0, 0].tobytes()


def test_rows_and_keys_without_weights(isa: str) -> None:
    q, k, v = make_qkv((2, 4, 2, 70, 90, 16, 16), seed=13)
    mask = np.ones((2, 4, 70, 90), bool)
    mask[0, :, 35] = False
    mask[1, 2] = False
    bias = np.zeros((70, 90), np.float32)
    bias[7] = -np.inf  # sees keys, and gives them nothing
    bias[8, :88] = -np.inf
    mass, top = both(q, k, v, "dense", 3, mask=mask, bias=bias)
    assert np.isfinite(mass).all() and np.isfinite(top.values).all()
    for empty in (top.indices[0, :, 35], top.indices[1, 2], top.indices[:, :, 7]):
        assert (empty == -1).all()
    np.testing.assert_array_equal(np.sort(top.indices[0, 0, 8]), [-1, 88, 89])
    assert not mass[1, 2].any()
    want = mask.any(-1).sum(-1) - mask[:, :, 7].any(-1)
    np.testing.assert_allclose(mass.sum(-1), want, rtol=1e-5)


@pytest.mark.parametrize("n_q", [63, 1], ids=["", "decode"])
def test_a_score_of_minus_infinity_weighs_nothing(n_q: int, isa: str) -> None:
    """Lanes without a row see 0 times infinity: no row's business."""
    q = np.abs(make_qkv((1, 2, 2, n_q, 70, 16, 16), seed=16)[0]) + 1
    k = make_qkv((1, 2, 2, n_q, 70, 16, 16), seed=17)[1].copy()
    k[:, :, 9, 5] = -np.inf
    mass, top = both(q, k, k[..., :3] * 0, "dense", 70)
    assert not mass[:, :, 9].any() and not (top.indices == 9).any()
    np.testing.assert_allclose(mass.sum(-1), n_q, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(0, 0), (0, 5), (5, 0), (1, 1)])
@pytest.mark.parametrize("batch", [0, 2])
def test_empty_sizes(batch: int, sizes: tuple[int, int]) -> None:
    n_q, n_k = sizes
    q, k, v = make_qkv((batch, 2, 2, n_q, n_k, 8, 8))
    mass, top = both(q, k, v, "dense", 4)
    assert (mass.shape, top.values.shape) == ((batch, 2, n_k), (batch, 2, n_q, 4))
    assert top.indices.shape == top.values.shape
    want = 1 if sizes == (1, 1) else 0
    assert (mass == want).all() and (top.values.sum(-1) == want).all()
    assert (top.indices[..., 1:] == -1).all()


def test_more_than_there_are_is_padded() -> None:
    q, k, v = make_qkv((1, 2, 2, 30, 50, 8, 8), seed=14)
    got = sa.attention(q, k, v, causal=True, return_weights="topn:60").weights
    np.testing.assert_array_equal((got.indices >= 0).sum(-1)[0, 0], np.arange(21, 51))
    np.testing.assert_allclose(got.values.sum(-1), 1, rtol=1e-5)


def test_packed_sequences_are_calls_of_their_own() -> None:
    rows, keys = np.array([0, 70, 71, 71, 200]), np.array([0, 90, 90, 160, 330])
    q, k, v = make_qkv((1, 4, 2, 200, 330, 16, 16), seed=15)
    for spec in ("dense", "window:33", "topk:9"):
        mass, top = both(q, k, v, spec, 5, causal=True, cu_seqlens=(rows, keys))
        for s in range(4):
            r, c = slice(rows[s], rows[s + 1]), slice(keys[s], keys[s + 1])
            want = both(q[:, :, r], k[:, :, c], v[:, :, c], spec, 5, causal=True)
            np.testing.assert_allclose(mass[:, :, c], want[0], rtol=2e-6, atol=1e-6)
            np.testing.assert_allclose(top.values[:, :, r], want[1].values, rtol=2e-5)
            shift = np.where(want[1].indices < 0, 0, keys[s])
            np.testing.assert_array_equal(top.indices[:, :, r], want[1].indices + shift)
