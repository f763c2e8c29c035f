"""Workers asked in turn, ratios taken round by round."""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent


# OpenBLAS is measured with the kernels that it chooses for this CPU by itself.
OWN_CHOICE = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


class Worker:
    """A child process with a library and a thread count of its own."""

    def __init__(
        self,
        threads: int,
        library: str = "sparseattn",
        env: dict[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        words = [python, str(HERE / "worker.py"), str(threads), library]
        environment = dict(
            os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), **(env or {})
        )
        for name in OWN_CHOICE:
            if name not in (env or {}):
                environment.pop(name, None)
        self.child = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=os.environ.get("TMPDIR", "/tmp"),
        )

    def ask(self, job: str, seconds: float = 0.1, **args: Any) -> float:
        """One measurement; raises RuntimeError with the worker's words."""
        assert self.child.stdin is not None and self.child.stdout is not None
        request = {"job": job, "args": args, "seconds": seconds}
        self.child.stdin.write(json.dumps(request) + "\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"worker died on {job} {args}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return float(answer["value"])

    def close(self) -> None:
        """Let the child end by itself."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait(timeout=30)


@dataclass
class Ask:
    """What to measure where."""

    worker: Worker
    job: str
    args: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.1

    def __call__(self) -> float:
        return self.worker.ask(self.job, self.seconds, **self.args)


def interleave(asks: dict[str, Ask], rounds: int, gap: float = 0.0) -> dict[str, list[float]]:
    """Every ask once a round, in turn; in the ``gap`` the threads of the last one stop spinning."""
    found: dict[str, list[float]] = {name: [] for name in asks}
    for _ in range(rounds):
        for name, ask in asks.items():
            time.sleep(gap)
            found[name].append(ask())
    return found


def ratio(top: list[float], bottom: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the round-by-round ratios."""
    ratios = sorted(a / b for a, b in zip(top, bottom, strict=True))
    quarter = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return statistics.median(ratios), quarter[0], quarter[2]


def idle_share(seconds: float = 0.5) -> float:
    """Share of all CPUs that did nothing for a moment (Linux); nan elsewhere."""

    def read() -> tuple[int, int]:
        words = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        return int(words[3]) + int(words[4]), sum(int(w) for w in words[:8])

    if not pathlib.Path("/proc/stat").exists():
        return float("nan")
    idle, total = read()
    time.sleep(seconds)
    idle2, total2 = read()
    return (idle2 - idle) / max(1, total2 - total)
