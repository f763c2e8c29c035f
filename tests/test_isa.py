"""Every instruction set gives the same results to within rounding (promise B8).

Plans are bit-equal where the scores that decide them differ by more than rounding: q and k are
coarse here, so that scores are exact and ties go to the lower key on every one. The nightly form
draws many shapes; a machine without AVX-512 says so and compares what it has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import EVERY_SPEC, causals, fit, make_params, random_masks
from hypothesis import given, settings
from hypothesis import strategies as st

import sparseattn as sa
from sparseattn import _core
from sparseattn.variants import Variant

pytestmark = pytest.mark.promise("B8")

Array = np.ndarray
ISAS = ("baseline", "avx2", "avx512")
BOUND = {"float32": 2e-6, "float64": 2e-14}  # of (1 + |value|); sums of a hundred terms
SMALL = [(2, 6, 2, 9, 67, 16, 8), (1, 4, 2, 70, 90, 24, 17), (2, 4, 4, 1, 130, 40, 33)]


def on_each() -> Iterator[str]:
    """Each instruction set of this machine, one after the other; what ran before comes back."""
    before = _core.isa()
    try:
        for isa in _core.isas():
            _core.set_isa(isa)
            assert _core.isa() == isa
            yield isa
    finally:
        _core.set_isa(before)


def coarse(shape: tuple[int, ...], dtype: Any, seed: int) -> tuple[Array, Array, Array]:
    """q and k whose scores are exact in float32, so that no order of summation decides."""
    batch, heads, kv_heads, n_q, n_k, dim, dim_v = shape
    rng = np.random.default_rng([seed, *shape])
    q, k = (
        (rng.integers(-32, 33, (batch, h, n, dim)) / 16).astype(dtype)
        for h, n in ((heads, n_q), (kv_heads, n_k))
    )
    return q, k, rng.standard_normal((batch, kv_heads, n_k, dim_v)).astype(dtype)


def results(
    spec: Variant, shape: tuple[int, ...], dtype: Any, masked: bool, seed: int
) -> dict[str, Array]:
    """Forward, backward, selection, weights and, where it may be causal, decode."""
    q, k, v = coarse(shape, dtype, seed)
    call: dict[str, Any] = {
        "causal": causals(spec)[-1 - seed % len(causals(spec))],
        "params": make_params(spec, shape),
        "scale": 0.25,
        **(random_masks(shape) if masked else {}),
    }
    rng = np.random.default_rng(seed)
    got = sa.attention(q, k, v, spec, return_lse=True, **call)
    vjp = sa.attention_vjp(q, k, v, spec, **call)
    back = vjp.pullback(
        rng.standard_normal(got.out.shape).astype(dtype),
        rng.standard_normal(got.lse.shape).astype(dtype),
    )
    found = {"out": got.out, "lse": got.lse, "dq": back.dq, "dk": back.dk, "dv": back.dv}
    found["plan"] = sa.plan(q, k, spec, **call).to_mask()
    found["mass"] = sa.attention(q, k, v, spec, return_weights="mass", **call).weights
    if True in causals(spec) and shape[3] <= shape[4]:
        cache = sa.Cache(spec)
        call = {"params": call["params"], "scale": 0.25, "causal": True}
        first = shape[4] - shape[3]
        if spec.arrays or first == 0:
            return found
        cache.append(k[:, :, :first], v[:, :, :first])
        parts = [
            sa.attention(q[:, :, i : i + 1], *(x[:, :, first + i :][:, :, :1] for x in (k, v)),
                         cache=cache, **call)
            for i in range(min(3, shape[3]))
        ]  # fmt: skip
        found["decode"] = np.concatenate(parts, 2)
    return found


def agree(spec: Variant, shape: tuple[int, ...], dtype: str, masked: bool, seed: int) -> None:
    shape = fit(spec, shape)
    want: dict[str, Array] = {}
    for isa in on_each():
        got = results(spec, shape, np.dtype(dtype), masked, seed)
        want = want or got
        for name, x in got.items():
            y = want[name]
            where = f"{spec}, {shape}, {dtype}, {isa} over {_core.isas()[0]}: {name}"
            if name == "plan":
                np.testing.assert_array_equal(x, y, err_msg=where)
                continue
            finite = np.isfinite(y)
            np.testing.assert_array_equal(x[~finite], y[~finite], err_msg=where)
            # Gradients of scores are differences that cancel: those of one call share a size.
            like = ("dq", "dk", "dv") if name in ("dq", "dk", "dv") else (name,)
            size = max(np.abs(want[n][np.isfinite(want[n])]).max(initial=1) for n in like)
            error = np.abs(x[finite] - y[finite]).max(initial=0) / size
            assert error <= BOUND[dtype], f"{where}: {error:.3g}"


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
def test_every_isa_agrees(spec: Variant) -> None:
    turn = EVERY_SPEC.index(spec)
    for at, shape in enumerate(SMALL):
        agree(spec, shape, ("float32", "float64")[(turn + at) % 2], (turn + at) % 3 == 0, at)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@settings(max_examples=10_000, deadline=None)
@given(data=st.data())
def test_every_isa_agrees_on_random_shapes(data: st.DataObject) -> None:
    size = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kv_heads = size(1, 3)
    shape = (
        *(size(1, 3), kv_heads * size(1, 4), kv_heads, size(1, 130), size(1, 200)),
        *(8 * size(1, 9), size(1, 70)),
    )
    spec = data.draw(st.sampled_from(EVERY_SPEC))
    dtype = data.draw(st.sampled_from(["float32", "float64"]))
    agree(spec, shape, dtype, data.draw(st.booleans()), size(0, 9))


@pytest.mark.parametrize("count", [1, 3, 8, 63, 64, 65, 300])
def test_selections_are_bit_equal(count: int) -> None:
    """Of scores with many ties, of descending, rising and equal ones."""
    rng = np.random.default_rng(count)
    rows = [rng.integers(-9, 9, 500) / 4, np.arange(500.0), -np.arange(500.0), np.zeros(500)]
    rows += [rng.standard_normal(n) for n in (1, 7, 63, 64, 65, 2000)]
    for row in rows:
        for dtype in (np.float32, np.float64):
            scores = row.astype(dtype)
            found = [_core.select_largest(scores, min(count, row.size)) for _ in on_each()]
            for keys in found[1:]:
                np.testing.assert_array_equal(np.sort(keys), np.sort(found[0]))


def test_halves_agree() -> None:
    for spec in ("dense", "topk:9", "window:20:sinks=2"):
        q, k, v = (x.astype(np.float16) for x in coarse(SMALL[1], np.float32, 3))
        outs = [sa.attention(q, k, v, spec, causal=True, scale=0.25) for _ in on_each()]
        for out in outs[1:]:
            np.testing.assert_allclose(*(x.astype("f4") for x in (out, outs[0])), rtol=2e-3)


CHILD = """
import sys, numpy as np, sparseattn as sa
rng = np.random.default_rng(0)
x = rng.standard_normal((1, 2, 70, 16), np.float32)
out = sa.attention(x, x, x, "topk:9", causal=True)
sys.stdout.buffer.write(sa.show_config("dicts")["isa"].encode() + b"\\n" + out.tobytes())
"""


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_forces_it(isa: str) -> None:
    """What a process is told to run with is what it runs, to the bit of ``set_isa``."""
    if isa not in _core.isas():
        pytest.skip(f"this CPU has no {isa}: it runs {', '.join(_core.isas())}")
    env = {**os.environ, "SPARSEATTN_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD],
        capture_output=True,
        env=env,
        timeout=60,
        check=True,
    )
    name, _, bits = done.stdout.partition(b"\n")
    assert name.decode() == isa
    x = np.random.default_rng(0).standard_normal((1, 2, 70, 16), np.float32)
    outs = {now: sa.attention(x, x, x, "topk:9", causal=True).tobytes() for now in on_each()}
    assert bits == outs[isa]


def test_there_is_more_than_one_to_compare() -> None:
    """On x86-64 the baseline always is; what else this CPU has is listed once."""
    have = list(_core.isas())
    assert have[0] == "baseline" and [isa for isa in ISAS if isa in have] == have
    if len(have) == 1:
        pytest.skip("this CPU runs the baseline alone: nothing was compared")
