"""Plans and sizes from outside: what a lying plan or problem is told."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from plan_cases import build, problem, thin

from sparseattn import _core

# ---- plans from outside -------------------------------------------------------------------------


def small_plan() -> dict[str, Any]:
    """Rows 0-63 and 64-99 of 100 keys: full, see and band spans in the second block."""
    lo, hi = np.zeros(100, np.int32), np.arange(1, 101, dtype=np.int32)
    return {
        "n_q": 100, "n_k": 100, "n_blocks": 2, "n_maps": 1, "batch": 1, "heads": 2,
        "rows_per_block": 64, "heads_per_map": 2, "per_batch": False, "term_mask": False,
        "row_start": np.array([0, 64], np.int32),
        "row_ptr": np.array([0, 1, 4]), "see_ptr": np.array([0, 2]), "band_ptr": np.array([1, 3]),
        "n_spans": 4, "span_len": 0,
        "start": np.array([0, 10, 0, 60], np.int32), "len": np.array([60, 20, 5, 40], np.int32),
        "see_maps": 1, "see_lo": lo, "see_hi": hi,
        "band_maps": 1, "band_lo": np.maximum(hi - 8, 0).astype(np.int32), "band_hi": hi.copy(),
    }  # fmt: skip


def test_a_plan_by_hand() -> None:
    i, j = np.arange(100)[:, None], np.arange(100)
    first = (j < 60) & (j <= i)
    second = (j >= 10) & (j < 30) | (j < 5) | (j >= 60) & (j <= i) & (j > i - 8)
    mask = _core.plan_from_arrays(small_plan()).to_mask()
    np.testing.assert_array_equal(mask, np.where(i < 64, first, second)[None, None].repeat(2, 1))


def put(name: str, at: Any, value: int) -> Callable[[dict[str, Any]], None]:
    def harm(plan: dict[str, Any]) -> None:
        plan[name][at] = value

    return harm


LIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "full span into the future": (put("len", 1, 60), "may not see"),
    "full span of padding": (put("see_lo", slice(64, None), 12), "may not see"),
    "full span where a row is empty": (put("see_hi", 70, 0), "may not see"),
    "a key twice, full and see": (put("start", 2, 9), "two spans"),
    "a key twice, full and band": (put("start", 3, 29), "two spans"),
    "past the last key": (put("len", 3, 41), "outside the keys"),
    "length that wraps": (put("len", 3, 2**31 - 1), "outside the keys"),
    "empty span": (put("len", 0, 0), "empty"),
    "negative length": (put("len", 0, -5), "empty"),
    "negative key": (put("start", 0, -1), "outside the keys"),
    "interval backwards": (put("see_lo", 3, 50), "see_lo"),
    "interval past the keys": (put("see_hi", 3, 101), "see_lo"),
    "band backwards": (put("band_lo", 3, 50), "band_lo"),
    "pointer past the spans": (put("row_ptr", 2, 5), "row_ptr"),
    "pointers that cross": (put("see_ptr", 1, 4), "decrease"),
    "a row block that is too long": (put("row_start", 1, 32), "row_start"),
    "a row block of no rows": (put("row_start", 1, 0), "row_start"),
    "rows out of order": (put("row_start", 1, -1), "row_start"),
    "rows before the first block": (put("row_start", 0, 1), "row_start"),
    "bands that are not there": (lambda p: p.update(band_lo=None, band_hi=None), "band spans"),
    "half a band": (lambda p: p.update(band_hi=None), "band_maps"),
    "heads that do not divide": (lambda p: p.update(heads=3), "heads_per_map"),
    "blocks that do not cover": (lambda p: p.update(rows_per_block=32), "n_blocks"),
    "more blocks than rows": (
        lambda p: p.update(
            n_blocks=101,
            row_start=np.arange(101, dtype=np.int32),
            row_ptr=np.array([0, *[4] * 101]),
            see_ptr=np.array([0, *[4] * 100]),
            band_ptr=np.array([0, *[4] * 100]),
        ),
        "n_blocks",
    ),
    "no span length": (lambda p: p.update(len=None), "span_len"),
    "see_maps of no meaning": (
        lambda p: p.update(batch=2, see_maps=0, see_lo=p["see_lo"][:0], see_hi=p["see_hi"][:0]),
        "see_maps",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_plans_are_refused(lie: str) -> None:
    arrays = small_plan()
    harm, words = LIES[lie]
    harm(arrays)
    with pytest.raises(_core.ArgumentError, match=words):
        _core.plan_from_arrays(arrays)


def test_spans_out_of_order_are_refused() -> None:
    arrays = small_plan()
    arrays["row_ptr"], arrays["n_spans"] = np.array([0, 1, 5]), 5
    arrays["band_ptr"] = np.array([1, 4])
    arrays["start"] = np.array([0, 10, 40, 5, 60], np.int32)
    arrays["len"] = np.array([60, 20, 5, 2, 40], np.int32)
    with pytest.raises(_core.ArgumentError, match="ascending"):
        _core.plan_from_arrays(arrays)


def test_a_shared_map_must_suit_every_batch() -> None:
    """One map for two batch entries, the second of which may see less."""
    arrays = small_plan()
    arrays.update(batch=2, see_maps=2)
    arrays["see_lo"], arrays["see_hi"] = np.zeros((2, 200), np.int32)
    arrays["see_hi"][:100] = np.arange(1, 101)
    with pytest.raises(_core.ArgumentError, match="may not see"):
        _core.plan_from_arrays(arrays)
    arrays["see_hi"][100:] = np.arange(1, 101)
    _core.plan_from_arrays(arrays)


# ---- words --------------------------------------------------------------------------------------


def test_layouts_of_another_shape_are_refused() -> None:
    sizes = (1, 4, 2, 100, 130)
    for shape in [(3, 2, 3), (1, 2, 2), (4, 3, 3), (2, 4)]:
        with pytest.raises(_core.ArgumentError, match=r"layout must have shape \(4 or 1, 2, 3\)"):
            build("blockmask", sizes, None, {"layout": np.ones(shape, bool)}, block=64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": (1, 3, 9, 4)}, "does not divide the 4 heads"),
        ({"k": (1, 2, 9, 5)}, "axis 3 must be 4, the width of q"),
        ({"k": (2, 2, 9, 4)}, "axis 0 must be 1, the batch size of q"),
        ({"q": (1, 0, 7, 4)}, r"number of heads of q must be in \[1,"),
        ({"q": (1, 4, 7, 0), "k": (1, 2, 9, 0)}, r"width of q must be in \[1, 4096\], got 0"),
        ({"q": (1, 4, 7, 5000), "k": (1, 2, 9, 5000)}, "width of q .* got 5000"),
        ({"mask": (1, 4, 7, 8)}, "mask has shape .* axis 3 must be 9, the length of k"),
        ({"mask": (1, 4, 9, 9)}, "mask has shape .* axis 2 must be 7, the length of q"),
        ({"key_mask": (2, 9)}, "key_mask has shape .* axis 0 must be 1"),
    ],
)
def test_shapes_that_disagree(change: dict[str, Any], words: str) -> None:
    q = np.zeros(change.get("q", (1, 4, 7, 4)), np.float32)
    k = np.zeros(change.get("k", (1, 2, 9, 4)), np.float32)
    masks = {name: np.ones(change[name], bool) for name in ("mask", "key_mask") if name in change}
    with pytest.raises(_core.ArgumentError, match=words):
        _core.plan_build("dense", SimpleNamespace(), None, q, k, problem(0, **masks))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0, np.inf, 0.0), "scale must be finite"),
        ((0, 1.0, -1.0), "softcap must be finite and positive"),
        ((0, 1.0, np.nan), "softcap"),
    ],
)
def test_options_out_of_range(values: tuple[int, float, float], words: str) -> None:
    q, k = thin((1, 1, 1, 3, 3))
    with pytest.raises(_core.ArgumentError, match=words):
        _core.plan_build("dense", SimpleNamespace(), None, q, k, (*values, None, None, None))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("dense", (1, 1, 2**31, 4)),
        ("dense", (2**40, 1, 1, 1)),
        ("dense", (1, 2**40, 1, 1)),
        ("dense", (2**30, 2**20, 2**10, 1)),
        ("topk", (2**31, 2**20, 8, 1)),
    ],
)
def test_sizes_that_no_memory_holds(name: str, shape: tuple[int, ...]) -> None:
    q = np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), shape, (0, 0, 0, 4))
    live = _core.live_bytes()
    with pytest.raises((_core.ArgumentError, _core.OutOfMemory)):
        _core.plan_build(name, SimpleNamespace(k=1, placement="pre"), None, q, q, problem(1))
    assert _core.live_bytes() == live
