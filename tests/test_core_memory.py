"""Memory of the core: given back, in success and in failure; never read before it is written."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from core_calls import entries
from faults import fail_each
from public_calls import threads

from sparseattn import _core

pytestmark = pytest.mark.usefixtures("few_objects")


@pytest.fixture
def no_failures() -> Iterator[None]:
    yield
    _core.fail_set(0)


@pytest.mark.promise("B6")
@pytest.mark.parametrize("entry", entries())
def test_memory_comes_back(entry: str) -> None:
    call = entries()[entry]
    call()
    gc.collect()
    _core.trim()
    live = _core.live_bytes()
    for _ in range(8):
        call()
    _core.trim()
    assert _core.live_bytes() == live


@pytest.mark.promise("B5")
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.nightly), 3])
@pytest.mark.parametrize("entry", entries())
@pytest.mark.usefixtures("no_failures")
def test_each_allocation_may_fail(entry: str, count: int) -> None:
    """The n-th allocation fails, for every n: MemoryError, nothing lost, the next call works."""
    with threads(count):
        assert fail_each(entries()[entry]) >= 1


def test_poison_changes_no_bit() -> None:
    calls = entries()
    for entry in calls:
        results = []
        for on in (False, True):
            _core.trim()
            _core.poison(on)
            result = calls[entry]()
            if isinstance(result, _core.Plan):
                result = [a for a in result.arrays().values() if isinstance(a, np.ndarray)]
            results.append([np.asarray(a).tobytes() for a in result] if result is not None else [])
        assert results[0] == results[1], entry
    _core.poison(True)  # as the session has it
