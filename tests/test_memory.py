"""Memory beside inputs and outputs, by the core's own byte counter and by the system's."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import numpy as np
import peak_child
import pytest
from conftest import requires

import sparseattn as sa
from sparseattn import _core

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


def extra(n: int, spec: sa.Dense | sa.Window, backward: bool) -> int:
    """Peak bytes that the core takes for one causal head of n tokens."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 1, n, 16), dtype=np.float32) for _ in range(4))
    if backward:
        call = functools.partial(sa.attention_vjp(q, k, v, spec, causal=True).pullback, dout)
    else:
        call = functools.partial(sa.attention, q, k, v, spec, causal=True)
    _core.trim()
    before = _core.live_bytes()
    _core.peak_reset()
    first = call()[0] if backward else call()
    assert np.isfinite(first).all()
    return _core.peak_bytes() - before


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("spec", [sa.Dense(), sa.Window(1024)], ids=str)
def test_long_rows_take_linear_memory(spec: sa.Dense | sa.Window, backward: bool) -> None:
    """N = 65,536: the plan and the scratch, about 20 bytes a token; N x N bits would be 512 MiB."""
    short, long = (extra(n, spec, backward) for n in (16_384, 65_536))
    assert long <= 4 * short
    assert long <= 64 * 65_536


def peaks(library: str, heads: int, n: int) -> dict[str, int]:
    """Peak bytes of a causal forward and backward on two threads; see ``peak_child``."""
    words = [sys.executable, peak_child.__file__, library, str(heads), str(n)]
    env = dict(os.environ, SPARSEATTN_NUM_THREADS="2", OMP_NUM_THREADS="2")
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def outputs(heads: int, n: int) -> int:
    """Bytes of out, dq, dk, dv and the log-sum-exp."""
    return 4 * heads * n * (4 * peak_child.DIM + 1)


@linux
@pytest.mark.parametrize("n", [16_384, pytest.param(65_536, marks=pytest.mark.nightly)])
def test_backward_takes_linear_memory(n: int) -> None:
    """Beside outputs: the plan, delta and two threads' scratch of about 0.4 MiB each. N x N weights
    would be 1 GiB at N = 16,384 and 16 GiB at N = 65,536."""
    counts = peaks("numpy", 1, n)
    assert 0 < counts["counted"] <= 2**20 + 16 * n
    assert outputs(1, n) <= counts["resident"] <= outputs(1, n) + 2 * 2**20 + 64 * n


@linux
@pytest.mark.parametrize("library", ["numpy", "ours"])
def test_backward_takes_no_more_than_pytorch(pytorch_peak: int, library: str) -> None:
    """12 heads, N = 4,096, forward and backward: inputs apart, everything resident counts."""
    assert outputs(12, 4096) <= peaks(library, 12, 4096)["resident"] <= pytorch_peak


@pytest.fixture(scope="module")
def pytorch_peak() -> int:
    requires("torch")
    return peaks("torch", 12, 4096)["resident"]
