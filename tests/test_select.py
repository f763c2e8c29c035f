"""Selection of the largest scores of a row: the very set, whatever the values are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.select import largest

from sparseattn import _core

Array = np.ndarray
LENGTHS = [0, 1, 2, 31, 32, 33, 63, 65, 257, 2047, 2048, 2049, 5000, 20_000]
COUNTS = [0, 1, 2, 63, 64, 300, 600, 5001, 10**6]


def special(rng: np.random.Generator, n: int) -> Array:
    return rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38], n)


KINDS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy tails": lambda rng, n: np.exp(8 * rng.standard_normal(n)),
    "all equal": lambda rng, n: np.full(n, 1.5),
    "ascending": lambda rng, n: np.arange(n, dtype=float),
    "descending": lambda rng, n: -np.arange(n, dtype=float),
    "two values": lambda rng, n: rng.integers(0, 2, n).astype(float),
    "few values": lambda rng, n: rng.integers(-2, 3, n) / 4,
    "signed zeros": lambda rng, n: rng.choice([0.0, -0.0], n),
    "subnormal": lambda rng, n: rng.standard_normal(n) * 1e-43,
    "huge": lambda rng, n: np.clip(rng.standard_normal(n), -3, 3) * 1e38,
    "mostly unseen": lambda rng, n: np.where(rng.random(n) < 0.02, rng.random(n), -np.inf),
    "nothing seen": lambda rng, n: np.full(n, -np.inf),
    "some NaN": lambda rng, n: np.where(rng.random(n) < 0.2, np.nan, rng.standard_normal(n)),
    "all NaN": lambda rng, n: np.full(n, np.nan),
    "infinities": lambda rng, n: rng.choice([np.inf, -np.inf, 1.0], n),
    "special": special,
    # a sample taken at even steps would meet the peaks alone, or none of them
    "period 128": lambda rng, n: rng.standard_normal(n) + 100 * (np.arange(n) % 128 == 0),
    "one block": lambda rng, n: rng.standard_normal(n) + 100 * (np.arange(n) // 300 == 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.usefixtures("isa")
def test_the_largest_are_selected(kind: str, dtype: str) -> None:
    rng = np.random.default_rng(7)
    for n in LENGTHS:
        s = KINDS[kind](rng, n).astype(dtype)
        for count in COUNTS:
            got = _core.select_largest(s, count)
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, largest(s, count), f"{n} scores, {count} wanted")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_short_rows_of_any_bits(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["f4", "f8"]))
    bits = data.draw(st.binary(max_size=8 * 200))
    s = np.frombuffer(bits[: len(bits) // 8 * 8], dtype)
    count = data.draw(st.integers(0, s.size + 1))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(_core.select_largest(s, count), largest(s, count))


def test_ties_go_to_the_lower_index() -> None:
    s = np.tile(np.array([1, 3, 2, 3], np.float32), 1000)
    assert _core.select_largest(s, 3).tolist() == [1, 3, 5]
    every_3 = set(range(1, 4000, 2))
    assert set(_core.select_largest(s, 2003).tolist()) == every_3 | {2, 6, 10}


@pytest.mark.parametrize("count", [1, 64, 4096])
def test_every_isa_selects_alike(count: int, isa: str) -> None:
    s = np.random.default_rng(0).standard_normal(30_000).astype(np.float32)
    kept = _core.select_largest(s, count)
    _core.set_isa("baseline")  # the fixture puts the machine's own back
    assert np.array_equal(kept, _core.select_largest(s, count))
