"""The tiny example of algorithms.md appendix A, to all its digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sparseattn as sa

Q = [[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]
K = [[[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]]
V = [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]

GOLDEN = {
    False: (
        [(3, 4), (2.712068, 3.712068), (2.593327, 3.593327)],
        [1.620621, 1.258797, 1.620621],
    ),
    True: (
        [(1, 2), (2.339523, 3.339523), (2.593327, 3.593327)],
        [0.707107, 1.107940, 1.620621],
    ),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("spec", ["dense", "topk:3", "window:window_size=2/2", "random:3"])
def test_tiny_attention(causal: bool, dtype: Any, spec: str, isa: str) -> None:
    q, k, v = (np.array(x, dtype) for x in (Q, K, V))
    out, lse = sa.attention(q, k, v, spec, causal=causal, return_lse=True)
    want_out, want_lse = GOLDEN[causal]
    np.testing.assert_allclose(out[0], want_out, atol=1e-6)
    np.testing.assert_allclose(lse[0], want_lse, atol=1e-6)


def test_one_visible_key_gives_its_value_exactly(isa: str) -> None:
    q, k, v = (np.array(x, np.float32) for x in (Q, K, V))
    v = v + np.float32(0.1)
    for spec in ("topk:1", "window:1", "random:1"):
        kept = sa.plan(q, k, spec, causal=True).to_mask()
        out = sa.attention(q, k, v, spec, causal=True)
        np.testing.assert_array_equal(out[0], v[0][kept[0].argmax(-1)])
