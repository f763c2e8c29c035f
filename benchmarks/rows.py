"""The table of speed goals: each row is a ratio with its floor, measured in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench import Bench, Result, fastest, flops, pairs
from decode_rows import DECODE_ROWS
from grad_rows import GRAD_ROWS
from measure import Ask, interleave, ratio


def dense_rows(bench: Bench) -> Iterator[Result]:
    """Rows 1 to 3: rate over OpenBLAS's own sgemm(1024) and over the FMA peak, one thread."""
    cases = (
        ("1", 12, 1024, 64, False, 0.95),
        ("1", 4, 4096, 64, False, 0.95),
        ("2", 4, 4096, 64, True, 0.92),
        ("2", 12, 1024, 64, True, 0.90),
        ("2", 12, 512, 64, True, 0.80),
        ("2", 12, 128, 64, True, 0.70),
        ("3", 4, 1024, 128, False, 0.94),
        ("3", 4, 1024, 128, True, 0.86),
    )
    w = bench.worker()
    for row, heads, n, dim, causal, floor in cases:
        args = {"heads": heads, "n": n, "dim": dim, "causal": causal}
        found = bench.run({"ours": Ask(w, "ours", args), "S": Ask(w, "sgemm"), "P": Ask(w, "fma")})
        work = flops(heads, n, dim, causal)
        rate = [work / t for t in found["ours"]]
        sgemm = [2.0 * 1024**3 / t for t in found["S"]]
        over_s, over_p, s_over_p = (
            ratio(rate, sgemm),
            ratio(rate, found["P"]),
            ratio(sgemm, found["P"]),
        )
        what = f"dense {'causal' if causal else 'full'} D={dim} N={n} H={heads} T1"
        note = f"{over_p[0]:.2f} P; S = {s_over_p[0]:.2f} P"
        yield Result(row, what, "S", *over_s, floor, note=note)
        if row == "1" and s_over_p[0] >= 0.85:
            yield Result(row, what, "P", *over_p, 0.82, note="where S >= 0.85 P")


def thread_rows(bench: Bench) -> Iterator[Result]:
    """Row 5: two threads over one, warm and after 60 ms of rest."""
    one, two = bench.worker(1), bench.worker(2)
    for causal in (False, True):
        args = {"heads": 12, "n": 1024, "dim": 64, "causal": causal}
        for job, words in (("ours", "warm"), ("idle", "after 60 ms idle")):
            found = bench.run(
                {"one": Ask(one, job, args, 0.06), "two": Ask(two, job, args, 0.06)}, gap=0.02
            )
            yield Result(
                "5",
                f"2 threads over 1, {'causal' if causal else 'full'} N=1024 H=12, {words}",
                "x",
                *ratio(found["one"], found["two"]),
                1.85,
            )


def sparse_rows(bench: Bench) -> Iterator[Result]:
    """Rows 6 and 7: speed-up over our own dense kernel, over the ideal ratio of pairs."""
    w, n, heads = bench.worker(), 8192, 2
    shape = {"heads": heads, "n": n, "dim": 64}
    for row, window, floor in (("6", 256, 0.85), ("7", 1024, 0.95)):
        sparse = Ask(w, "ours", {**shape, "causal": True, "spec": f"window:{window}"})
        found = bench.run({"dense": Ask(w, "ours", {**shape, "causal": True}), "sparse": sparse})
        ideal = pairs(n, True) / pairs(n, True, window)
        speedup = [x / ideal for x in found["dense"]]
        yield Result(
            row,
            f"window {window} causal N={n} H={heads} T1",
            "ideal",
            *ratio(speedup, found["sparse"]),
            floor,
            note=f"ideal {ideal:.1f}x",
        )
    for share in (0.1,):
        sparse = Ask(w, "ours", {**shape, "spec": "blockmask:64", "share": share})
        found = bench.run({"dense": Ask(w, "ours", shape), "sparse": sparse})
        blocks = n // 64
        ideal = blocks / max(1, round(share * blocks))
        speedup = [x / ideal for x in found["dense"]]
        yield Result(
            "6",
            f"block mask 64x64 at {share:.0%}, N={n} H={heads} T1",
            "ideal",
            *ratio(speedup, found["sparse"]),
            0.88,
            note=f"ideal {ideal:.1f}x",
        )


def select_rows(bench: Bench) -> Iterator[Result]:
    """Row 11: exact top-k over quickselect on a copy."""
    w = bench.worker()
    for n, floor in ((65536, 12.0), (8192, 4.0)):
        args = {"n": n, "count": 64}
        found = bench.run(
            {"ours": Ask(w, "select", args), "quick": Ask(w, "select", {**args, "quick": True})}
        )
        yield Result(
            "11",
            f"top-64 of {n} scores over quickselect",
            "x",
            *ratio(found["quick"], found["ours"]),
            floor,
        )


def dispatch_rows(bench: Bench) -> Iterator[Result]:
    """Row 17: one empty parallel region, in microseconds."""
    found = bench.run({"two": Ask(bench.worker(2), "dispatch")})
    micro = [x * 1e6 for x in found["two"]]
    yield Result(
        "17",
        "empty parallel dispatch, 2 threads, warm",
        "us",
        *ratio(micro, [1.0] * len(micro)),
        1.5,
        True,
    )


def torch_rows(bench: Bench) -> Iterator[Result]:
    """Row 4: PyTorch's fused kernel at its best thread setting, in alternating processes."""
    floors = {128: (1.35, 2.2), 512: (1.3, 1.9), 1024: (1.3, 1.75), 4096: (1.2, 1.35)}
    for threads in (1, 2):
        rivals = [bench.worker(t, "torch") for t in range(1, threads + 1)]
        for n, floor in floors.items():
            for causal in (False, True):
                args = {"heads": 12 if n < 4096 else 4, "n": n, "dim": 64, "causal": causal}
                asks = {"ours": Ask(bench.worker(threads), "ours_call", args)}
                asks |= {f"torch{i}": Ask(r, "torch_sdpa", args) for i, r in enumerate(rivals)}
                found = bench.run(asks, gap=0.02)
                best = fastest(found, "torch")
                kind = "causal" if causal else "full"
                what = f"over PyTorch SDPA, {kind} N={n} H={args['heads']} T{threads}"
                yield Result("4", what, "x", *ratio(best, found["ours"]), floor[causal])


def torch_sparse_rows(bench: Bench) -> Iterator[Result]:
    """Row 4c (prefill): PyTorch's own ways to a causal window of 256 at N = 8192."""
    args = {"heads": 12, "n": 8192, "dim": 64}
    two, rival = bench.worker(2), bench.worker(2, "torch")
    ours = Ask(two, "ours_call", {**args, "causal": True, "spec": "window:256"})
    for job, words, floor in (
        ("torch_flex", "compiled FlexAttention", 3.5),
        ("torch_sdpa", "SDPA with a mask", 30.0),
    ):
        try:
            found = bench.run(
                {"ours": ours, "torch": Ask(rival, job, {**args, "window": 256})}, gap=0.02
            )
        except RuntimeError as error:
            yield Result(
                "4c",
                f"window 256 N=8192 over {words}",
                "x",
                0.0,
                0.0,
                0.0,
                floor,
                note=f"not run: {error}",
            )
            continue
        yield Result(
            "4c",
            f"window 256 N=8192 H=12 T2 over {words}",
            "x",
            *ratio(found["torch"], found["ours"]),
            floor,
        )


def mass_rows(bench: Bench) -> Iterator[Result]:
    """What a forward costs that also gives the mass of its keys, or the largest weights of rows."""
    args = {"heads": 1, "n": 65536, "dim": 64}
    for word, most in (("mass", 1.6), ("topn:16", 2.0)):
        forward, both = (
            Ask(bench.worker(2), "weights", {**args, "word": x}) for x in (False, word)
        )
        found = interleave({"forward": forward, "both": both}, min(bench.rounds, 5))
        yield Result(
            "w",
            f"forward and {word} over forward, causal N=65536 H=1 T2",
            "x",
            *ratio(found["both"], found["forward"]),
            most,
            True,
        )


ROWS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "dense": dense_rows,
    "threads": thread_rows,
    "sparse": sparse_rows,
    "select": select_rows,
    "dispatch": dispatch_rows,
    "mass": mass_rows,
    "torch": torch_rows,
    "torch-sparse": torch_sparse_rows,
    **GRAD_ROWS,
    **DECODE_ROWS,
}
