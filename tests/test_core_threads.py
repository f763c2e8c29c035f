"""Kernels beside other threads and under Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_calls import build, entries, problem

import sparseattn
from sparseattn import _core


def long_call(rows: int = 4096, heads: int = 8) -> Callable[[], Any]:
    q = np.random.default_rng(0).standard_normal((1, heads, rows, 64))
    plan = build("dense", q, q, problem(0))
    out = np.empty_like(q)
    return lambda: _core.attend(q, q, q, plan, problem(0), out, None)


def beat_while(work: Callable[[], Any]) -> float:
    """Beats of a thread that wakes every 10 ms, per second of a second of work."""
    done, ticks = threading.Event(), []
    beat = threading.Thread(target=lambda: ticks.extend(beats(done)))
    beat.start()
    start = time.perf_counter()
    while time.perf_counter() - start < 1:
        work()
    seconds = time.perf_counter() - start
    done.set()
    beat.join()
    return len(ticks) / seconds


def test_the_gil_is_released() -> None:
    """A thread gets 80 % of its turns while a kernel runs; under a held GIL it gets a few."""
    call, before = long_call(), _core.num_threads()
    _core.set_num_threads(1)
    shares = []
    for _ in range(3):  # other processes may take the CPU in one of them
        shares.append(beat_while(call) / beat_while(lambda: time.sleep(1)))
        if shares[-1] >= 0.8:
            break
    _core.set_num_threads(before)
    assert max(shares) >= 0.8, shares


def beats(done: threading.Event) -> Iterator[int]:
    while not done.is_set():
        time.sleep(0.01)
        yield 0


def test_concurrent_calls_agree() -> None:
    calls = {name: call for name, call in entries().items() if name.startswith("attend")}
    want = {name: [a.tobytes() for a in call()] for name, call in calls.items()}
    wrong: list[str] = []

    def work(shift: int) -> None:
        names = sorted(calls)
        for i in range(30):
            name = names[(i + shift) % len(names)]
            if [a.tobytes() for a in calls[name]()] != want[name]:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


CHILD = """
import signal, sys, time
import numpy as np
from core_calls import build, problem
from sparseattn import _core

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
n = 30_000
q = np.random.default_rng(0).standard_normal((1, 4, n, 64))
out, free = np.empty_like(q), problem(0)
rows, grads = np.zeros(q.shape[:3]), [np.empty_like(q) for _ in range(3)]
top, keys = np.zeros((*rows.shape, 16)), np.zeros((*rows.shape, 16), np.int64)
few = q[:, :, :64]
small = build("dense", few, few, free)
kernels = {
    "attend": lambda: _core.attend(q, q, q, dense, free, out, None),
    "attend_grad": lambda: _core.attend_grad(
        q, q, q, dense, free, q, rows, rows, *grads, None
    ),
    "attend_mass": lambda: _core.attend_mass(q, q, q, dense, free, rows, top[..., 0]),
    "attend_topn": lambda: _core.attend_topn(q, q, q, dense, free, rows, top, keys),
    "plan_build": lambda: build("topk", q, q, free),
    "score_rows": lambda: [_core.score_rows(q, q, free, 0, 0, i, i + 5000) for i in (0, 5000) * 9],
    "count": lambda: [dense.count(2) for _ in range(10**9)],
}
dense = build("dense", q, q, free)
live = None
for _ in range(int(sys.argv[2])):
    try:
        print("ready", flush=True)
        while True:
            kernels[sys.argv[1]]()
    except KeyboardInterrupt:
        caught = time.monotonic()
    want = np.empty_like(few)
    _core.attend(few, few, few, small, free, want, None)
    assert np.isfinite(want).all()
    _core.trim()
    assert live in (None, _core.live_bytes()), "memory was lost"
    live = _core.live_bytes()
    print("caught", caught, flush=True)
print("done", flush=True)
"""


@pytest.mark.parametrize(
    "kernel",
    ["attend", "attend_grad", "attend_mass", "attend_topn", "plan_build", "score_rows", "count"],
)
def test_ctrl_c_ends_a_kernel(kernel: str) -> None:
    """KeyboardInterrupt within 0.2 s of the signal; the pool and the memory are as before."""
    repeats, rng = 5, np.random.default_rng(0)
    here = [str(Path(path).parent) for path in (__file__, sparseattn.__path__[0])]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, kernel, str(repeats)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(here)},
    )
    assert child.stdout is not None
    waits = []
    try:
        for _ in range(repeats):
            assert child.stdout.readline() == "ready\n"
            time.sleep(0.1 + 0.3 * rng.random())
            sent = time.monotonic()
            child.send_signal(signal.SIGINT)
            word, at = child.stdout.readline().split()
            assert word == "caught"
            waits.append(float(at) - sent)
        assert child.stdout.readline() == "done\n"
        assert child.wait(10) == 0
    finally:
        child.kill()
        child.stdout.close()
    assert max(waits) < 0.2, waits
