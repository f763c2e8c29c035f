"""Before and after: the same cases by two installations, in alternating rounds of two processes.

    python benchmarks/compare.py --before OLD_VENV/bin/python --after NEW_VENV/bin/python

For every dense and sparse case, and the backward: the ratio before / after (above 1 is faster now)
with its 95 % interval. What stood keeps its place when the interval includes 0.97 or more.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from measure import Ask, Worker, interleave

SHAPES = (
    {"heads": 12, "n": 128, "dim": 64, "causal": True},
    {"heads": 12, "n": 1024, "dim": 64, "causal": False},
    {"heads": 12, "n": 1024, "dim": 64, "causal": True},
    {"heads": 4, "n": 4096, "dim": 64, "causal": True},
    {"heads": 4, "n": 1024, "dim": 128, "causal": True},
    {"heads": 2, "n": 8192, "dim": 64, "causal": True, "spec": "window:256"},
    {"heads": 2, "n": 8192, "dim": 64, "causal": True, "spec": "window:1024"},
    {"heads": 2, "n": 2048, "dim": 64, "causal": True, "spec": "topk:64"},
    {"job": "grad_call", "heads": 12, "n": 1024, "dim": 64, "causal": False},
    {"job": "grad_call", "heads": 12, "n": 1024, "dim": 64, "causal": True},
    {"job": "grad_call", "heads": 4, "n": 4096, "dim": 64, "causal": True},
    {"job": "grad_call", "heads": 2, "n": 8192, "dim": 64, "causal": True, "spec": "window:256"},
)


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the median ratio."""
    rng = np.random.default_rng(0)
    draws = np.median(rng.choice(ratios, (1000, len(ratios))), axis=1)
    return float(np.percentile(draws, 2.5)), float(np.percentile(draws, 97.5))


def main() -> int:
    """Exit code 1 when some interval ends below 0.97."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True, help="python of the older installation")
    parser.add_argument("--after", default=sys.executable, help="python of the newer one")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    env = {"SPARSEATTN_NUM_THREADS": str(args.threads)}
    before = Worker(args.threads, env=env, python=args.before)
    after = Worker(args.threads, env=env, python=args.after)
    lost = 0
    for shape in SHAPES:
        words = " ".join(f"{key}={value}" for key, value in shape.items())
        job = str(shape.get("job", "ours_call"))
        call = {key: value for key, value in shape.items() if key != "job"}
        asks = {"before": Ask(before, job, call), "after": Ask(after, job, call)}
        try:
            asks["before"]()
        except RuntimeError as error:
            print(f"{words:<72} not in the older one: {error}", flush=True)
            continue
        found = interleave(asks, args.rounds)
        ratios = np.array(found["before"]) / np.array(found["after"])
        low, high = interval(ratios)
        lost += high < 0.97
        print(
            f"{words:<72} {np.median(ratios):.3f} [{low:.3f}, {high:.3f}]",
            "LOST" if high < 0.97 else "kept",
            flush=True,
        )
    before.close()
    after.close()
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
