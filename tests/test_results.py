"""What calls give back: results, weights, outputs in place, plans, merges, PyTorch's signature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import (
    CAUSAL_SPECS,
    MIDDLE,
    assert_no_worse,
    assert_within_ceiling,
    causal_ids,
    expected_rows,
    fit,
    make_params,
    make_qkv,
    random_masks,
)
from reference import attention as ref

import sparseattn as sa
from sparseattn import _core
from sparseattn.plan import shares
from sparseattn.variants import Variant

DTYPES = [np.float32, np.float64]


def test_results_as_asked_for() -> None:
    q, k, v = make_qkv((2, 4, 2, 9, 11, 16, 8))
    plain = sa.attention(q, k, v)
    assert type(plain) is np.ndarray
    both = sa.attention(q, k, v, return_lse=True)
    out, lse = both
    assert both.out is out and both.weights is None and lse.shape == (2, 4, 9)
    with_weights = sa.attention(q, k, v, return_weights=True)
    _, weights = with_weights
    assert with_weights.lse is None and weights.shape == (2, 4, 9, 11)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    all_three = sa.attention(q, k, v, return_lse=True, return_weights=True)
    assert all_three._fields == ("out", "lse", "weights")
    assert all_three.out.tobytes() == plain.tobytes()


@pytest.mark.parametrize("spec", ["dense", "topk:5", "topk:5:placement=post", "window:40:sinks=2"])
def test_weights_of_large_problems_come_by_rows(spec: str) -> None:
    q, k, v = make_qkv((1, 2, 1, 1500, 1500, 16, 8), np.float64, seed=15)
    mask = np.random.default_rng(16).random((1500, 1500)) < 0.9
    call = {"causal": True, "mask": mask}
    _, weights = sa.attention(q, k, v, spec, return_weights=True, **call)
    assert weights.shape == (1, 2, 1500, 1500)
    kept, full = expected_rows(sa.parse(spec), q, k, call)
    assert weights.nnz == kept.sum()
    rows = weights.rows(0, 1, 700, 900)
    want = ref.weights(q, k, kept, full=full)[0, 1]
    got = np.zeros((200, 1500))
    for r in range(200):
        at = slice(rows.indptr[r], rows.indptr[r + 1])
        got[r, rows.indices[at]] = rows.values[at]
    np.testing.assert_allclose(got, want[700:900], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(weights.to_dense()[0, 1], want, rtol=1e-10, atol=1e-14)
    assert f"{weights.nnz:,} entries" in repr(weights)


def test_out_is_written_in_place() -> None:
    q, k, v = make_qkv((2, 4, 2, 9, 11, 16, 8))
    want = sa.attention(q, k, v)
    out = np.empty((2, 9, 4, 8), np.float32).swapaxes(1, 2)
    assert sa.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(out, want)
    for target in (np.empty((2, 4, 9, 16), np.float32)[..., ::2], np.empty(want.shape, ">f4")):
        assert sa.attention(q, k, v, out=target) is target
        np.testing.assert_array_equal(target, want)
    packed = np.zeros((3, 2, 4, 11, 16), np.float32)  # out beside q and k in one array
    packed[1, :, :2], packed[2, :, :2] = k, np.pad(v, [(0, 0)] * 3 + [(0, 8)])
    beside = packed[0][:, :, :9, :8]
    sa.attention(q, packed[1][:, :2], packed[2][:, :2, :, :8], out=beside)
    np.testing.assert_array_equal(beside, want)


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "bias", "key_mask"])
def test_out_must_not_overlap(name: str) -> None:
    q, k, v = make_qkv((2, 2, 2, 16, 16, 16, 16), strided=False)
    arrays = {"q": q, "k": k, "v": v, "bias": np.zeros((2, 2, 16, 16), np.float32)}
    arrays["mask"] = np.ones(4096, np.uint8).view(bool)[:1024].reshape(2, 2, 16, 16)
    arrays["key_mask"] = np.ones(4096, np.uint8).view(bool)[:32].reshape(2, 16)
    whole = arrays[name].base if "mask" in name else arrays[name]
    while whole.base is not None:
        whole = whole.base
    out = whole.reshape(-1).view(np.float32)[:1024].reshape(2, 2, 8, 32)[..., :16]
    out = np.lib.stride_tricks.as_strided(out, (2, 2, 16, 16), (0, 0, 64, 4))
    with pytest.raises(sa.ArgumentError, match=r"out must (not overlap|hold each)"):
        sa.attention(**arrays, out=out)


def test_half_precision_is_stored_so_and_computed_in_float32() -> None:
    q, k, v = make_qkv((2, 4, 2, 9, 11, 16, 8), np.float16)
    out, lse = sa.attention(q, k, v, return_lse=True)
    assert (out.dtype, lse.dtype) == (np.float16, np.float32)
    want = sa.attention(*(x.astype(np.float32) for x in (q, k, v)))
    np.testing.assert_array_equal(out, want.astype(np.float16))
    target = np.empty_like(out)
    assert sa.attention(q, k, v, out=target) is target
    np.testing.assert_array_equal(target, out)


def test_other_kinds_of_arrays_are_taken() -> None:
    q, k, v = make_qkv((2, 4, 2, 9, 11, 16, 8), strided=False)
    want = sa.attention(q, k, v)

    class Boxed:
        def __init__(self, x: np.ndarray) -> None:
            self.x = x

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return self.x

    class Capsule:
        def __init__(self, x: np.ndarray) -> None:
            self.x = x

        def __dlpack__(self, **how: Any) -> Any:
            return self.x.__dlpack__(**how)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.x.__dlpack_device__()

    for box in (Boxed, Capsule, memoryview, np.ndarray.tolist):
        arrays = [box(x) for x in (q, k, v)]
        if box is np.ndarray.tolist:
            np.testing.assert_allclose(sa.attention(*arrays), want, atol=1e-6)  # lists are float64
        else:
            got = sa.attention(*arrays)
            assert type(got) is np.ndarray and got.tobytes() == want.tobytes()


@pytest.mark.parametrize("axis", range(5))
def test_sizes_of_zero(axis: int) -> None:
    names = ("batch", "n_q", "n_k", "dim", "dim_v")
    sizes = {name: 0 if at == axis else 3 for at, name in enumerate(names)}
    q = np.ones((sizes["batch"], 2, sizes["n_q"], sizes["dim"]), np.float32)
    k = np.ones((sizes["batch"], 2, sizes["n_k"], sizes["dim"]), np.float32)
    v = np.ones((sizes["batch"], 2, sizes["n_k"], sizes["dim_v"]), np.float32)
    if names[axis] in ("dim", "dim_v"):
        with pytest.raises(sa.ArgumentError, match="width"):
            sa.attention(q, k, v)
        return
    out, lse = sa.attention(q, k, v, return_lse=True)
    assert out.shape == (*q.shape[:3], 3) and not out.any()
    if names[axis] == "n_k":
        assert np.isneginf(lse).all()


# ---- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "causal"), CAUSAL_SPECS, ids=causal_ids)
def test_a_plan_runs_as_its_spec(spec: Variant, causal: bool | str) -> None:
    shape = fit(spec, MIDDLE)
    q, k, v = make_qkv(shape, seed=17)
    call = {"causal": causal, "params": make_params(spec, shape), **random_masks(shape)}
    plan = sa.plan(q, k, spec, **call)
    want = sa.attention(q, k, v, spec, return_lse=True, **call)
    got = sa.attention(q, k, v, plan, return_lse=True)
    assert got.out.tobytes() == want.out.tobytes() and got.lse.tobytes() == want.lse.tobytes()
    again = sa.attention(q, k, v, plan, causal=causal)
    assert again.tobytes() == want.out.tobytes()
    assert plan.nbytes > 0 and f"n_q {shape[3]}" in repr(plan) and str(spec) in repr(plan)


def test_a_plan_keeps_its_own_masks() -> None:
    q, k, v = make_qkv(MIDDLE)
    masks = random_masks(MIDDLE)
    plan = sa.plan(q, k, **masks)
    want = sa.attention(q, k, v, **masks)
    for mask in masks.values():
        mask[...] = ~mask
    assert sa.attention(q, k, v, plan).tobytes() == want.tobytes()


def test_plan_of_a_mask() -> None:
    q, k, v = make_qkv(MIDDLE)
    mask = random_masks(MIDDLE)["mask"]
    plan = sa.Plan.from_mask(mask)
    np.testing.assert_array_equal(plan.to_mask(), mask)
    want = sa.attention(q, k, v, mask=mask)
    np.testing.assert_allclose(sa.attention(q, k, v, plan), want, atol=1e-6)
    flat = sa.Plan.from_mask(mask[0, 0])  # one mask for every batch and head
    np.testing.assert_array_equal(flat.to_mask()[0], mask[0, 0])
    want = sa.attention(q, k, v, mask=mask[0, 0])
    np.testing.assert_allclose(sa.attention(q, k, v, flat), want, atol=1e-6)


def test_plan_of_a_function_of_indices() -> None:
    calls = []

    def fn(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        calls.append(q_idx.shape)
        return (q_idx >= kv_idx) & (q_idx - kv_idx <= h + b)

    plan = sa.Plan.from_mask_mod(fn, 2, 3, 1030, 20)
    i, j = np.arange(1030)[:, None], np.arange(20)
    want = np.array([[(i >= j) & (i - j <= h + b) for h in range(3)] for b in range(2)])
    np.testing.assert_array_equal(plan.to_mask(), want)
    assert max(shape[0] for shape in calls) <= 1024
    shared = sa.Plan.from_mask_mod(lambda b, h, q, k: q >= k, None, None, 65, 131)
    q, k, v = make_qkv(MIDDLE)
    want = sa.attention(q, k, v, causal="top_left")
    np.testing.assert_allclose(sa.attention(q, k, v, shared), want, atol=1e-6)


def test_pictures_show_shares_of_pairs() -> None:
    q, k, _ = make_qkv((1, 2, 1, 64, 128, 16, 16))
    plan = sa.plan(q, k, "topk:9", causal=True)
    np.testing.assert_array_equal(shares(plan, 1, 128), plan.to_mask()[0, 1])
    coarse = plan.to_mask()[0, 1].reshape(16, 4, 16, 8).mean((1, 3))
    np.testing.assert_allclose(shares(plan, 1, 16), coarse)


def test_pictures() -> None:
    q, k, _ = make_qkv((1, 6, 2, 300, 300, 16, 16))
    plan = sa.plan(q, k, "window:30", causal=True)
    svg = plan._repr_svg_()
    assert svg.startswith("<svg") and svg.endswith("</svg>") and svg.count("<text") == 1
    assert 64 <= svg.count("<rect") < 5000
    many = sa.plan(q, k, "perhead(4*window:64|2*dense)", causal=True)._repr_html_()
    assert many.count("<text") == 4 and "perhead(4*window:64|2*dense)" in many
    from xml.etree import ElementTree

    ElementTree.fromstring(svg)
    ElementTree.fromstring(sa.plan(q[:, :, :0], k)._repr_html_())


def test_parts_in_one_call_are_separate_calls() -> None:
    q, k, v = make_qkv((2, 6, 3, 65, 131, 16, 24))
    problem = (1, 0.25, 0.0, None, None, None)
    plans = [_core.plan_build(s.kind, s, None, q, k, problem) for s in (sa.Dense(), sa.TopK(9))]
    out, lse = np.empty((2, 6, 65, 24), np.float32), np.empty((2, 6, 65), np.float32)
    parts = ((plans[0], 0, 2), (plans[1], 2, 6))
    _core.attend(q, k, v, parts, problem, out, lse)
    for plan, begin, end in parts:
        whole = np.empty_like(out)
        _core.attend(q, k, v, plan, problem, whole, None)
        assert out[:, begin:end].tobytes() == whole[:, begin:end].tobytes()


# ---- merge --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
def test_merge_of_parts_is_the_whole(dtype: Any, isa: str) -> None:
    q, k, v = make_qkv((2, 6, 2, 33, 100, 16, 24), dtype)
    cuts = [slice(0, 40), slice(40, 41), slice(41, 100)]
    parts = [sa.attention(q, k[:, :, c], v[:, :, c], return_lse=True) for c in cuts]
    parts.append((np.zeros_like(parts[0].out), np.full_like(parts[0].lse, -np.inf)))
    got = sa.merge(parts)
    want = ref.merge(parts)
    assert_within_ceiling(got.out, want[0])
    see = np.ones((2, 6, 33, 100), bool)
    whole = ref.attention(q, k, v, see)
    naive = ref.attention(q, k, v, see, compute=dtype)
    assert_no_worse(got.out, whole[0], than=naive[0], factor=4)
    assert_no_worse(got.lse, whole[1], than=naive[1], factor=4)
    empty = sa.merge([parts[-1], parts[-1]])
    assert not empty.out.any() and np.isneginf(empty.lse).all()


def test_merge_refuses_parts_that_do_not_fit() -> None:
    out, lse = np.zeros((1, 2, 3, 4)), np.zeros((1, 2, 3))
    for parts in ([], [(out,)], [(out, lse[..., :2])], [(out, lse), (out[:, :1], lse[:, :1])]):
        with pytest.raises(sa.ArgumentError, match=r"parts|merge"):
            sa.merge(parts)
    with pytest.raises(sa.DtypeError, match="float32"):
        sa.merge([(out, lse), (out.astype(np.float32), lse)])


# ---- PyTorch's signature ------------------------------------------------------------------------


def test_sdpa_is_top_left_and_takes_either_mask() -> None:
    q, k, v = make_qkv((2, 4, 4, 5, 9, 16, 8))
    got = sa.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert got.tobytes() == sa.attention(q, k, v, causal="top_left").tobytes()
    mask = random_masks((2, 4, 4, 5, 9))["mask"]
    got = sa.scaled_dot_product_attention(q, k, v, mask)
    assert got.tobytes() == sa.attention(q, k, v, mask=mask).tobytes()
    floats = np.where(mask, 0, -np.inf).astype(np.float32)
    np.testing.assert_allclose(sa.scaled_dot_product_attention(q, k, v, floats), got, atol=1e-6)
    assert not got[:, :, 2].any()  # nothing to see: zeros
    got = sa.scaled_dot_product_attention(q, k, v, is_causal=True, spec="topk:2")
    assert got.tobytes() == sa.attention(q, k, v, "topk:2", causal="top_left").tobytes()


def test_sdpa_without_heads() -> None:
    q, k, v = make_qkv((3, 1, 1, 5, 9, 16, 8))
    want = sa.attention(q, k, v)
    got = sa.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0])
    assert got.shape == (3, 5, 8) and got.tobytes() == want.tobytes()
    got = sa.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0])
    assert got.shape == (5, 8) and got.tobytes() == want[0].tobytes()


def test_sdpa_wants_gqa_said() -> None:
    q, k, v = make_qkv((2, 6, 2, 5, 9, 16, 8))
    with pytest.raises(sa.ArgumentError, match="enable_gqa=True"):
        sa.scaled_dot_product_attention(q, k, v)
    got = sa.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert got.tobytes() == sa.attention(q, k, v).tobytes()
    one = sa.scaled_dot_product_attention(q, k[:, :1], v[:, :1])  # broadcasts, as in PyTorch
    assert one.tobytes() == sa.attention(q, k[:, :1], v[:, :1]).tobytes()
    wide = sa.scaled_dot_product_attention(q, k, v.repeat(3, 1), enable_gqa=True)
    np.testing.assert_allclose(wide, sa.attention(q, k, v), atol=1e-6)
    with pytest.raises(sa.ArgumentError, match="exclude"):
        sa.scaled_dot_product_attention(q, k, v, np.ones((5, 9), bool), is_causal=True)
