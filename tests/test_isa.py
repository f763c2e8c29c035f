"""Every instruction set gives the same results to within rounding (promise B8).

Plans are bit-equal where the scores that decide them differ by more than rounding: q and k are
coarse here, so that scores are exact and ties go to the lower key on every one. The nightly form
draws a million calls of a kernel; a machine without AVX-512 says so and compares what it has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from conftest import EVERY_SPEC
from isa_cases import KERNELS, Case, applies, compare, random_case
from public_calls import threads

import sparseattn as sa
from sparseattn import _core
from sparseattn.variants import Variant

pytestmark = pytest.mark.promise("B8")

ISAS = ("baseline", "avx2", "avx512")
SMALL = [(2, 6, 2, 9, 67, 16, 8), (1, 4, 2, 70, 90, 24, 17), (2, 4, 4, 1, 130, 40, 33)]
MANY = int(os.environ.get("SPARSEATTN_KERNELS", "1000000"))
PARTS = 20


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


def agree(calls: list[tuple[str, Case]]) -> float:
    """All of them on one instruction set, then on the next: to change it takes longer than most.
    Returns the largest error in units of its bound."""
    want: list[dict[str, np.ndarray]] = []
    worst = 0.0
    for isa in on_each():
        got = [KERNELS[kernel](case) for kernel, case in calls]
        for (kernel, case), x, y in zip(calls, got, want or got, strict=True):
            where = f"{kernel} of {case}, {isa} over baseline"
            worst = max(worst, compare(x, y, case, where))
        want = want or got
    return worst


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
def test_every_isa_agrees(spec: Variant) -> None:
    turn = EVERY_SPEC.index(spec)
    for at, shape in enumerate(SMALL):
        dtype = ("float32", "float64")[(turn + at) % 2]
        case = Case(spec, shape, dtype, (turn + at) % 3 == 0, at)
        agree([(kernel, case) for kernel in KERNELS if applies(kernel, case)])


def agree_on_random(first: int, last: int) -> float:
    with threads(1):
        return max(
            agree([random_case(seed) for seed in range(at, min(last, at + 100))])
            for at in range(first, last, 100)
        )


def test_every_isa_agrees_on_random_calls() -> None:
    worst = agree_on_random(0, 1000)
    assert worst > 0 or len(_core.isas()) == 1  # rounding alone: they are not the same code


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_isa_agrees_on_many_random_calls(part: int) -> None:
    first, last = MANY * part // PARTS, MANY * (part + 1) // PARTS
    worst = agree_on_random(first, last)
    print(f"{last - first} calls on {', '.join(_core.isas())}: at most {worst:.2f} of the bound")


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
        case = Case(sa.parse(spec), SMALL[1], "float32", False, 3)
        halves = [x.astype(np.float16) for x in (case.q, case.k, case.v)]
        outs = [sa.attention(*halves, spec, causal=True, scale=0.25) for _ in on_each()]
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
