"""Speed of sparseattn: a correctness gate, then ratios in one run.

    python benchmarks/run.py --check            the gate alone (what continuous integration runs)
    python benchmarks/run.py                    everything (rows against PyTorch where it is)
    python benchmarks/run.py --rows dense,sparse --rounds 15 --json out.json

No kernel is timed before its result matches a float64 reference. Times are medians of interleaved
rounds; only ratios of one run mean anything, so S (OpenBLAS's sgemm of 1024) and P (a register-only
loop of multiply-adds) are measured in the same rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import sys
from dataclasses import asdict
from typing import Any

import exact
import numpy as np
from bench import Bench, Result
from cases import CASES, Case
from measure import idle_share
from rows import ROWS

# Largest errors against float64, unit-normal inputs, of the output and of the gradients.
CEILINGS = (2e-6, 5e-6)


def gate(case: Case) -> tuple[float, float]:
    """Largest errors of out and of dq, dk, dv at a small shape, over every instruction set of this
    machine."""
    import sparseattn as sa
    from sparseattn import _core

    _, heads, kv_heads, _, _, dim = case.shape
    n = 383
    rng = np.random.default_rng(7)
    q = rng.standard_normal((1, heads, n, dim), dtype=np.float32)
    k, v = (rng.standard_normal((1, kv_heads, n, dim), dtype=np.float32) for _ in range(2))
    share = case.params.get("layout")
    blocks = -(-n // 64)
    params = {"layout": rng.random((1, blocks, blocks)) < max(share, 0.3)} if share else None
    cu = np.linspace(0, n, case.sequences + 1).astype(int) if case.sequences > 1 else None
    dout = rng.standard_normal(q.shape, dtype=np.float32)
    errors, before = [], _core.isa()
    for isa in _core.isas():
        _core.set_isa(isa)
        plan = sa.plan(q, k, case.spec, causal=case.causal, params=params, cu_seqlens=cu)
        vjp = sa.attention_vjp(q, k, v, plan, causal=case.causal)
        out, grads = exact.attention(q, k, v, plan.to_mask(), dout)
        forward = exact.largest_error([vjp.out], [out])
        backward = exact.largest_error(vjp.pullback(dout)[:3], grads)
        errors.append((forward, backward))
    _core.set_isa(before)
    forward, backward = np.max(errors, axis=0)
    return float(forward), float(backward)


def check() -> bool:
    """The gate over all cases; prints one line each."""
    good = True
    for case in CASES:
        forward, backward = gate(case)
        holds = forward <= CEILINGS[0] and backward <= CEILINGS[1]
        good &= holds
        print(
            f"  {case.name:<20} largest error {forward:.1e}, of gradients {backward:.1e}  "
            f"{'ok' if holds else 'WRONG'}"
        )
    print(f"{len(CASES)} passed, 0 failed" if good else "correctness gate failed")
    return good


def line(r: Result) -> str:
    """One row of the table."""
    sign = "<=" if r.at_most else ">="
    state = "reached" if r.reached else "SHORT"
    return (
        f"{r.row:>3}  {r.what:<58} {r.median:7.3g} {r.unit:<5} [{r.low:.3g}, {r.high:.3g}]  "
        f"floor {sign} {r.floor:<5g} {state:<8} {r.note}"
    )


def table(names: list[str], rounds: int, core: str) -> list[Result]:
    """Measures and prints row by row."""
    bench = Bench(rounds, core)
    results: list[Result] = []
    try:
        for name in names:
            for result in ROWS[name](bench):
                results.append(result)
                print(line(result), flush=True)
    finally:
        bench.close()
    return results


def main() -> int:
    """Exit code 1 when the gate fails; a row that is short is printed so, and is no error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="the correctness gate alone")
    parser.add_argument(
        "--rows", default=",".join(ROWS), help=f"comma-separated: {', '.join(ROWS)}"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--core", default="", help="OpenBLAS's kernels for S (Haswell, ...)")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    import sparseattn as sa

    if not check():
        return 1
    if args.check:
        return 0
    names = [name for name in args.rows.split(",") if name]
    if importlib.util.find_spec("torch") is None:
        names = [name for name in names if not name.startswith("torch")]
        print("rows against PyTorch are left out: torch is not installed")
    sa.show_config()
    idle = idle_share()
    print(
        f"idle share of the CPUs before the run: {idle:.0%}"
        + ("  (below 93 %: figures are spoiled)" if idle < 0.93 else "")
    )
    results = table(names, args.rounds, args.core)
    if args.json:
        data: dict[str, Any] = {
            "idle": idle,
            "rows": [asdict(r) | {"reached": r.reached} for r in results],
        }
        args.json.write_text(json.dumps(data, indent=1))
    short = [r for r in results if not r.reached]
    print(f"{len(results) - len(short)} of {len(results)} rows reach their floor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
