"""Memory beside inputs and outputs, by the core's own byte counter."""

from __future__ import annotations

import numpy as np
import pytest

import sparseattn as sa
from sparseattn import _core


def extra(n: int, spec: sa.Dense | sa.Window) -> int:
    """Peak bytes that one causal head of n tokens takes beside q, k, v and out."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, n, 16), dtype=np.float32) for _ in range(3))
    out = np.empty_like(q)
    _core.trim()
    before = _core.live_bytes()
    _core.peak_reset()
    sa.attention(q, k, v, spec, causal=True, out=out)
    assert np.isfinite(out).all()
    return _core.peak_bytes() - before


@pytest.mark.parametrize("spec", [sa.Dense(), sa.Window(1024)], ids=str)
def test_long_rows_take_linear_memory(spec: sa.Dense | sa.Window) -> None:
    """N = 65,536: the plan and the scratch, about 20 bytes a token; N x N bits would be 512 MiB."""
    short, long = extra(16_384, spec), extra(65_536, spec)
    assert long <= 4 * short
    assert long <= 64 * 65_536
