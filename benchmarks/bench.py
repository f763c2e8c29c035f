"""What every module of rows builds on: a row's result, the workers of a run, useful work."""

from __future__ import annotations

from dataclasses import dataclass

from measure import Ask, Worker, interleave


@dataclass
class Result:
    """One line: what was measured, the ratio with its quartiles, and the floor it has to reach."""

    row: str
    what: str
    unit: str
    median: float
    low: float
    high: float
    floor: float
    at_most: bool = False
    note: str = ""

    @property
    def reached(self) -> bool:
        return self.median <= self.floor if self.at_most else self.median >= self.floor


class Bench:
    """Workers started when first asked for, and the number of rounds."""

    def __init__(self, rounds: int, core: str = "") -> None:
        self.rounds, self.core = rounds, core
        self.workers: dict[tuple[int, str], Worker] = {}

    def worker(self, threads: int = 1, library: str = "sparseattn") -> Worker:
        """One worker a library and thread count."""
        key = (threads, library)
        if key not in self.workers:
            env = {"OPENBLAS_NUM_THREADS": str(threads), "SPARSEATTN_NUM_THREADS": str(threads)}
            if self.core:
                env["OPENBLAS_CORETYPE"] = self.core
            self.workers[key] = Worker(threads, library, env)
        return self.workers[key]

    def run(self, asks: dict[str, Ask], gap: float = 0.0) -> dict[str, list[float]]:
        return interleave(asks, self.rounds, gap)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def pairs(n: int, causal: bool, window: int = 0) -> float:
    """Visible (query, key) pairs of one head."""
    if window:
        return n * window - window * (window - 1) / 2 if n >= window else n * (n + 1) / 2
    return n * (n + 1) / 2 if causal else float(n) * n


def flops(heads: int, n: int, dim: int, causal: bool) -> float:
    """Useful flops of a forward: the causal half counts half."""
    return 4.0 * pairs(n, causal) * dim * heads


def fastest(found: dict[str, list[float]], prefix: str) -> list[float]:
    """The times of the rival with the smallest median, of those whose name begins so."""
    rivals = (times for name, times in found.items() if name.startswith(prefix))
    return min(rivals, key=lambda times: sorted(times)[len(times) // 2])
