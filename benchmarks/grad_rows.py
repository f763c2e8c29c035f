"""The backward: speed against sgemm, its own forward, PyTorch and the ideal; accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench import Bench, Result, fastest, flops, pairs
from measure import Ask, ratio

# Five products a pair where the forward has two.
WORK = 2.5


def kind(causal: bool) -> str:
    return "causal" if causal else "full"


def grad_rows(bench: Bench) -> Iterator[Result]:
    """Row 14: rate over OpenBLAS's own sgemm(1024), and time over that of the forward."""
    w = bench.worker()
    for heads, n, causal, floor in (
        (12, 1024, False, 0.94),
        (12, 1024, True, 0.88),
        (4, 4096, True, 0.92),
    ):
        args = {"heads": heads, "n": n, "dim": 64, "causal": causal}
        found = bench.run(
            {
                "back": Ask(w, "grad", args),
                "forward": Ask(w, "ours", args),
                "S": Ask(w, "sgemm"),
                "P": Ask(w, "fma"),
            }
        )
        rate = [WORK * flops(heads, n, 64, causal) / t for t in found["back"]]
        sgemm = [2.0 * 1024**3 / t for t in found["S"]]
        over_p, s_over_p = ratio(rate, found["P"])[0], ratio(sgemm, found["P"])[0]
        what = f"backward {kind(causal)} D=64 N={n} H={heads} T1"
        note = f"{over_p:.2f} P; S = {s_over_p:.2f} P"
        yield Result("14", what, "S", *ratio(rate, sgemm), floor, note=note)
        over_forward = ratio(found["back"], found["forward"])
        yield Result("14", f"{what} over forward", "x", *over_forward, 2.6, True)


def grad_thread_rows(bench: Bench) -> Iterator[Result]:
    """Row 5: two threads over one, warm and after 60 ms of rest."""
    one, two = bench.worker(1), bench.worker(2)
    for causal in (False, True):
        args = {"heads": 12, "n": 1024, "dim": 64, "causal": causal}
        for job, words in (("grad", "warm"), ("idle", "after 60 ms idle")):
            more = {**args, "of": "grad"} if job == "idle" else args
            found = bench.run(
                {"one": Ask(one, job, more, 0.06), "two": Ask(two, job, more, 0.06)}, gap=0.02
            )
            what = f"backward, 2 threads over 1, {kind(causal)} N=1024 H=12, {words}"
            yield Result("5", what, "x", *ratio(found["one"], found["two"]), 1.85)


def grad_sparse_rows(bench: Bench) -> Iterator[Result]:
    """Speed-up over our own dense backward, over the ideal ratio of pairs."""
    w, n = bench.worker(), 8192
    blocks = n // 64
    shape = {"heads": 2, "n": n, "dim": 64}
    cases: list[tuple[str, str, dict[str, Any], dict[str, Any], float]] = [
        (
            "6",
            "block mask 64x64 at 10%",
            {},
            {"spec": "blockmask:64", "share": 0.1},
            blocks / round(0.1 * blocks),
        ),
    ]
    for row, window in (("6", 256), ("7", 1024)):
        ideal = pairs(n, True) / pairs(n, True, window)
        spec = {"spec": f"window:{window}"}
        cases.append((row, f"window {window} causal", {"causal": True}, spec, ideal))
    for row, words, dense, sparse, ideal in cases:
        found = bench.run(
            {
                "dense": Ask(w, "grad", {**shape, **dense}),
                "sparse": Ask(w, "grad", {**shape, **dense, **sparse}),
            }
        )
        speedup = [x / ideal for x in found["dense"]]
        what, note = f"backward {words} N={n} H=2 T1", f"ideal {ideal:.1f}x"
        yield Result(row, what, "ideal", *ratio(speedup, found["sparse"]), 0.80, note=note)


def torch_grad_rows(bench: Bench) -> Iterator[Result]:
    """Row 4b: PyTorch's backward at its best thread setting, in alternating processes."""
    floors = {1024: (1.35, 1.75), 4096: (1.2, 1.4)}
    for threads in (1, 2):
        rivals = [bench.worker(t, "torch") for t in range(1, threads + 1)]
        for n, floor in floors.items():
            for causal in (False, True):
                args = {"heads": 12 if n < 4096 else 4, "n": n, "dim": 64, "causal": causal}
                asks = {"ours": Ask(bench.worker(threads), "grad_call", args)}
                asks |= {f"torch{i}": Ask(r, "torch_grad", args) for i, r in enumerate(rivals)}
                found = bench.run(asks, gap=0.02)
                over = ratio(fastest(found, "torch"), found["ours"])
                what = f"backward over PyTorch, {kind(causal)} N={n} H={args['heads']} T{threads}"
                yield Result("4b", what, "x", *over, floor[causal])


def accuracy_rows(bench: Bench) -> Iterator[Result]:
    """Row 18: largest error against float64, unit-normal inputs."""
    for what, floor in (("forward", 2e-6), ("backward", 5e-6)):
        for causal in (False, True):
            args = {"n": 1024, "dim": 64, "causal": causal, "backward": what == "backward"}
            error = bench.worker().ask("error", 0.0, **args)
            words = f"{what} {kind(causal)} N=1024 D=64, largest error against float64"
            yield Result("18", words, "", error, error, error, floor, True)


GRAD_ROWS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "grad": grad_rows,
    "grad-threads": grad_thread_rows,
    "grad-sparse": grad_sparse_rows,
    "accuracy": accuracy_rows,
    "torch-grad": torch_grad_rows,
}
