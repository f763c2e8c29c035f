"""Peak memory of one forward and backward, in a process of its own: prints two byte counts as JSON.

``peak_child.py LIBRARY HEADS N``: causal, float32, dim 64. LIBRARY is ``numpy`` (attention_vjp),
``torch`` (PyTorch's scaled_dot_product_attention with autograd) or ``ours`` (sparseattn's in its
place). ``resident`` is what the resident set grows by at its peak, outputs included, inputs not;
``counted`` is what the core allocates at once. The peak is Linux's VmHWM: ru_maxrss begins with
that of the process which started this one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import sparseattn as sa
from sparseattn import _core

DIM = 64


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(name)]
    return int(line.split()[1]) * 1024


def run_numpy(inputs: list[np.ndarray]) -> Any:
    *qkv, dout = inputs
    vjp = sa.attention_vjp(*qkv, causal=True)
    return vjp, vjp.pullback(dout)


def run_torch(inputs: list[np.ndarray], ours: bool) -> Any:
    import torch

    sdpa = (sa if ours else torch.nn.functional).scaled_dot_product_attention
    *qkv, dout = map(torch.from_numpy, inputs)
    qkv = [x.requires_grad_() for x in qkv]
    out = sdpa(*qkv, is_causal=True)
    return out, torch.autograd.grad(out, qkv, dout)


def run(library: str, inputs: list[np.ndarray]) -> Any:
    return run_numpy(inputs) if library == "numpy" else run_torch(inputs, library == "ours")


def main(library: str, heads: int, n: int) -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((1, heads, n, DIM), dtype=np.float32) for _ in range(4)]
    run(library, [np.ascontiguousarray(x[:, :1, :300]) for x in inputs])  # loads what is lazy
    _core.trim()
    before, live = resident("VmRSS"), _core.live_bytes()
    _core.peak_reset()
    results = run(library, inputs)
    counts = {"resident": resident("VmHWM") - before, "counted": _core.peak_bytes() - live}
    del results
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
