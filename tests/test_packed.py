"""Packed sequences: one plan over all, each seeing itself alone; the bits of a loop over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import (
    CAUSAL_SPECS,
    EVERY_SPEC,
    assert_no_worse,
    assert_within_ceiling,
    causal_ids,
    causals,
    fit,
    make_qkv,
    random_masks,
)
from core_calls import build as core_build
from core_calls import make as core_make
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import attention as ref

import sparseattn as sa
from sparseattn import _core, packed
from sparseattn.variants import Variant

PACKED = [(spec, causal) for spec, causal in CAUSAL_SPECS if not spec.arrays]
packed_ids = [
    name for name, (spec, _) in zip(causal_ids, CAUSAL_SPECS, strict=True) if not spec.arrays
]
SPECS = [spec for spec in EVERY_SPEC if not spec.arrays]

# Lengths of queries and keys: none of either, none of both, one, more rows than a block holds.
CU_Q = np.array([0, 5, 5, 70, 71, 71, 200, 207])
CU_K = np.array([0, 9, 9, 74, 175, 175, 238, 238])
ALL = slice(None)
SHAPE = (2, 6, 2, int(CU_Q[-1]), int(CU_K[-1]), 16, 24)


def sequences(cu_q: Any, cu_k: Any) -> list[tuple[slice, slice]]:
    rows = [slice(*ends) for ends in itertools.pairwise(map(int, cu_q))]
    return list(
        zip(rows, [slice(*ends) for ends in itertools.pairwise(map(int, cu_k))], strict=True)
    )


def part(call: dict[str, Any], rows: slice, keys: slice) -> dict[str, Any]:
    """The call of one sequence."""
    cut = {name: x[:, :, rows, keys] for name, x in call.items() if name in ("mask", "bias")}
    if "key_mask" in call:
        cut["key_mask"] = call["key_mask"][:, keys]
    return {**call, **cut}


def block_diagonal(cu_q: Any, cu_k: Any) -> np.ndarray:
    see = np.zeros((cu_q[-1], cu_k[-1]), bool)
    for rows, keys in sequences(cu_q, cu_k):
        see[rows, keys] = True
    return see


def loop(q: Any, k: Any, v: Any, spec: Any, cu: Any, **call: Any) -> tuple[np.ndarray, np.ndarray]:
    """One call a sequence."""
    parts = [
        sa.attention(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], spec, return_lse=True,
            **part(call, rows, keys),
        )
        for rows, keys in sequences(*cu)
    ]  # fmt: skip
    out, lse = zip(*((p.out, p.lse) for p in parts), strict=True)
    return np.concatenate(out, 2), np.concatenate(lse, 2)


# ---- structure ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "causal"), PACKED, ids=packed_ids)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_the_plan_is_that_of_each_sequence(spec: Variant, causal: Any, masked: bool) -> None:
    shape = fit(spec, SHAPE)
    q, k, _ = make_qkv(shape, seed=1)
    call = {"causal": causal, **(random_masks(shape) if masked else {})}
    plan = sa.plan(q, k, spec, cu_seqlens=(CU_Q, CU_K), **call)
    want = np.zeros((*shape[:2], *shape[3:5]), bool)
    counts = np.zeros(3, int)
    for rows, keys in sequences(CU_Q, CU_K):
        one = sa.plan(q[:, :, rows], k[:, :, keys], spec, **part(call, rows, keys))
        want[:, :, rows, keys] = one.to_mask()
        counts += one.count()
    np.testing.assert_array_equal(plan.to_mask(), want)
    assert plan.count() == tuple(counts)
    rng = np.random.default_rng(2)
    for _ in range(20):
        b, h, i = (int(rng.integers(size)) for size in want.shape[:3])
        np.testing.assert_array_equal(plan.rows(h).keys(b, h, i), np.flatnonzero(want[b, h, i]))
    for piece in plan.pieces:
        arrays = piece.core.arrays()
        assert set(CU_Q[:-1][np.diff(CU_Q) > 0]) <= set(arrays["row_start"]), "blocks cross"
        again = _core.plan_from_arrays(arrays)  # validated, and written and read without loss
        for name, value in again.arrays().items():
            np.testing.assert_array_equal(value, arrays[name])
        if not piece.core.term_mask:
            np.testing.assert_array_equal(again.to_mask(), want[:, piece.begin : piece.end])


@st.composite
def offsets(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    lengths = draw(st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80)), max_size=9))
    ends = np.array([(0, 0), *lengths]).cumsum(0)
    return ends[:, 0], ends[:, 1]


@settings(max_examples=60, deadline=None)
@given(offsets(), st.sampled_from([True, "top_left"]), st.data())
def test_random_sequences(cu: Any, causal: Any, data: st.DataObject) -> None:
    n_q, n_k = int(cu[0][-1]), int(cu[1][-1])
    spec = data.draw(st.sampled_from(["dense", "window:5:sinks=2:globals=7", "topk:3", "random:4"]))
    q, k, v = make_qkv((1, 2, 1, n_q, n_k, 8, 8), seed=3)
    plan = sa.plan(q, k, spec, causal=causal, cu_seqlens=cu)
    kept = plan.to_mask()
    assert not (kept & ~block_diagonal(*cu)).any()
    for rows, keys in sequences(*cu):
        one = sa.plan(q[:, :, rows], k[:, :, keys], spec, causal=causal)
        np.testing.assert_array_equal(kept[:, :, rows, keys], one.to_mask())
    got = sa.attention(q, k, v, plan, return_lse=True)
    want = ref.attention(q, k, v, kept)
    assert_within_ceiling(got.out, want[0])
    assert_within_ceiling(got.lse, want[1])


def test_sequences_of_one_length_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 of length 8 must not take 10,000 plans where nothing of them is read."""
    made: list[Any] = []
    one = _core.plan_build
    monkeypatch.setattr(_core, "plan_build", lambda *args: made.append(args) or one(*args))
    x = np.zeros((1, 1, 80_003, 1), np.float32)
    cu = [*range(0, 80_001, 8), 80_003]
    plan = sa.plan(x, x, "window:3", causal=True, cu_seqlens=cu)
    assert len(made) == 2
    assert plan.count().kept == 10_000 * (1 + 2 + 6 * 3) + 1 + 2 + 3
    assert "10001 sequences" in repr(plan) and plan.nbytes < 60 * 80_003


def test_long_sequences_keep_their_long_blocks() -> None:
    """Blocks of 128 rows beside shorter ones: as many rows as the plan of each alone has."""
    x = np.zeros((1, 1, 2100 + 30, 4), np.float32)
    core = sa.plan(x, x, causal=True, cu_seqlens=[0, 30, 2130]).pieces[0].core
    starts = [0, *range(30, 2130, 128)]
    assert core.rows_per_block == 128
    np.testing.assert_array_equal(core.arrays()["row_start"], starts)


# ---- arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_the_bits_of_a_loop(spec: Variant, dtype: str, isa: str, threads: int) -> None:
    shape = fit(spec, SHAPE)
    q, k, v = make_qkv(shape, dtype, seed=4)
    cu = (CU_Q, CU_K)
    got = sa.attention(q, k, v, spec, causal=causals(spec)[-1], cu_seqlens=cu, return_lse=True)
    out, lse = loop(q, k, v, spec, cu, causal=causals(spec)[-1])
    assert got.out.tobytes() == out.tobytes() and got.lse.tobytes() == lse.tobytes()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_masks_terms_and_sinks_of_a_loop(spec: Variant) -> None:
    shape = fit(spec, SHAPE)
    q, k, v = make_qkv(shape, seed=5)
    rng = np.random.default_rng(6)
    bias = rng.standard_normal((2, shape[1], *shape[3:5])).astype("f4")
    call = {
        "causal": causals(spec)[-1],
        **random_masks(shape),
        "bias": bias,
        "softcap": 3.0,
        "params": {"sink": rng.standard_normal(shape[1]).astype("f4")},
    }
    cu = (CU_Q, CU_K)
    got = sa.attention(q, k, v, spec, cu_seqlens=cu, return_lse=True, **call)
    out, lse = loop(q, k, v, spec, cu, **call)
    assert got.out.tobytes() == out.tobytes() and got.lse.tobytes() == lse.tobytes()
    plan_call = {name: x for name, x in call.items() if name != "params"}
    plan = sa.plan(q, k, spec, cu_seqlens=cu, **plan_call)
    again = sa.attention(
        q, k, v, plan, bias=bias, softcap=3.0, params=call["params"], causal=call["causal"]
    )
    assert again.tobytes() == out.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_packed_is_dense_under_a_block_diagonal_mask(dtype: Any, isa: str, threads: int) -> None:
    cu = np.array([0, 40, 40, 41, 110, 190])
    q, k, v = make_qkv((1, 4, 2, 190, 190, 24, 16), dtype, seed=7)
    kept = np.broadcast_to(block_diagonal(cu, cu) & np.tri(190, dtype=bool), (1, 4, 190, 190))
    got = sa.attention(q, k, v, causal=True, cu_seqlens=cu, return_lse=True)
    want, naive = (ref.attention(q, k, v, kept, compute=t) for t in (np.float64, np.float32))
    assert_no_worse(got.out, want[0], than=naive[0])
    assert_no_worse(got.lse, want[1], than=naive[1])
    masked = sa.attention(q, k, v, mask=kept, return_lse=True)
    np.testing.assert_allclose(got.out, masked.out, rtol=0, atol=4e-6)


def test_few_rows_over_long_keys() -> None:
    """Decoding of a packed batch: keys are cut into pieces that do not meet the sequences' ends."""
    cu = (np.arange(4), np.array([0, 5000, 5001, 12_000]))
    q, k, v = make_qkv((1, 4, 2, 3, 12_000, 16, 16), seed=8)
    got = sa.attention(q, k, v, causal=True, cu_seqlens=cu, return_lse=True)
    kept = np.broadcast_to(block_diagonal(*cu), (1, 4, 3, 12_000))
    want, naive = (ref.attention(q, k, v, kept, compute=t) for t in (np.float64, np.float32))
    assert_no_worse(got.out, want[0], than=naive[0])
    assert_no_worse(got.lse, want[1], than=naive[1])


@pytest.mark.parametrize("spec", ["dense", "window:9", "topk:4", "topk:4:placement=post"])
def test_other_sequences_have_no_effect(spec: str, isa: str) -> None:
    q, k, v = make_qkv((1, 2, 1, 200, 200, 16, 16), seed=9)
    cu = [0, 50, 130, 200]
    before = sa.attention(q, k, v, spec, causal=True, cu_seqlens=cu, return_lse=True)
    for bad in (np.nan, np.inf, 1e30):
        arrays = [x.copy() for x in (q, k, v)]
        for x in arrays:
            x[:, :, 50:130] = bad
        got = sa.attention(*arrays, spec, causal=True, cu_seqlens=cu, return_lse=True)
        for own in (slice(0, 50), slice(130, 200)):
            assert got.out[:, :, own].tobytes() == before.out[:, :, own].tobytes()
            assert got.lse[:, :, own].tobytes() == before.lse[:, :, own].tobytes()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_of_a_loop(spec: Variant, threads: int) -> None:
    shape = fit(spec, (2, 6, 2, 137, 170, 16, 24))
    cu = (np.array([0, 7, 7, 80, 137]), np.array([0, 20, 30, 103, 170]))
    q, k, v = make_qkv(shape, np.float64, seed=10)
    rng = np.random.default_rng(11)
    call = {
        "causal": causals(spec)[-1],
        "bias": rng.standard_normal((2, shape[1], 137, 170)),
        "params": {"sink": rng.standard_normal(shape[1])},
    }
    vjp = sa.attention_vjp(q, k, v, spec, cu_seqlens=cu, **call)
    dout, dlse = (rng.standard_normal(x.shape) for x in (vjp.out, vjp.lse))
    got = vjp.pullback(dout, dlse)
    want = [np.zeros(x.shape) for x in (q, k, v, call["bias"])]
    dsink = np.zeros(shape[1])
    for rows, keys in sequences(*cu):
        mine = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
        one = sa.attention_vjp(*mine, spec, **part(call, rows, keys))
        grads = one.pullback(dout[:, :, rows], dlse[:, :, rows])
        for total, at, grad in zip(want, (rows, keys, keys), grads[:3], strict=False):
            total[:, :, at] = grad
        want[3][:, :, rows, keys] = grads.dbias
        dsink += grads.dparams["sink"]
    for mine, theirs in zip([*got[:4], got.dparams["sink"]], [*want, dsink], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("spec", ["dense", "window:20", "topk:5", "topk:5:placement=post"])
def test_weights_of_a_loop(spec: str) -> None:
    q, k, v = make_qkv(SHAPE, seed=12)

    def weights(kind: Any, rows: slice = ALL, keys: slice = ALL, **cu: Any) -> Any:
        one = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
        return sa.attention(*one, spec, causal=True, return_weights=kind, **cu).weights

    packed = {"cu_seqlens": (CU_Q, CU_K)}
    got = weights(True, **packed)
    want = np.zeros(got.shape, np.float32)
    top = weights("topn:3", **packed)
    for rows, keys in sequences(CU_Q, CU_K):
        want[:, :, rows, keys] = weights(True, rows, keys)
        own = weights("topn:3", rows, keys)
        np.testing.assert_allclose(top.values[:, :, rows], own.values, rtol=0, atol=1e-6)
        shifted = np.where(own.indices < 0, -1, own.indices + keys.start)
        np.testing.assert_array_equal(top.indices[:, :, rows], shifted)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(weights("mass", **packed), want.sum(-2), rtol=0, atol=1e-5)


def test_dropout_is_addressed_by_place_in_the_whole_call() -> None:
    q, k, v = make_qkv((1, 2, 1, 90, 90, 16, 16), np.float64, seed=13)
    cu = [0, 31, 90]
    call = {"causal": True, "dropout_p": 0.4, "seed": 5}
    got = sa.attention(q, k, v, cu_seqlens=cu, **call)
    mask = np.broadcast_to(block_diagonal(cu, cu), (1, 2, 90, 90))
    np.testing.assert_allclose(got, sa.attention(q, k, v, mask=mask, **call), rtol=0, atol=1e-12)
    assert np.abs(got - sa.attention(q, k, v, causal=True, cu_seqlens=cu)).max() > 0.1


# ---- what is given ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cu",
    [
        [0, 3, 10],
        (0, 3, 10),
        np.array([0, 3, 10], np.int32),
        np.array([0, 3, 10], np.uint8),
        np.array([0, 9, 3, 9, 10])[::2],
        ([0, 3, 10], np.array([0, 3, 10])),
    ],
    ids=["list", "tuple", "int32", "uint8", "strided", "pair"],
)
def test_kinds_of_offsets(cu: Any) -> None:
    x = np.ones((2, 10, 4), np.float32)
    plan = sa.plan(x, x, cu_seqlens=cu)
    assert plan.count().kept == 2 * (9 + 49) and plan.kept_share == 1
    np.testing.assert_array_equal(plan.to_mask()[0], block_diagonal([0, 3, 10], [0, 3, 10]))


def test_no_sequence_and_no_tokens() -> None:
    x = np.ones((2, 0, 4), np.float32)
    for cu in ([0], [0, 0, 0]):
        assert sa.attention(x, x, x, "window:3", causal=True, cu_seqlens=cu).shape == (2, 0, 4)
    keys = np.ones((2, 5, 4), np.float32)
    out, lse = sa.attention(x, keys, keys, cu_seqlens=([0, 0], [0, 5]), return_lse=True)
    assert out.shape == (2, 0, 4) and lse.shape == (2, 0)
    out, lse = sa.attention(keys, x, x, cu_seqlens=([0, 2, 5], [0, 0, 0]), return_lse=True)
    assert not out.any() and np.isneginf(lse).all()


def test_a_plan_keeps_its_own_offsets() -> None:
    q, k, v = make_qkv((1, 2, 1, 20, 20, 8, 8), seed=14)
    cu = np.array([0, 8, 20])
    plan = sa.plan(q, k, "topk:3:placement=post", causal=True, cu_seqlens=cu)
    want = sa.attention(q, k, v, plan)
    cu[1] = 3
    assert sa.attention(q, k, v, plan).tobytes() == want.tobytes()
    assert plan.cu_seqlens is not None
    np.testing.assert_array_equal(plan.cu_seqlens[0], [0, 8, 20])


def test_torch_offsets(torch: Any) -> None:
    q, k, v = map(torch.from_numpy, make_qkv((1, 4, 2, 40, 40, 16, 16), seed=15))
    q.requires_grad_()
    cu = torch.tensor([0, 11, 40], dtype=torch.int32)
    out = sa.attention(q, k, v, causal=True, cu_seqlens=cu)
    mask = torch.from_numpy(block_diagonal([0, 11, 40], [0, 11, 40]) & np.tri(40, dtype=bool))
    attend = torch.nn.functional.scaled_dot_product_attention
    want = attend(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
    (got_grad,) = torch.autograd.grad(out.square().sum(), q)
    (want_grad,) = torch.autograd.grad(want.square().sum(), q)
    torch.testing.assert_close(got_grad, want_grad, rtol=0, atol=1e-4)


WRONG = [
    ([0, 7, 5, 10], sa.ArgumentError, "cu_seqlens must not decrease, got 5 after 7 as entry 2"),
    ([0, 11, 10], sa.ArgumentError, "must not decrease, got 10 after 11"),
    ([0, -1, 10], sa.ArgumentError, "must not decrease, got -1 after 0"),
    ([0, 2**63 - 1, -(2**63), 10], sa.ArgumentError, "must not decrease"),
    ([1, 5, 10], sa.ArgumentError, "cu_seqlens must start at 0"),
    ([0, 5, 9], sa.ArgumentError, "cu_seqlens must end at the length = 10, got 9"),
    ([0, 5, 11], sa.ArgumentError, "must end at the length = 10, got 11"),
    ([3, 7], sa.ArgumentError, "must start at 0"),
    ([], sa.ArgumentError, r"shape \(sequences \+ 1,\), got shape \(0,\)"),
    (10, sa.ArgumentError, r"got shape \(\)"),
    ([[0, 3], [3, 10], [4, 5]], sa.ArgumentError, r"got shape \(3, 2\)"),
    ([0.0, 10.0], sa.DtypeError, r"float64, not integers: pass np.asarray\(cu_seqlens, np.int64\)"),
    (np.array([0.0, 10.0]), sa.DtypeError, r"pass cu_seqlens.astype\(np.int64\)"),
    ([False, True], sa.DtypeError, "cu_seqlens has dtype bool, not integers"),
    ("0,10", sa.ArgumentError, "cu_seqlens must be an array"),
    (([0, 10], [0, 5, 10]), sa.ArgumentError, "2 offsets of queries and 3 of keys"),
    (([0, 10], [0, 11]), sa.ArgumentError, r"cu_seqlens\[1\] must end at n_k = 10, got 11"),
    (([0, 4, 3, 10], [0, 1, 2, 10]), sa.ArgumentError, r"cu_seqlens\[0\] must not decrease"),
]


@pytest.mark.parametrize(("cu", "error", "words"), WRONG, ids=range(len(WRONG)))
def test_wrong_offsets(cu: Any, error: Any, words: str) -> None:
    x = np.ones((2, 10, 4), np.float32)
    calls: list[Callable[[], Any]] = [
        lambda: sa.attention(x, x, x, cu_seqlens=cu),
        lambda: sa.plan(x, x, cu_seqlens=cu),
        lambda: sa.attention_vjp(x, x, x, cu_seqlens=cu),
    ]
    for call in calls:
        with pytest.raises(error, match=words) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_what_does_not_go_with_offsets() -> None:
    x = np.ones((2, 10, 4), np.float32)
    with pytest.raises(sa.ArgumentError, match=r"must be a pair \(cu_q, cu_k\)"):
        sa.attention(x[:, :5], x, x, cu_seqlens=[0, 10])
    with pytest.raises(sa.ArgumentError, match="blockmask takes layout for one sequence"):
        layout = {"layout": np.ones((1, 1, 1), bool)}
        sa.attention(x, x, x, "blockmask", params=layout, cu_seqlens=[0, 10])
    with pytest.raises(sa.ArgumentError, match="cu_seqlens is part of a plan"):
        sa.attention(x, x, x, sa.plan(x, x), cu_seqlens=[0, 10])
    for name in ("cu_seqlens_q", "max_seqlen_k"):
        with pytest.raises(sa.UnknownArgument, match=f"{name}: use .*cu_seqlens"):
            sa.attention(x, x, x, **{name: [0, 10]})
    with pytest.raises(sa.ArgumentError, match="one spec a layer"):
        sa.attention(x, x, x, "perlayer(0=dense)", cu_seqlens=[0, 5, 10])
    with pytest.raises(sa.ArgumentError, match="needs causal=True"):
        sa.attention(x, x, x, "window:3", cu_seqlens=[0, 5, 10])


# ---- the core -----------------------------------------------------------------------------------


def mixed_plans() -> list[_core.Plan]:
    """Shared and own maps, bands and none, single keys and spans, masks that are read."""
    q, k, _ = core_make()
    mask = np.random.default_rng(3).random((2, 4, 70, 130)) < 0.5
    masked = core_build("dense", q, k, (1, 0.25, 0.0, mask, None, None))
    names = [name for name in _core.variants() if name != "blockmask"]
    return [masked, *(core_build(name, q, k) for name in names)]


def test_plans_of_any_kind_pack() -> None:
    plans = mixed_plans()
    whole = np.zeros((2, 4, 70 * len(plans), 130 * len(plans)), bool)
    mask = np.ones(whole.shape, bool)
    mask[:, :, :70, :130] = plans[0].to_mask()
    for s, plan in enumerate(plans):
        whole[:, :, 70 * s : 70 * (s + 1), 130 * s : 130 * (s + 1)] = plan.to_mask()
    plan = _core.plan_pack(tuple(plans), mask, None)
    np.testing.assert_array_equal(plan.to_mask(), whole)
    assert plan.heads_per_map == 1 and plan.n_maps == 8 and plan.term_mask
    kept, visible, _ = plan.count(4)
    assert kept == whole.sum() and visible == sum(p.count(4)[1] for p in plans)
    twice = _core.plan_pack((plan, plan), np.tile(mask, (2, 2)), None).to_mask()
    np.testing.assert_array_equal(twice[:, :, : whole.shape[2], : whole.shape[3]], whole)
    np.testing.assert_array_equal(twice[:, :, whole.shape[2] :, whole.shape[3] :], whole)
    assert twice.sum() == 2 * whole.sum()


def test_single_keys_stay_single() -> None:
    """Selectors alone need no lengths of spans; heads that share a map go on sharing it."""
    q, k, _ = core_make()
    topk, window = core_build("topk", q, k), core_build("window", q, k)
    arrays = _core.plan_pack((topk, topk), None, None).arrays()
    assert arrays["len"] is None and arrays["span_len"] == 1
    pair = _core.plan_pack((window, window), None, None)
    assert pair.n_maps == 1 and pair.heads_per_map == 4
    assert _core.plan_pack((window, topk), None, None).arrays()["len"] is not None


def test_longer_spans_of_one_length_stop_at_their_sequence() -> None:
    lo, hi = np.zeros(3, np.int32), np.full(3, 10, np.int32)
    one = {
        "n_q": 3, "n_k": 10, "n_blocks": 1, "n_maps": 1, "batch": 1, "heads": 1,
        "rows_per_block": 4, "heads_per_map": 1, "per_batch": False, "term_mask": False,
        "row_start": np.array([0], np.int32), "row_ptr": np.array([0, 2]),
        "see_ptr": np.array([2]), "band_ptr": np.array([2]), "n_spans": 2, "span_len": 4,
        "start": np.array([0, 8], np.int32), "len": None, "see_maps": 1, "see_lo": lo,
        "see_hi": hi, "band_maps": 0, "band_lo": None, "band_hi": None,
    }  # fmt: skip
    plan = _core.plan_from_arrays(one)
    row = [1, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    got = _core.plan_pack((plan, plan), None, None).to_mask()[0, 0].astype(int)
    np.testing.assert_array_equal(got[0], row + [0] * 10)
    np.testing.assert_array_equal(got[5], [0] * 10 + row)


def test_what_pack_refuses() -> None:
    q, k, _ = core_make()
    plan = core_build("dense", q, k)
    other = core_build("dense", q[:1], k[:1])
    for bad in ((), [plan], (plan, None), plan):
        with pytest.raises(_core.DtypeError, match="plans"):
            _core.plan_pack(bad, None, None)  # type: ignore[arg-type]
    with pytest.raises(_core.ArgumentError, match="plan 1 is for batch 1 and 4 heads"):
        _core.plan_pack((plan, other), None, None)
    live = _core.live_bytes()
    for mask in (np.ones((2, 4, 70, 130), bool), np.ones((2, 1, 140, 260), bool)):
        with pytest.raises(_core.ArgumentError, match="mask must have"):
            _core.plan_pack((plan, plan), mask, None)
    with pytest.raises(_core.ArgumentError, match="key_mask must have 260"):
        _core.plan_pack((plan, plan), None, np.ones((2, 130), bool))
    assert _core.live_bytes() == live
    long = np.lib.stride_tricks.as_strided(np.zeros(1, "f4"), (1, 1, 2**29, 1), (0, 0, 0, 4))
    huge = core_build("dense", long[:, :, :1], long)
    with pytest.raises(_core.ArgumentError, match=r"length of k must be in \[0, 1073741824\]"):
        _core.plan_pack((huge, huge, huge), None, None)
    with pytest.raises(_core.ArgumentError, match="plan_build plans one sequence"):
        cu = (np.array([0, 70]), np.array([0, 130]))
        core_build("dense", q, k, (0, 1.0, 0.0, None, None, None, 0.0, 0, None, cu))


def test_the_door_gives_int64_offsets() -> None:
    cu_q, cu_k = packed.read_cu_seqlens(np.array([0, 3], np.uint16), 3, 3)
    assert cu_q.dtype == cu_k.dtype == np.int64
