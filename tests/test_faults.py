"""Every allocation fails once: of the core, of NumPy's data, of Python itself."""

from __future__ import annotations

import json
import linecache
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, requires
from core_calls import entries
from faults import NumpyMemory, core_fails, fail_each, sites
from public_calls import calls, digest, model_calls, threads

import sparseattn as sa
from sparseattn import _core

pytestmark = [pytest.mark.promise("B5"), pytest.mark.usefixtures("few_objects")]


@pytest.fixture(autouse=True)
def no_failures() -> Iterator[None]:
    yield
    _core.fail_set(0)


@pytest.mark.parametrize("entry", calls())
def test_each_allocation_may_fail(entry: str) -> None:
    """Forward, backward, plans, decoding, merging, weights, sampling, through the public door."""
    call = calls()[entry]
    want = digest(call())
    with threads(3):
        assert fail_each(call) >= (entry != "sampling")  # which keeps its scratch
    assert digest(call()) == want


@pytest.mark.parametrize("entry", model_calls())
def test_each_allocation_of_a_model_may_fail(entry: str) -> None:
    call = model_calls()[entry]
    want = digest(call())
    assert fail_each(call) > 10
    assert digest(call()) == want


def rare_calls() -> dict[str, Any]:
    """Calls that reach the sites which no everyday call does."""
    long, short = (np.ones((1, 1, n, 16), np.float32) for n in (9000, 130))
    return {
        "bench": lambda: _core.bench_select(long[0, 0], 3, 0),
        "mass of many rows": lambda: sa.attention(long, short, short, return_weights="mass"),
    }


def test_every_site_has_failed() -> None:
    """100 % of the places that allocate, counted in the sources, each by its file and line: the
    rare ones, and as many of the others as no test before has been to."""
    for call in (*rare_calls().values(), *entries().values(), *calls().values()):
        if missed_sites():
            fail_each(call)
    assert sum(map(len, sites(ROOT).values())) > 30
    assert not missed_sites()


def missed_sites() -> list[str]:
    failed: dict[str, set[int]] = {}
    for site in _core.failed_sites():
        path, line = site.rsplit(":", 1)
        failed.setdefault(path[path.index("csrc/") :], set()).add(int(line))
    return [
        f"{path}:{first}"
        for path, places in sites(ROOT).items()
        for first, last in places
        if not failed.get(path, set()) & set(range(first, last + 1))
    ]


def test_outputs_are_untouched_without_memory() -> None:
    """SA_ENOMEM comes before any output is written."""
    q = np.ones((1, 2, 70, 16), np.float32)
    out = np.full_like(q, 7)
    failures = 0
    for nth in range(1, 100):
        _core.trim()
        try:
            with core_fails(nth):
                sa.attention(q, q, q, "topk:5", out=out)
        except MemoryError:
            failures += 1
            assert (out == 7).all(), nth
        else:
            break
    assert failures > 5 and (out != 7).any()


@pytest.mark.parametrize("entry", [*calls(), *model_calls()])
def test_each_array_of_numpy_may_fail(entry: str) -> None:
    """The n-th array has no memory: MemoryError, nothing of the core stays, the next call works."""
    call = (calls() | model_calls())[entry]
    want = digest(call())
    _core.trim()
    memory, live, failures = NumpyMemory(), _core.live_bytes(), 0
    for nth in range(1, 1000):
        try:
            with memory.fails(nth):
                result = call()
        except MemoryError:
            failures += 1
        else:
            break
        _core.trim()
        assert _core.live_bytes() == live, f"array {nth}"
    assert digest(result) == want
    assert failures > 0 or entry == "counts"


# ---- Python's own allocations --------------------------------------------------------------------

# What goes wrong inside CPython or NumPy without a line of the core: the innermost line of Python
# that runs calls no function of _core. Seen with CPython 3.11 and NumPy 2.4:
SUPPRESSED = {
    "crash": "NumPy: ufuncs of two arrays use a descriptor that was never made",
    "SystemError": "NumPy: ufuncs, nditer and where return NULL and set no exception",
    "RuntimeError": 'CPython: threading.Lock without memory says "can\'t allocate lock"',
    "bytes": "CPython: a subclass of tuple loses its items where itself cannot be made, and "
    "f(*arguments) loses the arguments where their list cannot grow",
}
OURS = r"_core\.\w+\((?!\*)|\?"


def run_without(entry: str, first: int, last: int) -> subprocess.CompletedProcess[str]:
    here = [str(Path(__file__).parent), str(Path(sa.__path__[0]).parent)]
    words = ["-X", "faulthandler", "-m", "nomemory_child", entry, str(first), str(last)]
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(here)},
        timeout=600,
    )


def crashed_in(report: str) -> str:
    """The innermost line of Python, from what faulthandler wrote."""
    at = re.search(r'File "([^"]+)", line (\d+)', report)
    return linecache.getline(at[1], int(at[2])).strip() if at else "?"


def failing(entry: str, last: int) -> tuple[int, list[str]]:
    """MemoryErrors met, and what went wrong, for n = 1 .. last; a crash costs one n."""
    first, met, wrong = 1, 0, []
    while first <= last:
        done = run_without(entry, first, last)
        events = [json.loads(line) for line in done.stdout.splitlines()]
        at = max((event["n"] for event in events), default=0)
        met += sum(event["kind"] == "MemoryError" for event in events)
        if done.returncode != 0:
            assert at >= first, done.stderr
            events.append({"n": at, "kind": "crash", "line": crashed_in(done.stderr)})
        wrong += [
            str(event)
            for event in events
            if event["kind"] not in ("begin", "MemoryError")
            and (event["kind"] not in SUPPRESSED or re.search(OURS, event["line"]))
        ]
        first = at + 1 if done.returncode else last + 1
    return met, wrong


@pytest.mark.parametrize(
    ("entry", "last"),
    [("topk", 60), *(pytest.param(e, 300, marks=pytest.mark.nightly) for e in calls())],
)
def test_python_itself_may_fail(entry: str, last: int) -> None:
    """The n-th allocation of the interpreter fails, in a child process: MemoryError, or success
    where it has a way around."""
    requires("_testcapi")
    met, wrong = failing(entry, last)
    assert not wrong, "\n".join(wrong)
    assert met > 0
