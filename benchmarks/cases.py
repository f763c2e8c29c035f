"""One line per variant: what the correctness gate checks and the variant table times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sparseattn as sa


@dataclass(frozen=True)
class Case:
    """A spec at a shape (batch, heads, kv_heads, n_q, n_k, dim)."""

    name: str
    spec: Any
    shape: tuple[int, int, int, int, int, int] = (1, 12, 12, 4096, 4096, 64)
    causal: bool = True
    params: dict[str, Any] = field(default_factory=dict)
    sequences: int = 1  # of one length, packed


CASES = (
    Case("dense", sa.Dense()),
    Case("dense-full", sa.Dense(), causal=False),
    Case("dense-packed", sa.Dense(), sequences=8),
    Case("dense-gqa", sa.Dense(), shape=(1, 12, 3, 4096, 4096, 64)),
    Case("window-256", sa.Window(256)),
    Case("window-1024", sa.Window(1024)),
    Case("window-256-sinks", sa.Window(256, sinks=4)),
    Case("prefix-1024", sa.Prefix(1024), causal=False),
    Case("blockmask-10%", sa.BlockMask(64), causal=False, params={"layout": 0.1}),
    Case("topk-64", sa.TopK(64)),
    Case("random-64", sa.RandomKeys(64)),
)
