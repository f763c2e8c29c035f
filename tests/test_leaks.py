"""Nothing grows with the number of calls, in success and on each way to an error: bytes of the
core, blocks of the interpreter, references to what is shared, and (nightly) the resident set."""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import settle
from public_calls import calls, model_calls, refused_calls

import sparseattn as sa
from sparseattn import _core

pytestmark = [pytest.mark.promise("B6"), pytest.mark.usefixtures("few_objects")]

SHARED: tuple[Any, ...] = (
    None,
    True,
    False,
    (),
    np.ndarray,
    np.dtype(np.float32),
    np.dtype(np.int64),
    _core.Plan,
    _core.ArgumentError,
    _core.DtypeError,
    sa.Plan,
    sa.TopK,
)


def refused(call: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        try:
            call()
        except sa.SparseAttnError:
            return
        raise AssertionError("this call should have been refused")

    return run


def every_call() -> dict[str, Callable[[], Any]]:
    errors = {f"refused: {name}": refused(call) for name, call in refused_calls().items()}
    return calls() | model_calls() | errors


def held() -> tuple[int, int, list[int]]:
    """Bytes of the core, blocks (of a debug build: references) of Python, references to SHARED."""
    live = settle()
    total = getattr(sys, "gettotalrefcount", sys.getallocatedblocks)
    return live, total(), [sys.getrefcount(x) for x in SHARED]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def repeat(call: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        call()


@pytest.mark.parametrize("name", every_call())
def test_calls_leave_nothing_behind(name: str) -> None:
    """A leak of one object a call is 20 in every round of 20 calls; what Python keeps for reuse
    settles, in up to 40 rounds."""
    call = every_call()[name]
    changes = []
    repeat(call, 10)
    for _ in range(100):
        before = held()
        repeat(call, 20)
        after = held()
        assert after[0] == before[0], "bytes of the core"
        changes.append(
            max(
                after[1] - before[1],
                *(b - a for a, b in zip(before[2], after[2], strict=True)),
            )
        )
        if changes[-1] < 10:
            break
    assert changes[-1] < 10, changes


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
@pytest.mark.parametrize("name", every_call())
def test_the_resident_set_does_not_grow(name: str, clean_memory: None) -> None:
    """Less than 1 KB a call over 20,000 calls; the figures are printed."""
    call, count = every_call()[name], int(os.environ.get("SPARSEATTN_LEAK_CALLS", "20000"))
    repeat(call, 200)
    gc.collect()
    before, blocks = resident(), held()
    repeat(call, count)
    gc.collect()
    grown, after = resident() - before, held()
    references = max(b - a for a, b in zip(blocks[2], after[2], strict=True))
    print(f"{name}: {grown / count:.2f} bytes a call, {after[1] - blocks[1]} blocks", end=" ")
    print(f"and {references} references after {count} calls")
    assert grown < 1000 * count
    assert after[0] == blocks[0]
    assert after[1] - blocks[1] <= count / 100
    assert references <= count / 100
