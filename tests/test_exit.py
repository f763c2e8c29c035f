"""Processes end and begin as they should: in any order of imports, while kernels run, many times;
NumPy's own threads are left alone."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sparseattn as sa

pytestmark = pytest.mark.promise("C6")

LIMIT = 20  # seconds; a hang, not a slow machine
WORK = """
x = __import__("numpy").ones((1, 2, 300, 16), "f4")
assert (sa.attention(x, x, x, "topk:5", causal=True) == 1).all()
"""


def run(code: str, limit: float = LIMIT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(sa.__path__[0]).parent)},
        timeout=limit,
    )


def orders() -> list[tuple[str, ...]]:
    """All orders of numpy, scipy and sparseattn, and with torch where it is installed."""
    there = [name for name in ("numpy", "scipy.linalg", "torch") if installed(name.split(".")[0])]
    return list(itertools.permutations([*there, "sparseattn"]))


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def in_order(order: tuple[str, ...]) -> None:
    imports = "".join(f"import {name}\n" for name in order)
    products = "".join(
        {
            "numpy": "numpy.ones((300, 300)) @ numpy.ones((300, 300))\n",
            "scipy.linalg": "scipy.linalg.inv([[2.0, 0], [0, 1]])\n",
            "torch": "torch.ones(300, 300) @ torch.ones(300, 300)\n",
            "sparseattn": "sa = sparseattn\n" + WORK,
        }[name]
        for name in order
    )
    done = run(imports + products, 60)
    assert done.returncode == 0 and not done.stderr, (order, done.stderr)


def test_orders_of_imports() -> None:
    """The first and the last place among the others; all orders nightly."""
    every = orders()
    for order in (every[0], every[-1]):
        in_order(order)


@pytest.mark.nightly
@pytest.mark.parametrize("order", orders(), ids="-".join)
def test_all_orders_of_imports(order: tuple[str, ...]) -> None:
    in_order(order)


DAEMONS = """
import os, sys, threading, time
import numpy as np, sparseattn as sa
sa.set_num_threads(3)
q = np.ones((1, 8, 3000, 64), np.float32)
def forever():
    while True:
        vjp = sa.attention_vjp(q, q, q, {spec!r}, causal=True)
        vjp.pullback(q)
for _ in range({threads}):
    threading.Thread(target=forever, daemon=True).start()
time.sleep({wait})
{end}
"""


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "os._exit(0)"], ids=["end", "exit", "_exit"])
def test_exit_while_daemon_threads_run_kernels(end: str) -> None:
    leave(end, "topk:9", 0.2)


@pytest.mark.nightly
@pytest.mark.parametrize("end", ["", "sys.exit(0)", "os._exit(0)"], ids=["end", "exit", "_exit"])
@pytest.mark.parametrize("spec", ["dense", "topk:9", "window:100"])
def test_exit_at_any_moment(end: str, spec: str) -> None:
    for step in range(20):
        leave(end, spec, step / 50)


def leave(end: str, spec: str, wait: float) -> None:
    begin = time.monotonic()
    done = run(DAEMONS.format(spec=spec, threads=4, wait=wait, end=end))
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert time.monotonic() - begin < 5 + wait


@pytest.mark.parametrize("count", [5, pytest.param(200, marks=pytest.mark.nightly)])
def test_processes_begin_and_end(count: int) -> None:
    for _ in range(count):
        done = run("import sparseattn as sa" + WORK)
        assert done.returncode == 0 and not done.stderr, done.stderr


BLAS = """
import ctypes, glob, os
import numpy as np
def numpys():
    folder = os.path.join(os.path.dirname(np.__file__), "..", "numpy.libs")
    (path,) = glob.glob(os.path.join(folder, "*openblas*"))
    library = ctypes.CDLL(os.path.realpath(path))
    for name in ("scipy_openblas_get_num_threads64_", "openblas_get_num_threads64_",
                 "scipy_openblas_get_num_threads", "openblas_get_num_threads"):
        if hasattr(library, name):
            return getattr(library, name)()
    raise LookupError(path)
before = numpys()
import sparseattn as sa
after = numpys()
x = np.ones((300, 64), np.float32)
sa._core.linear(x, np.ascontiguousarray(x.T), None, np.empty((300, 300), np.float32), False)
sa.Model.from_pretrained()([1, 2, 3])
print(before, after, numpys())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into NumPy's wheel for Linux")
@pytest.mark.parametrize("wanted", ["1", "2"])
def test_threads_of_numpys_blas_are_left_alone(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", wanted)
    done = run(BLAS)
    assert done.returncode == 0, done.stderr
    before, imported, used = done.stdout.split()
    assert before == imported == used
    assert int(before) == min(int(wanted), len(os.sched_getaffinity(0)))
