"""The Plan object of the core: sizes, arrays out and in, the masks it carries, combinations."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from core_calls import NK, NQ, Array, B, G, H, attend, build, make, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseattn import _core


def test_plan_attributes() -> None:
    q, k, _ = make()
    plan = build("topk", q, k)
    assert (plan.n_q, plan.n_k, plan.batch, plan.heads) == (NQ, NK, B, H)
    assert (plan.rows_per_block, plan.n_blocks, plan.heads_per_map) == (1, NQ, 1)
    assert plan.n_maps == B * H and plan.nbytes > 0 and not plan.term_mask
    mask = plan.to_mask()
    assert mask.shape == (B, H, NQ, NK) and mask.dtype == bool
    kept, visible, union = plan.count(G)
    assert kept == mask.sum()
    assert visible == B * H * sum(min(NK, i + 1 + NK - NQ) for i in range(NQ))
    assert union == (mask[:, 0::2] | mask[:, 1::2]).sum()
    for bad in (0, 3, H + 1, "2"):
        with pytest.raises(_core.SparseAttnError, match="kv_heads"):
            plan.count(bad)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        plan.n_q = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        type(plan)()
    with pytest.raises(TypeError):
        type("Sub", (type(plan),), {})


@pytest.mark.parametrize("name", _core.variants())
def test_arrays_go_round(name: str) -> None:
    q, k, _ = make()
    plan = build(name, q, k)
    arrays = plan.arrays()
    again = _core.plan_from_arrays(arrays)
    assert np.array_equal(again.to_mask(), plan.to_mask())
    before = again.to_mask()
    for value in arrays.values():
        if isinstance(value, np.ndarray):
            value[...] = -7  # the plan has copies of its own
    assert np.array_equal(again.to_mask(), before)


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(arrays: dict[str, Any]) -> None:
        arrays[name] = change(arrays[name])

    return apply


def raised(at: int, value: int) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        array[at] = value
        return array

    return change


HOSTILE = [
    edit("n_q", lambda n: n + 1),
    edit("n_k", lambda n: n - 40),
    edit("n_q", lambda n: 2**62),
    edit("n_blocks", lambda n: 2**61),
    edit("n_maps", lambda n: -1),
    edit("n_maps", lambda n: 2**40),
    edit("batch", lambda n: 0),
    edit("heads", lambda n: 3 * n),
    edit("heads_per_map", lambda n: 0),
    edit("rows_per_block", lambda n: 0),
    edit("rows_per_block", lambda n: 2**31),
    edit("see_maps", lambda n: 5),
    edit("n_spans", lambda n: n - 1),
    edit("n_spans", lambda n: "many"),
    edit("start", lambda a: a[:-1]),
    edit("start", lambda a: a.astype("i8")),
    edit("start", lambda a: a[::-1]),
    edit("start", raised(0, -1)),
    edit("start", raised(-1, NK)),
    edit("start", raised(1, 0)),
    edit("row_ptr", raised(1, 2**40)),
    edit("row_ptr", raised(0, 1)),
    edit("see_ptr", raised(0, -5)),
    edit("band_ptr", raised(-1, 2**40)),
    edit("row_start", raised(0, 64)),
    edit("see_hi", raised(0, NK + 1)),
    edit("see_hi", raised(0, 0)),
    edit("see_lo", raised(0, -1)),
    edit("see_lo", lambda a: None),
    edit("row_ptr", lambda a: list(a)),
    lambda arrays: arrays.pop("row_ptr"),
]


@pytest.mark.parametrize("harm", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_arrays_are_refused(harm: Callable[[dict[str, Any]], None]) -> None:
    q, k, _ = make()
    arrays = build("topk", q, k).arrays()
    harm(arrays)
    live = _core.live_bytes()
    with pytest.raises((_core.ArgumentError, _core.DtypeError)):
        _core.plan_from_arrays(arrays)
    assert _core.live_bytes() == live


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_harm_never_gets_past_validation(data: st.DataObject) -> None:
    """Whatever numbers a plan from outside holds: refused, or safe to run."""
    q, k, v = make()
    arrays = build(data.draw(st.sampled_from(_core.variants())), q, k).arrays()
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(arrays)))
        if isinstance(arrays[name], np.ndarray) and arrays[name].size:
            at = data.draw(st.integers(0, arrays[name].size - 1))
            arrays[name][at] = data.draw(st.sampled_from([-(2**31), -1, 0, 1, 64, NK, 2**31 - 1]))
        elif isinstance(arrays[name], int):
            arrays[name] = data.draw(st.sampled_from([-1, 0, 1, 2, 64, 2**31 - 1, 2**62]))
    try:
        plan = _core.plan_from_arrays(arrays)
        plan.count(plan.heads)
        attend(q, k, v, plan, problem(0))
    except (_core.ArgumentError, _core.DtypeError):
        pass


def test_a_plan_carries_its_masks() -> None:
    q, k, v = make()
    rng = np.random.default_rng(2)
    mask, key_mask = rng.random((B, H, NQ, NK)) < 0.5, rng.random((B, NK)) < 0.8
    of = problem(1, mask, None, key_mask)
    plan = build("dense", q, k, of)
    want = attend(q, k, v, plan, of)
    other = problem(1, mask.copy(), None, key_mask)
    with pytest.raises(_core.ArgumentError, match="mask is not the one that the plan was built"):
        attend(q, k, v, plan, other)
    del mask, key_mask, of, other
    gc.collect()
    got = attend(q, k, v, plan, problem(0))
    assert got[0].tobytes() == want[0].tobytes()
    with pytest.raises(_core.ArgumentError, match="causal is not the one"):
        attend(q, k, v, plan, problem(2))
    with pytest.raises(_core.ArgumentError, match="key_mask is not the one"):
        attend(q, k, v, build("dense", q, k), problem(key_mask=np.ones((B, NK), bool)))


def test_a_plan_of_arrays_needs_its_mask() -> None:
    q, k, v = make()
    mask = np.random.default_rng(3).random((B, H, NQ, NK)) < 0.5
    plan = _core.plan_from_mask(mask)
    assert plan.term_mask and np.array_equal(plan.to_mask(), mask)
    bare = _core.plan_from_arrays(plan.arrays())
    with pytest.raises(_core.ArgumentError, match="mask that it does not carry"):
        bare.to_mask()
    with pytest.raises(_core.ArgumentError, match="mask that it does not carry"):
        attend(q, k, v, bare, problem(0))
    got = attend(q, k, v, bare, problem(0, mask))
    assert got[0].tobytes() == attend(q, k, v, plan, problem(0))[0].tobytes()
    with pytest.raises(_core.ArgumentError, match="mask has shape"):
        attend(q, k, v, bare, problem(0, mask[..., 1:]))


def test_combinations() -> None:
    q, k, _ = make()
    a, b = build("topk", q, k), build("random", q, k)
    masks = a.to_mask(), b.to_mask()
    assert np.array_equal(_core.plan_combine(a, b, "union").to_mask(), masks[0] | masks[1])
    assert np.array_equal(_core.plan_combine(a, b, "intersection").to_mask(), masks[0] & masks[1])
    with pytest.raises(
        _core.ArgumentError, match="op must be 'union' or 'intersection', got 'xor'"
    ):
        _core.plan_combine(a, b, "xor")  # type: ignore[arg-type]
    with pytest.raises(_core.DtypeError, match="b must be a Plan, got str"):
        _core.plan_combine(a, "b", "union")  # type: ignore[arg-type]
    with pytest.raises(_core.ArgumentError, match="make one for these sizes"):
        _core.plan_combine(a, build("topk", q[:, :, 1:], k), "union")
    mine, yours = (np.random.default_rng(s).random((B, H, NQ, NK)) < 0.5 for s in (4, 5))
    plans = [_core.plan_from_mask(m) for m in (mine, yours)]
    with pytest.raises(_core.ArgumentError, match="different arrays as mask"):
        _core.plan_combine(plans[0], plans[1], "union")
    both = _core.plan_combine(plans[0], a, "intersection")
    assert np.array_equal(both.to_mask(), mine & masks[0])
    either = _core.plan_combine(plans[0], a, "union")
    assert np.array_equal(either.to_mask(), mine | masks[0])


def test_merge_is_checked() -> None:
    out, lse = np.ones((1, 1, 3, 4), "f4"), np.zeros((1, 1, 3), "f4")
    merged = np.empty_like(out)
    for outs, lses in [((), ()), ((out,), ()), ([out], [lse]), ((out, out[:, :, 1:]), (lse, lse))]:
        with pytest.raises(_core.ArgumentError):
            _core.merge(outs, lses, merged, None)  # type: ignore[arg-type]
    with pytest.raises(_core.ArgumentError, match="out shares memory with outs"):
        _core.merge((out, out), (lse, lse), out, None)
    _core.merge((out, 3 * out), (lse, lse), merged, None)
    assert np.allclose(merged, 2)
