"""Ctrl-C at a random moment of any call: KeyboardInterrupt at once, the pool and the memory as
before. The command line's own Ctrl-C is in test_cli.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import interrupt_child
import numpy as np
import pytest

import sparseattn as sa

pytestmark = pytest.mark.promise("C4")

KERNELS = [
    "attend",
    "attend_grad",
    "attend_mass",
    "attend_topn",
    "plan_build",
    "score_rows",
    "count",
]
PUBLIC = ["forward", "backward", "selectors", "decode", "prefill", "generate"]
AT_ONCE = 0.2  # seconds


def interrupt(calls: list[str], times: int, spread: float) -> dict[str, list[float]]:
    """Seconds to the exception from a signal that comes within `spread` seconds of work."""
    here = [str(Path(__file__).parent), str(Path(sa.__path__[0]).parent)]
    rng = np.random.default_rng(times)
    waits: dict[str, list[float]] = {call: [] for call in calls}
    child = subprocess.Popen(
        [sys.executable, interrupt_child.__file__, str(times), *calls],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(here)},
    )
    assert child.stdout is not None
    try:
        for call in calls:
            for _ in range(times):
                assert child.stdout.readline() == "ready\n", call
                time.sleep(0.02 + spread * rng.random())
                sent = time.monotonic()
                child.send_signal(signal.SIGINT)
                word, at = child.stdout.readline().split()
                assert word == "caught"
                waits[call].append(float(at) - sent)
        assert child.stdout.readline() == "done\n"
        assert child.wait(10) == 0
    finally:
        child.kill()
        child.stdout.close()
    return waits


@pytest.mark.parametrize("calls", [KERNELS, PUBLIC], ids=["kernels", "public"])
def test_ctrl_c_ends_a_call(calls: list[str]) -> None:
    """52 interrupts over kernels and public calls."""
    for call, waits in interrupt(calls, 4, 0.1).items():
        assert max(waits) < AT_ONCE, (call, waits)


@pytest.mark.nightly
def test_ctrl_c_five_hundred_times() -> None:
    waits = interrupt(KERNELS + PUBLIC, 39, 1.0)
    every = np.concatenate(list(waits.values()))
    worst = {call: round(max(times), 4) for call, times in waits.items()}
    p99 = np.quantile(every, 0.99)
    print(f"{every.size} interrupts: median {np.median(every):.4f} s, p99 {p99:.4f} s, {worst}")
    assert every.size >= 500
    assert p99 < AT_ONCE, worst
