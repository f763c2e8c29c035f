"""Plans of the core: which keys each row sees, against brute force, and what a plan holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import (
    CAUSAL,
    MASKS,
    SIZES,
    Array,
    Sizes,
    blocks_of_64,
    build,
    documents,
    left_padding,
    mask_and_holes,
    mask_names,
    no_masks,
    problem,
    random_mask,
    right_padding,
    size_ids,
    thin,
    visible,
    window,
)
from reference.random import ranks
from reference.topk import select
from reference.window import pattern

from sparseattn import _core


@contextmanager
def under(make: Any, words: str = "") -> Iterator[None]:
    """A failure names the masks that it was met under."""
    try:
        yield
    except Exception as error:
        error.add_note(f"under {make.__name__} {words}")
        raise


def check(plan: _core.Plan, want: Array, see: Array, kv_heads: int) -> None:
    """The plan's mask, its counts, and that the validator takes its arrays."""
    kept = plan.to_mask()
    np.testing.assert_array_equal(kept, want)
    batch, heads = want.shape[:2]
    grouped = want.reshape(batch, kv_heads, heads // kv_heads, *want.shape[2:]).any(2)
    assert plan.count(kv_heads) == (want.sum(), see.sum(), grouped.sum())
    _core.plan_from_arrays(plan.arrays())


PATTERNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal window": {"left": 15, "right": 0},
    "one key": {"left": 0, "right": 0},
    "two sides": {"left": 70, "right": 9},
    "left only": {"left": 3},
    "right only": {"right": 100},
    "sinks": {"left": 31, "right": 0, "sinks": 4},
    "sinks past all keys": {"left": 2, "right": 2, "sinks": 10_000},
    "globals": {"left": 130, "right": 130, "sinks": 2, "globals": (66, 2, 3, 64, 66, 5000)},
    "wider than all": {"left": 100_000, "right": 100_000},
}


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("sizes", SIZES, ids=size_ids)
def test_patterns(name: str, sizes: Sizes, causal: int) -> None:
    for make in MASKS:
        with under(make):
            check_pattern(name, sizes, causal, make)


def check_pattern(name: str, sizes: Sizes, causal: int, make: Any) -> None:
    mask, key_mask = make(sizes)
    fields = PATTERNS[name]
    n_q, n_k = sizes[3:]
    see = want = visible(sizes, causal, mask, key_mask)
    of = problem(causal, mask, key_mask)
    if name == "dense":
        plan = build("dense", sizes, of)
    else:
        plan = window(sizes, of, **fields)
        options = {"left": -1, "right": -1, "sinks": 0, **fields}
        columns = options.pop("globals", ())
        offset = 0 if causal == 2 else n_k - n_q
        want = see & pattern(n_q, n_k, **options, columns=columns, offset=offset)
    check(plan, want, see, sizes[2])


@pytest.mark.parametrize("block", [1, 5, 16, 48, 64, 96, 128, 131, 200, 1009])
@pytest.mark.parametrize("sizes", [SIZES[1], SIZES[3], SIZES[4], SIZES[6]], ids=lambda s: str(s))
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per head"])
def test_block_masks(sizes: Sizes, block: int, per_head: bool) -> None:
    for causal, make in product(CAUSAL, (no_masks, left_padding, random_mask)):
        with under(make, f"causal {causal}"):
            check_block_mask(sizes, block, causal, make, per_head)


def check_block_mask(sizes: Sizes, block: int, causal: int, make: Any, per_head: bool) -> None:
    mask, key_mask = make(sizes)
    _, heads, kv_heads, n_q, n_k = sizes
    shape = (heads if per_head else 1, -(-n_q // block), -(-n_k // block))
    layout = np.random.default_rng(shape).random(shape) < 0.5
    layout[:, : shape[1] // 3, : shape[2] // 2] = True
    plan = build(
        "blockmask", sizes, problem(causal, mask, key_mask), {"layout": layout}, block=block
    )
    live = layout.repeat(block, 1).repeat(block, 2)[:, :n_q, :n_k]
    see = visible(sizes, causal, mask, key_mask)
    check(plan, see & live, see, kv_heads)


@pytest.mark.parametrize("make", MASKS, ids=mask_names)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("k", [1, 7, 1000])
@pytest.mark.parametrize("sizes", [SIZES[1], SIZES[2], SIZES[4], SIZES[5], SIZES[7]], ids=str)
def test_topk_keeps_the_largest(sizes: Sizes, k: int, causal: int, make: Any) -> None:
    """The very set: scores are the core's own, so that near ties cannot fall differently."""
    mask, key_mask = make(sizes)
    of = problem(causal, mask, key_mask)
    q, keys = thin(sizes)
    q, keys = np.round(q), np.round(keys)  # many ties
    plan = _core.plan_build("topk", SimpleNamespace(k=k, placement="pre"), None, q, keys, of)
    see = visible(sizes, causal, mask, key_mask)
    scores = np.zeros(see.shape, np.float32)
    for b, h in np.ndindex(*sizes[:2]):
        scores[b, h] = _core.score_rows(q, keys, problem(), b, h, 0, sizes[3])
    check(plan, select(scores, see, k), see, sizes[2])


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_topk_and_non_finite_scores(dtype: str) -> None:
    """NaN is the largest where it is visible, and nothing where it is not; -inf is no key."""
    keys = np.array([1, np.nan, -np.inf, 5, 3, np.inf, 2], dtype).reshape(1, 1, 7, 1)
    q = np.ones((1, 1, 1, 1), dtype)
    mask = np.ones((1, 1, 1, 7), bool)

    def kept(k: int) -> list[int]:
        fields = SimpleNamespace(k=k, placement="pre")
        plan = _core.plan_build("topk", fields, None, q, keys, problem(0, mask))
        return list(np.flatnonzero(plan.to_mask()))

    assert [kept(k) for k in (1, 2, 3, 99)] == [[1], [1, 5], [1, 3, 5], [0, 1, 3, 4, 5, 6]]
    mask[..., 1] = False
    assert [kept(k) for k in (1, 2)] == [[5], [3, 5]]


@pytest.mark.parametrize("make", MASKS, ids=mask_names)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("k", [1, 8, 1000])
def test_random_keys(k: int, causal: int, make: Any) -> None:
    sizes = (2, 3, 1, 66, 90)
    mask, key_mask = make(sizes)
    plan = build("random", sizes, problem(causal, mask, key_mask), k=k, seed=5)
    see = visible(sizes, causal, mask, key_mask)
    want = see.copy()
    for b, h, i in np.ndindex(*see.shape[:3]):
        keys = np.flatnonzero(see[b, h, i])
        if keys.size > k:
            row = i + sizes[4] - sizes[3] if causal == 1 else i
            want[b, h, i] = False
            want[b, h, i, keys[sorted(ranks(keys.size, k, 5, row, h, b))]] = True
    check(plan, want, see, 1)


def test_random_keys_are_spread_evenly() -> None:
    """Each of 40 keys is drawn by about 3/40 of the rows: 5 sigma around the mean."""
    sizes = (1, 2, 2, 4000, 40)
    plans = [build("random", sizes, k=3, seed=seed).to_mask() for seed in (0, 1)]
    share = plans[0].mean(2)
    assert (np.abs(share - 3 / 40) < 5 * np.sqrt(3 / 40 * 37 / 40 / 4000)).all()
    pairs = [(plans[0][0, 0], plans[0][0, 1]), (plans[0], plans[1])]
    for a, b in pairs:  # heads and seeds draw independently: 3 * 3/40 common keys a row
        common = (a & b).sum(-1).mean()
        assert abs(common - 9 / 40) < 0.05


def test_decoding_draws_what_a_prefill_drew() -> None:
    whole = build("random", (1, 2, 1, 100, 100), problem(1), k=5, seed=3).to_mask()
    last = build("random", (1, 2, 1, 1, 100), problem(1), k=5, seed=3).to_mask()
    np.testing.assert_array_equal(whole[:, :, -1:], last)


# ---- causal alignment ---------------------------------------------------------------------------


def test_bottom_right_alignment_to_the_letter() -> None:
    def table(n_q: int, n_k: int, causal: int) -> list[str]:
        rows = build("dense", (1, 1, 1, n_q, n_k), problem(causal)).to_mask()[0, 0]
        return ["".join(map(str, row)) for row in rows.astype(int)]

    assert table(2, 5, 1) == ["11110", "11111"]
    assert table(5, 2, 1) == ["00", "00", "00", "10", "11"]
    assert table(2, 5, 2) == ["10000", "11000"]
    assert table(5, 2, 2) == ["10", "11", "11", "11", "11"]


# ---- what a plan holds --------------------------------------------------------------------------


def spans(plan: _core.Plan, kind: str) -> list[list[tuple[int, int]]]:
    """(start, length) of each row block's spans of a kind, all maps in a row."""
    a = plan.arrays()
    begin, end = {
        "full": (a["row_ptr"][:-1], a["see_ptr"]),
        "see": (a["see_ptr"], a["band_ptr"]),
        "band": (a["band_ptr"], a["row_ptr"][1:]),
    }[kind]
    length = a["len"] if a["len"] is not None else np.full(a["start"].size, a["span_len"])
    pairs = list(zip(a["start"].tolist(), length.tolist(), strict=True))
    return [pairs[x:y] for x, y in zip(begin, end, strict=True)]


def test_dense_causal_is_full_up_to_the_diagonal() -> None:
    plan = build("dense", (1, 1, 1, 256, 256), problem(1))
    assert spans(plan, "full") == [[], [(0, 64)], [(0, 128)], [(0, 192)]]
    assert spans(plan, "see") == [[(0, 64)], [(64, 64)], [(128, 64)], [(192, 64)]]


def test_window_is_one_band_around_whole_tiles() -> None:
    plan = window((1, 1, 1, 1024, 1024), problem(1), left=255, right=0, sinks=4)
    assert spans(plan, "full")[8] == [(0, 4), (320, 192)]
    assert spans(plan, "band")[8] == [(257, 63), (512, 64)]
    assert spans(plan, "see")[8] == []


def test_a_long_plan_is_small() -> None:
    n = 65_536
    plan = build("dense", (1, 1, 1, n, n), problem(1))
    assert plan.nbytes < 12 * n
    assert plan.count(1)[:2] == (n * (n + 1) // 2,) * 2
    plan = window((1, 1, 1, n, n), problem(1), left=255, right=0)
    assert plan.nbytes < 24 * n


def test_masks_become_intervals_where_they_can() -> None:
    sizes = (2, 6, 2, 200, 200)
    band = np.abs(np.arange(200)[:, None] - np.arange(200)) < 30
    masks = [np.tri(200, dtype=bool), band, documents(sizes)[0][0, 0]]
    for mask in masks:
        plan = build("dense", sizes, problem(0, np.broadcast_to(mask, (2, 6, 200, 200))))
        assert not plan.term_mask and plan.n_maps == 1 and plan.heads_per_map == 6
        np.testing.assert_array_equal(plan.to_mask()[1, 5], mask)


def test_masks_of_whole_blocks_are_full_spans_alone() -> None:
    mask = blocks_of_64((1, 2, 1, 256, 256))[0]
    plan = _core.plan_from_mask(mask)
    assert not plan.term_mask
    assert spans(plan, "full") == [[(0, 64), (128, 64)], [(64, 64), (192, 64)]] * 2
    assert spans(plan, "see") == [[], [], [], []]


def test_empty_blocks_of_a_mask_are_not_listed() -> None:
    mask = np.random.default_rng(0).random((1, 1, 256, 256)) < 0.5
    mask[0, 0, :128, 64:192] = False
    mask[0, 0, 192:] = False
    plan = _core.plan_from_mask(mask)
    assert plan.term_mask
    assert spans(plan, "see") == [[(0, 64), (192, 64)], [(0, 64), (192, 64)], [(0, 256)], []]
    assert spans(plan, "full") == [[], [], [], []]


def test_paddings_that_agree_share_one_map() -> None:
    sizes = (3, 2, 1, 40, 80)
    agree = np.broadcast_to(np.arange(80) < 60, (3, 80))
    assert build("dense", sizes, problem(1, None, agree)).n_maps == 1
    differ = np.arange(80) < np.array([[80], [60], [0]])
    plan = build("dense", sizes, problem(1, None, differ))
    assert plan.n_maps == 3 and not plan.term_mask


# ---- any number of threads ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [no_masks, random_mask, documents], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", _core.variants())
def test_threads_change_nothing(name: str, make: Any, with_threads: Callable[[int], None]) -> None:
    sizes = (2, 4, 2, 300, 310)
    fields = {"left": 40, "right": 0, "sinks": 3, "globals": (7,), "block": 32, "k": 9, "seed": 1}
    fields |= {"n": 70}
    params = {"layout": np.random.default_rng(0).random((4, 10, 10)) < 0.5}
    of = problem(1, *make(sizes))
    arrays = []
    for count in (1, 3):
        with_threads(count)
        options = SimpleNamespace(**fields, placement="pre")
        q, k = thin(sizes)
        arrays.append(_core.plan_build(name, options, params, q, k, of).arrays())
    for key, value in arrays[0].items():
        np.testing.assert_array_equal(value, arrays[1][key])


# ---- combinations -------------------------------------------------------------------------------


def some_plans(sizes: Sizes, mask: Array, key_mask: Array) -> dict[str, _core.Plan]:
    of = problem(1, mask, key_mask)
    blocks = (sizes[1], -(-sizes[3] // 48), -(-sizes[4] // 48))
    layout = np.random.default_rng(1).random(blocks) < 0.4
    return {
        "dense": build("dense", sizes, of),
        "window": window(sizes, of, left=20, right=0, sinks=3),
        "blocks": build("blockmask", sizes, of, {"layout": layout}, block=48),
        "topk": build("topk", sizes, of, k=6, placement="pre"),
        "random": build("random", sizes, of, k=6, seed=2),
    }


@pytest.mark.parametrize("make", [right_padding, documents, random_mask, mask_and_holes])
def test_combinations(make: Any) -> None:
    sizes = (2, 4, 2, 70, 130)
    mask, key_mask = make(sizes)
    see = visible(sizes, 1, mask, key_mask)
    plans = some_plans(sizes, mask, key_mask)
    for a in plans.values():
        for b in plans.values():
            for op, join in (("union", np.logical_or), ("intersection", np.logical_and)):
                plan = _core.plan_combine(a, b, op)  # type: ignore[arg-type]
                want = join(a.to_mask(), b.to_mask())
                np.testing.assert_array_equal(plan.to_mask(), want)
                assert plan.rows_per_block == 1 and not plan.term_mask
                arrays = plan.arrays()
                again = _core.plan_from_arrays(arrays)
                np.testing.assert_array_equal(again.to_mask(), want)
                assert not (want & ~see).any()


def test_combining_shares_the_maps_that_both_share() -> None:
    sizes = (1, 6, 2, 50, 50)
    a = window(sizes, problem(1), left=5, right=0)
    b = window(sizes, problem(1), sinks=2, left=0, right=0)
    assert _core.plan_combine(a, b, "union").n_maps == 1
    c = build("topk", sizes, problem(1), k=2, placement="pre")
    assert _core.plan_combine(a, c, "intersection").n_maps == 6
    with pytest.raises(_core.ArgumentError, match=r"the plan is for .*\(1, 6, 50, 50\)"):
        _core.plan_combine(a, window((1, 6, 2, 50, 51), problem(1)), "union")


# ---- random problems ----------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[Sizes, int, Array | None, Array | None]:
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n_q, n_k = draw(st.integers(0, 150)), draw(st.integers(0, 150))
    sizes = (draw(st.integers(1, 2)), kv_heads * group, kv_heads, n_q, n_k)
    make = draw(st.sampled_from(MASKS))
    return sizes, draw(st.sampled_from([0, 1, 2])), *make(sizes)


@settings(max_examples=150, deadline=None)
@given(problems(), st.data())
def test_random_windows(case: Any, data: st.DataObject) -> None:
    sizes, causal, mask, key_mask = case
    n_q, n_k = sizes[3:]
    side, keys = st.integers(-1, 160), st.lists(st.integers(0, 160), max_size=5).map(tuple)
    left, right, columns = data.draw(side), data.draw(side), data.draw(keys)
    sinks = data.draw(st.integers(0, 70))
    fields = {"left": left, "right": right, "sinks": sinks, "globals": columns}
    plan = window(sizes, problem(causal, mask, key_mask), **fields)
    see = visible(sizes, causal, mask, key_mask)
    offset = 0 if causal == 2 else n_k - n_q
    check(plan, see & pattern(n_q, n_k, left, right, sinks, columns, offset), see, sizes[2])
