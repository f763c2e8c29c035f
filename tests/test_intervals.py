"""Intervals of keys as plans: documents, prefix-LM, ragged rows; masks that are intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import assert_no_worse, make_qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import CAUSAL, MASKS, SIZES, build, mask_names, problem, size_ids, visible
from reference import attention as ref
from reference.prefix import pattern

import sparseattn as sa
from sparseattn import _core


def mask_of(lo: np.ndarray, hi: np.ndarray, n_k: int) -> np.ndarray:
    keys = np.arange(n_k)
    mask: np.ndarray = (keys >= lo[..., None]) & (keys < hi[..., None])
    return mask


def random_intervals(shape: tuple[int, ...], n_k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Any order of rows, some empty, some whole."""
    rng = np.random.default_rng(seed)
    lo, hi = np.sort(rng.integers(0, n_k + 1, (2, *shape)), 0)
    hi = np.where(rng.random(shape) < 0.1, lo, hi)
    return lo, hi


# ---- intervals ----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 150), st.integers(0, 150), st.integers(0, 3), st.integers(0, 2**32))
def test_random_intervals(n_q: int, n_k: int, batch: int, seed: int) -> None:
    shape = (n_q,) if batch == 0 else (batch, n_q)
    lo, hi = random_intervals(shape, n_k, seed)
    plan = sa.Plan.from_intervals(lo, hi, n_k, heads=3)
    want = np.broadcast_to(mask_of(lo, hi, n_k).reshape(max(batch, 1), 1, n_q, n_k), plan.shape)
    np.testing.assert_array_equal(plan.to_mask(), want)
    assert plan.count() == (want.sum(), want.size, want.sum())
    core = plan.pieces[0].core
    assert not core.term_mask
    again = _core.plan_from_arrays(core.arrays())
    np.testing.assert_array_equal(again.to_mask(), want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("lead", [(), (2,)], ids=["shared", "by batch"])
def test_attention_over_intervals(
    dtype: Any, lead: tuple[int, ...], isa: str, threads: int
) -> None:
    q, k, v = make_qkv((2, 4, 2, 130, 170, 24, 16), dtype, seed=1)
    lo, hi = random_intervals((*lead, 130), 170, 2)
    plan = sa.Plan.from_intervals(lo, hi, 170)  # any heads, and any batch unless it says which
    got = sa.attention(q, k, v, plan, return_lse=True)
    kept = np.broadcast_to(mask_of(lo, hi, 170).reshape(-1, 1, 130, 170), (2, 4, 130, 170))
    want, naive = (ref.attention(q, k, v, kept, compute=t) for t in (np.float64, np.float32))
    assert_no_worse(got.out, want[0], than=naive[0])
    assert_no_worse(got.lse, want[1], than=naive[1])
    exact = sa.Plan.from_intervals(lo, hi, 170, batch=2, heads=4)
    assert sa.attention(q, k, v, exact).tobytes() == got.out.tobytes()
    grads = sa.attention_vjp(q, k, v, plan).pullback(np.ones_like(got.out))
    wanted = sa.attention_vjp(q, k, v, mask=kept).pullback(np.ones_like(got.out))
    for mine, theirs in zip(grads[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-5)


def test_long_intervals_are_small() -> None:
    """No n_q x n_k memory, and keys that no row of a block sees are not listed."""
    n = 1 << 18
    start = np.arange(n) // 64 * 64
    far = np.where(np.arange(n) % 2, start, n - 64 - start)  # two runs a block, far apart
    live = _core.live_bytes()
    plan = sa.Plan.from_intervals(far, far + 64, n)
    assert plan.nbytes < 12 * n and _core.live_bytes() - live < 14 * n
    assert plan.count().kept == 64 * n
    arrays = plan.pieces[0].core.arrays()
    assert arrays["len"].sum() <= 128 * (n // 64)


def test_one_interval_for_all_batches_is_one_map() -> None:
    plan = sa.Plan.from_intervals(0, np.arange(1, 101), 100, batch=5, heads=8)
    assert plan.shape == (5, 8, 100, 100) and plan.pieces[0].core.n_maps == 1
    by_batch = sa.Plan.from_intervals(np.zeros((5, 1), int), np.arange(1, 101), 100, heads=8)
    assert by_batch.shape == plan.shape and by_batch.pieces[0].core.n_maps == 5
    np.testing.assert_array_equal(by_batch.to_mask(), plan.to_mask())


def test_intervals_are_copied() -> None:
    lo, hi = np.zeros(9, np.int64), np.arange(1, 10)
    plan = sa.Plan.from_intervals(lo, hi, 9)
    hi[...] = 2**40
    q, k, v = make_qkv((2, 2, 1, 9, 9, 8, 8))
    want = sa.attention(q, k, v, causal=True)
    np.testing.assert_allclose(sa.attention(q, k, v, plan), want, rtol=0, atol=1e-6)


WRONG: list[tuple[Any, Any, Any, type[Exception], str]] = [
    ([0, 3], [2, 2], {}, sa.ArgumentError, "row 1 of batch entry 0 has lo = 3 and hi = 2"),
    ([0, 0], [2, 11], {}, sa.ArgumentError, "row 1 .* hi = 11; give 0 <= lo <= hi <= n_k = 10"),
    ([0, -1], [2, 2], {}, sa.ArgumentError, "lo = -1"),
    ([0, 0], [2, 2**40], {}, sa.ArgumentError, f"hi = {2**40}"),
    ([[0, 0], [0, 9]], [2, 8], {}, sa.ArgumentError, "row 1 of batch entry 1"),
    ([0, 0, 0], [2, 2], {}, sa.ArgumentError, r"lo and hi must have one shape, got \(3,\) and"),
    (0, 5, {}, sa.ArgumentError, r"lo and hi must be \(n_q,\) or \(batch, n_q\), got \(\)"),
    ([0.0, 0.0], [2, 2], {}, sa.DtypeError, "lo has dtype float64, not integers"),
    ([0, 0], [True, True], {}, sa.DtypeError, "hi has dtype bool, not integers"),
    ([0, 0], [2, 2], {"heads": 0}, sa.ArgumentError, "heads must be a number of at least 1"),
    ([0, 0], [2, 2], {"batch": -1}, sa.ArgumentError, "batch must be a number of at least 0"),
    ([0, 0], [2, 2], {"batch": 1.5}, sa.ArgumentError, "batch must be a number"),
    ([0, 0], [2, 2], {"n_k": -1}, sa.ArgumentError, "n_k must be a number of at least 0"),
    ([0, 0], [2, 2], {"n_k": 2**40}, sa.ArgumentError, "n_k must be in"),
    (
        [[0], [0]],
        [[2], [2]],
        {"batch": 3},
        sa.ArgumentError,
        "2 rows of intervals for a batch of 3",
    ),
]


@pytest.mark.parametrize(("lo", "hi", "sizes", "error", "words"), WRONG, ids=range(len(WRONG)))
def test_wrong_intervals(lo: Any, hi: Any, sizes: Any, error: Any, words: str) -> None:
    live = _core.live_bytes()
    with pytest.raises(error, match=words) as raised:
        sa.Plan.from_intervals(lo, hi, **{"n_k": 10, **sizes})
    assert "\n" not in str(raised.value) and _core.live_bytes() == live


def test_intervals_for_other_sizes_are_refused() -> None:
    q, k, v = make_qkv((2, 2, 1, 9, 9, 8, 8))
    for plan in (
        sa.Plan.from_intervals(0, np.arange(1, 9), 9),
        sa.Plan.from_intervals(0, np.arange(1, 10), 10),
        sa.Plan.from_intervals(0, np.arange(1, 10), 9, heads=3),
        sa.Plan.from_intervals(0, np.arange(1, 10), 9, batch=3),
    ):
        with pytest.raises(sa.ArgumentError, match="make a plan for them"):
            sa.attention(q, k, v, plan)


# ---- documents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lead", [(), (3,)], ids=["shared", "by batch"])
def test_documents(causal: bool, lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    ids = rng.permutation(40)[np.sort(rng.integers(0, 40, (*lead, 300)), -1)]
    plan = sa.Plan.from_documents(ids, causal)
    want = ids[..., :, None] == ids[..., None, :]
    if causal:
        want &= np.tri(300, dtype=bool)
    np.testing.assert_array_equal(plan.to_mask(), want.reshape(-1, 1, 300, 300))
    assert not plan.pieces[0].core.term_mask
    q, k, v = make_qkv((3, 4, 2, 300, 300, 16, 16), seed=6)
    masked = sa.attention(q, k, v, mask=want.reshape(-1, 1, 300, 300))
    np.testing.assert_allclose(sa.attention(q, k, v, plan), masked, rtol=0, atol=2e-6)


def test_documents_are_packed_sequences() -> None:
    q, k, v = make_qkv((2, 4, 2, 300, 300, 16, 16), seed=7)
    lengths = [64, 1, 100, 135]
    plan = sa.Plan.from_documents(np.repeat([3, -1, 2**40, 0], lengths), heads=4)
    packed = sa.attention(q, k, v, causal=True, cu_seqlens=[0, 64, 65, 165, 300])
    np.testing.assert_allclose(sa.attention(q, k, v, plan), packed, rtol=0, atol=2e-6)


def test_no_tokens_and_one() -> None:
    assert sa.Plan.from_documents(np.zeros((2, 0), int)).shape == (2, 1, 0, 0)
    assert sa.Plan.from_documents([5]).count().kept == 1


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([0, 0, 1, 1, 0], sa.ArgumentError, "comes back to 0 at token 4: pass mask="),
        ([[0, 1], [0, 1]] * 2 + [[0, 0]], None, ""),
        ([[0, 0, 1], [1, 0, 1]], sa.ArgumentError, "batch entry 1 comes back to 1 at token 2"),
        ([0.0, 1.0], sa.DtypeError, "ids has dtype float64, not integers"),
        (3, sa.ArgumentError, r"ids must be \(n,\) or \(batch, n\), got shape \(\)"),
        ([[[1]]], sa.ArgumentError, "got shape"),
    ],
    ids=range(6),
)
def test_wrong_documents(ids: Any, error: Any, words: str) -> None:
    if error is None:
        assert sa.Plan.from_documents(ids).batch == len(ids)
        return
    with pytest.raises(error, match=words):
        sa.Plan.from_documents(ids)


# ---- prefix-LM ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MASKS, ids=mask_names)
@pytest.mark.parametrize("n", [0, 1, 64, 70, 10_000])
@pytest.mark.parametrize("sizes", SIZES, ids=size_ids)
def test_prefix_under_masks(sizes: Any, n: int, make: Any) -> None:
    """The record under every kind of mask and, which the spec refuses, under causality."""
    mask, key_mask = make(sizes)
    for causal in CAUSAL:
        see = visible(sizes, causal, mask, key_mask)
        plan = build("prefix", sizes, problem(causal, mask, key_mask), n=n)
        want = see & pattern(sizes[3], sizes[4], n)
        np.testing.assert_array_equal(plan.to_mask(), want)
        assert plan.count(sizes[2])[:2] == (want.sum(), see.sum())
        _core.plan_from_arrays(plan.arrays())


def test_prefix_to_the_letter() -> None:
    def table(n_q: int, n_k: int, n: int) -> list[str]:
        q, k, _ = make_qkv((1, 1, 1, n_q, n_k, 4, 4))
        rows = sa.plan(q, k, sa.Prefix(n)).to_mask()[0, 0]
        return ["".join(map(str, row)) for row in rows.astype(int)]

    assert table(4, 4, 2) == ["1100", "1100", "1110", "1111"]
    assert table(2, 5, 1) == ["11110", "11111"]
    assert table(2, 5, 5) == ["11111", "11111"]
    assert table(4, 2, 1) == ["10", "10", "10", "11"]


def test_rows_within_the_prefix_are_one_full_span() -> None:
    """No masks, no clipping: the prefix runs at the speed of dense."""
    core = build("prefix", (1, 1, 1, 256, 256), problem(), n=130)
    a = core.arrays()
    full = [a["len"][x:y].tolist() for x, y in zip(a["row_ptr"], a["see_ptr"], strict=False)]
    assert full == [[130], [130], [128], [192]]


@pytest.mark.parametrize("causal", [True, "top_left"])
def test_prefix_refuses_causality(causal: Any) -> None:
    x = np.ones((2, 10, 4), np.float32)
    for spec in ("prefix:3", "prefix:3+random:2", "prefix:3&topk:2", "perhead(prefix:3|dense)"):
        with pytest.raises(sa.ArgumentError, match=r"Prefix\(3\) is causal .* pass causal=False"):
            sa.attention(x, x, x, spec, causal=causal)


def test_prefix_composes() -> None:
    q, k, _ = make_qkv((2, 4, 2, 60, 60, 16, 16), seed=8)
    prefix = np.broadcast_to(pattern(60, 60, 7), (2, 4, 60, 60))
    window = np.tri(60, dtype=bool) & ~np.tri(60, 60, -9, dtype=bool)
    both = sa.plan(q, k, sa.Prefix(7) & sa.Window(window_size=(8, 0))).to_mask()
    np.testing.assert_array_equal(both, prefix & window)
    top = sa.plan(q, k, "topk:5").to_mask()
    np.testing.assert_array_equal(sa.plan(q, k, "prefix:7+topk:5").to_mask(), prefix | top)
    heads = sa.plan(q, k, "perhead(2*prefix:7|dense|topk:5)").to_mask()
    np.testing.assert_array_equal(heads[:, :2], prefix[:, :2])
    cu = [0, 25, 60]
    packed = sa.plan(q, k, "prefix:7", cu_seqlens=cu).to_mask()[0, 0]
    np.testing.assert_array_equal(packed[:25, :25], pattern(25, 25, 7))
    np.testing.assert_array_equal(packed[25:, 25:], pattern(35, 35, 7))
    assert not packed[25:, :25].any() and not packed[:25, 25:].any()


def test_prefixes_of_a_batch_as_intervals() -> None:
    q, k, v = make_qkv((3, 4, 2, 90, 90, 16, 16), seed=9)
    prefixes = np.array([0, 31, 90])
    plan = sa.Plan.from_intervals(0, np.maximum(np.arange(1, 91), prefixes[:, None]), 90)
    got = sa.attention(q, k, v, plan)
    for b, n in enumerate(prefixes):
        want = sa.attention(q[b], k[b], v[b], sa.Prefix(int(n)))
        np.testing.assert_allclose(got[b], want, rtol=0, atol=2e-6)


# ---- masks that are intervals -------------------------------------------------------------------


def test_masks_of_documents_and_prefixes_are_read_as_intervals() -> None:
    """sa_sight finds the intervals, so that no score asks the mask."""
    ids = np.repeat(np.arange(5), [3, 100, 64, 1, 132])
    documents = ids[:, None] == ids
    masks = {
        "documents": documents,
        "causal documents": documents & np.tri(300, dtype=bool),
        "prefix-LM": pattern(300, 300, 130),
        "prefix-LM by batch": np.stack([pattern(300, 300, n) for n in (0, 77)])[:, None],
    }
    q, k, _ = make_qkv((2, 4, 2, 300, 300, 16, 16), seed=10)
    for name, mask in masks.items():
        for plan in (sa.plan(q, k, mask=mask), sa.Plan.from_mask(mask)):
            core = plan.pieces[0].core
            assert not core.term_mask and core.n_maps <= 2, name
            got, want = (x.reshape(-1, 300, 300)[-1] for x in (plan.to_mask(), mask))
            np.testing.assert_array_equal(got, want)


def test_a_batch_of_none() -> None:
    """Intervals of no batch entry: rows without intervals, not rows of somebody else's memory."""
    none = np.zeros((0, 130), np.int64)
    plan = sa.Plan.from_intervals(none, none, 50)
    assert plan.to_mask().shape == (0, 1, 130, 50)
    core = _core.plan_from_intervals(none, none, 50, 0, 2)
    assert _core.plan_from_arrays(core.arrays()).batch == 0  # which validates
