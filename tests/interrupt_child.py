"""``interrupt_child.py TIMES CALL...``: says "ready", makes a call over and over until SIGINT, says
when KeyboardInterrupt arrived; each call as many times. After each the pool must work and no memory
be lost."""

from __future__ import annotations

import gc
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from core_calls import build, problem

import sparseattn as sa
from sparseattn import _core

ROWS = 30_000


def kernels() -> dict[str, Callable[[], Any]]:
    """Single crossings into the core that take seconds."""
    free = problem(0)
    q = np.random.default_rng(0).standard_normal((1, 4, ROWS, 64))
    out, rows = np.empty_like(q), np.zeros(q.shape[:3])
    grads = [np.empty_like(q) for _ in range(3)]
    top, keys = np.zeros((*rows.shape, 16)), np.zeros((*rows.shape, 16), np.int64)
    dense = build("dense", q, q, free)
    parts = [(i, i + 5000) for i in (0, 5000) * 9]
    return {
        "attend": lambda: _core.attend(q, q, q, dense, free, out, None),
        "attend_grad": lambda: _core.attend_grad(
            *(q, q, q, dense, free, q, rows, rows, *grads, None)
        ),
        "attend_mass": lambda: _core.attend_mass(q, q, q, dense, free, rows, top[..., 0]),
        "attend_topn": lambda: _core.attend_topn(q, q, q, dense, free, rows, top, keys),
        "plan_build": lambda: build("topk", q, q, free),
        "score_rows": lambda: [_core.score_rows(q, q, free, 0, 0, *part) for part in parts],
        "count": lambda: dense.count(2),
    }


def public() -> dict[str, Callable[[], Any]]:
    """What users call, Python's own share included."""
    q = np.random.default_rng(0).standard_normal((1, 4, 6000, 64), np.float32)
    mask = np.random.default_rng(1).random((6000, 6000)) < 0.5
    model = sa.Model.from_pretrained()
    ids = np.arange(500) % 1000

    def decode() -> None:
        cache, x = sa.Cache("topk:16"), q[:, :, :1]
        sa.attention(q, q, q, causal=True, cache=cache)
        for _ in range(500):
            sa.attention(x, x, x, causal=True, cache=cache)

    def backward() -> None:
        vjp = sa.attention_vjp(q, q, q, "window:2000+topk:9", causal=True)
        vjp.pullback(vjp.out)

    return {
        "forward": lambda: sa.attention(q, q, q, mask=mask),
        "backward": backward,
        "selectors": lambda: sa.plan(q, q, "topk:16:placement=post", causal=True),
        "decode": decode,
        "prefill": lambda: model(ids),
        "generate": lambda: model.generate("The list of", max_new_tokens=300, temperature=0.8),
    }


def main(times: int, names: list[str]) -> None:
    # a shell's background jobs ignore SIGINT, and so do their children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    few = np.random.default_rng(0).standard_normal((1, 4, 64, 64))
    want = sa.attention(few, few, few)
    calls = kernels() | public()
    gc.collect()
    gc.freeze()
    for name in names:
        live = None
        for _ in range(times):
            try:
                print("ready", flush=True)
                while True:
                    calls[name]()
            except KeyboardInterrupt:
                caught = time.monotonic()
            assert (sa.attention(few, few, few) == want).all(), "the pool is broken"
            gc.collect()
            _core.trim()
            assert live in (None, _core.live_bytes()), "memory was lost"
            live = _core.live_bytes()
            print("caught", caught, flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
