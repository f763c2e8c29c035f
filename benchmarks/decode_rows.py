"""Rows 8, 9, 10 and 12 of the table of speed goals: one query row over a long cache of keys.

A decode step is timed at the core's door with its plan made, as a loop over tokens pays it; top-k
as a user calls it, planning included. R is a plain sum over the same bytes on as many threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench import Bench, Result, fastest
from measure import Ask, ratio

HEADS = 12
GAP = 0.005  # lets the threads of the other worker stop spinning


def decode_rows(bench: Bench) -> Iterator[Result]:
    """Row 8: the read loop's time over decode's; row 9: four queries a key head over one."""
    floors = {1024: (0.82, 0.82), 8192: (0.90, 0.90), 65536: (0.95, 0.90)}
    for threads in (1, 2):
        w = bench.worker(threads)
        for n, floor in floors.items():
            args = {"heads": HEADS, "n": n}
            asks = {
                "R": Ask(w, "read", {**args, "threads": threads}),
                "ours": Ask(w, "decode", args),
            }
            if n == 65536:
                asks["four"] = Ask(w, "decode", {**args, "group": 4})
            found = bench.run(asks, gap=GAP)
            what = f"decode Nk={n} H={HEADS} T{threads}"
            yield Result("8", what, "R", *ratio(found["R"], found["ours"]), floor[threads - 1])
            if "four" in found:
                what = f"4 queries a key head, Nk={n} T{threads}, over one"
                yield Result("9", what, "x", *ratio(found["four"], found["ours"]), 1.45, True)


def half_rows(bench: Bench) -> Iterator[Result]:
    """Row 10: decode over float32 keys and values over that of float16, and of bfloat16."""
    for threads in (1, 2):
        w = bench.worker(threads)
        for n in (8192, 65536):
            args = {"heads": HEADS, "n": n}
            types = ("float32", "float16", "bfloat16")
            asks = {t: Ask(w, "decode", {**args, "dtype": t}) for t in types}
            found = bench.run(asks, gap=GAP)
            for dtype, floor in (("float16", 1.5), ("bfloat16", 1.5)):
                what = f"decode over {dtype} keys, Nk={n} H={HEADS} T{threads}"
                yield Result("10", what, "x", *ratio(found["float32"], found[dtype]), floor)


def topk_rows(bench: Bench) -> Iterator[Result]:
    """Row 12: top-k decode, planning included, over our own dense decode."""
    for threads in (1, 2):
        w = bench.worker(threads)
        args = {"heads": HEADS, "n": 65536}
        asks = {
            "dense": Ask(w, "decode", args),
            "topk": Ask(w, "decode_call", {**args, "spec": "topk:64"}),
        }
        found = bench.run(asks, gap=GAP)
        what = f"top-64 decode Nk=65536 H={HEADS} T{threads} over dense"
        yield Result("12", what, "x", *ratio(found["dense"], found["topk"]), 1.7)


def torch_rows(bench: Bench) -> Iterator[Result]:
    """Row 4c (decode): one query row over 65536 keys, PyTorch at its best thread setting."""
    args = {"heads": HEADS, "n": 65536}
    for threads in (1, 2):
        asks = {"ours": Ask(bench.worker(threads), "decode_call", args)}
        for t in range(1, threads + 1):
            asks[f"torch{t}"] = Ask(bench.worker(t, "torch"), "torch_decode", args)
        found = bench.run(asks, gap=0.02)
        what = f"decode Nk=65536 H={HEADS} T{threads} over PyTorch SDPA"
        yield Result("4c", what, "x", *ratio(fastest(found, "torch"), found["ours"]), 1.6)


DECODE_ROWS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "decode": decode_rows,
    "decode-half": half_rows,
    "decode-topk": topk_rows,
    "torch-decode": torch_rows,
}
