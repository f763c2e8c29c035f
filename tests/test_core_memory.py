"""Memory of the core: given back, in success and in failure; never read before it is written."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from core_calls import entries

from sparseattn import _core


@pytest.fixture
def no_failures() -> Iterator[None]:
    yield
    _core.fail_set(0)


@pytest.mark.parametrize("entry", entries())
def test_memory_comes_back(entry: str) -> None:
    call = entries()[entry]
    call()
    gc.collect()
    _core.trim()
    live = _core.live_bytes()
    for _ in range(20):
        call()
    _core.trim()
    assert _core.live_bytes() == live


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("entry", entries())
@pytest.mark.usefixtures("no_failures")
def test_each_allocation_may_fail(entry: str, threads: int) -> None:
    """The n-th allocation fails, for every n: MemoryError, nothing lost, the next call works."""
    call = entries()[entry]
    before = _core.num_threads()
    _core.set_num_threads(threads)
    try:
        call()
        gc.collect()
        _core.trim()
        live, failures = _core.live_bytes(), 0
        for nth in range(1, 2000):
            _core.fail_set(nth)
            try:
                call()
                _core.fail_set(0)
                break
            except MemoryError as error:
                assert isinstance(error, _core.OutOfMemory) and str(error)
                failures += 1
            finally:
                _core.fail_set(0)
                _core.trim()
            assert _core.live_bytes() == live, f"allocation {nth}"
        else:
            pytest.fail("2000 allocations in one call")
        assert failures >= 1
        call()
    finally:
        _core.set_num_threads(before)


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
