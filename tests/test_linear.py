"""Large products: against float64, on tiles and on OpenBLAS, whatever the blocks and threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_no_worse
from reference import ops as reference

import sparseattn as sa
from sparseattn import _core

Array = np.ndarray
CARRIED = sorted(Path(_core.__file__).with_name("_libs").glob("libscipy_openblas*"))
# rows, terms, columns: ones, and the edges of panels (24, 32), blocks (192) and depth (256)
SIZES = [
    (1, 1, 1), (1, 768, 768), (3, 257, 33), (12, 64, 24), (65, 40, 193),
    (257, 16, 7), (193, 513, 200), (600, 30, 97),
]  # fmt: skip


@pytest.fixture(params=["tiles", "openblas"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The tiles alone, then the library that the package carries."""
    if request.param == "openblas" and not CARRIED:
        pytest.skip("this build carries no OpenBLAS (SPARSEATTN_BLAS=none)")
    _core.set_blas_path(None if request.param == "tiles" else str(CARRIED[0]))
    assert _core.blas_config().lower().startswith(request.param)
    yield request.param
    _core.set_blas_path(str(CARRIED[0]) if CARRIED else None)


@pytest.fixture
def tiles() -> Iterator[None]:
    _core.set_blas_path(None)
    yield
    _core.set_blas_path(str(CARRIED[0]) if CARRIED else None)


def make(size: tuple[int, int, int], dtype: Any, transposed: bool) -> tuple[Array, Array, Array]:
    m, k, n = size
    rng = np.random.default_rng([*size, transposed])
    shape = (n, k) if transposed else (k, n)
    arrays = (rng.standard_normal(s).astype(dtype) for s in ((m, k), shape, (n,)))
    x, w, bias = arrays
    return x, w, bias


def linear(x: Array, w: Array, bias: Array | None = None, transposed: bool = False) -> Array:
    out = np.full((len(x), w.shape[0 if transposed else 1]), np.nan, x.dtype)
    _core.linear(x, w, bias, out, transposed)
    return out


@cache
def answers(size: tuple[int, int, int], dtype: Any, transposed: bool) -> tuple[Array, Array, float]:
    """x @ w in float64, NumPy's own, and the size of the terms: an element's error grows with
    its terms, not with its value."""
    x, w, _ = make(size, dtype, transposed)
    want = reference.linear(x, w, transposed=transposed)
    naive = reference.linear(x, w, transposed=transposed, compute=dtype)
    terms = np.abs(x) @ np.abs(w.T if transposed else w)
    return want, naive, max(1.0, float(terms.max()) / size[1] ** 0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_reference(
    size: tuple[int, int, int], transposed: bool, dtype: Any, engine: str, isa: str
) -> None:
    x, w, bias = make(size, dtype, transposed)
    want, naive, scale = answers(size, dtype, transposed)
    for b in (None, bias):
        shift = 0 if b is None else b
        ours = linear(x, w, b, transposed) / dtype(scale)
        assert_no_worse(ours, (want + shift) / scale, than=(naive + shift) / dtype(scale))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(65, 40, 193), (193, 513, 200), (520, 300, 1000)], ids=str)
def test_threads_change_no_bit(
    size: tuple[int, int, int], transposed: bool, engine: str, with_threads: Callable[[int], None]
) -> None:
    x, w, bias = make(size, np.float32, transposed)
    with_threads(1)
    want = linear(x, w, bias, transposed)
    for count in (2, 3, 5):
        with_threads(count)
        assert np.array_equal(linear(x, w, bias, transposed), want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_stands_alone_on_tiles(dtype: Any, isa: str, tiles: None) -> None:
    x, w, bias = make((70, 600, 205), dtype, False)
    whole = linear(x, w, bias)
    for rows in (slice(0, 1), slice(69, 70), slice(3, 16), slice(5, 57)):
        assert np.array_equal(linear(x[rows], w, bias), whole[rows])
    assert np.array_equal(linear(x, w[:, 40:77], bias[40:77]), whole[:, 40:77])
    turned = np.ascontiguousarray(w.T)
    assert np.array_equal(linear(x, turned, bias, True), whole)
    assert np.array_equal(linear(x[7:8], turned, bias, True), whole[7:8])


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(300, 205), (17, 40), (261, 1500), (1, 3)], ids=str)
def test_a_few_rows_have_the_bits_of_many(
    size: tuple[int, int], transposed: bool, kind: str, isa: str, tiles: None
) -> None:
    """They take a path of their own, which reads the matrix as it lies."""
    real = np.float64 if kind == "f64" else np.float32
    x, w, bias = make((9, *size), real, transposed)
    if kind == "f16":
        w = w.astype(np.float16)
    if kind == "bf16":
        w = (w.view(np.uint32) >> 16).astype(np.uint16)
    whole = linear(x, w, bias, transposed)
    for rows in (slice(3, 4), slice(0, 2), slice(6, 9), slice(1, 5), slice(0, 5)):
        assert np.array_equal(linear(x[rows], w, bias, transposed), whole[rows])
    assert np.array_equal(linear(x[8:4:-2], w, bias, transposed), whole[8:4:-2])


def test_later_rows_change_no_earlier_bit(engine: str) -> None:
    x, w, _ = make((130, 300, 97), np.float32, False)
    before = linear(x, w)
    for row in (0, 1, 64, 129):
        changed = x.copy()
        changed[row] = np.nan
        after = linear(changed, w)
        others = np.arange(130) != row
        assert np.array_equal(after[others], before[others])
        assert np.isnan(after[row]).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_half_weights(kind: str, transposed: bool, dtype: Any, engine: str, isa: str) -> None:
    """Half precision goes to the tiles, whatever else there is: the bits of a row depend on neither
    the library nor the other rows, and are those of the widened weights there."""
    x, w, bias = make((70, 300, 205), dtype, transposed)
    bits = w.astype(np.float32).view(np.uint32) >> 16
    half = w.astype(np.float16) if kind == "f16" else bits.astype(np.uint16)
    wide = reference.widen(half.view(np.uint16), kind).astype(dtype)
    ours = linear(x, half, bias, transposed)
    for row in (0, 7, 69):
        assert np.array_equal(linear(x[row : row + 1], half, bias, transposed)[0], ours[row])
    _core.set_blas_path(None)  # the fixture puts it back
    assert np.array_equal(ours, linear(x, wide, bias, transposed))
    want = reference.linear(x, wide, bias, transposed=transposed)
    naive = reference.linear(x, wide, bias, transposed=transposed, compute=dtype)
    assert_no_worse(ours / dtype(16), want / 16, than=naive / dtype(16))


def test_any_row_stride(engine: str) -> None:
    """On small whole numbers, where every order of sums gives the same bits."""
    x, w, _ = (np.rint(3 * a) for a in make((40, 96, 50), np.float32, False))
    want = x @ w
    out = np.zeros((80, 70), np.float32)
    wide_w = np.zeros((96, 90), np.float32)
    wide_w[:, 20:70] = w
    _core.linear(np.repeat(x, 2, 0)[::2], wide_w[:, 20:70], None, out[::2, 10:60], False)
    assert np.array_equal(out[::2, 10:60], want)
    assert not out[1::2].any() and not out[:, :10].any() and not out[:, 60:].any()
    assert np.array_equal(linear(x[::-1], w), want[::-1])
    assert np.array_equal(linear(x, w[::-1]), x @ w[::-1])
    assert np.array_equal(linear(np.broadcast_to(x[:1], (40, 96)), w), want[[0] * 40])
    assert np.array_equal(linear(np.repeat(x, 2, 1)[:1, :96], w), np.repeat(x, 2, 1)[:1, :96] @ w)


def test_empty(engine: str) -> None:
    bias = np.arange(5, dtype=np.float32)
    nothing = linear(np.zeros((3, 0), np.float32), np.zeros((0, 5), np.float32), bias)
    assert np.array_equal(nothing, np.broadcast_to(bias, (3, 5)))
    assert not linear(np.zeros((3, 0), np.float32), np.zeros((5, 0), np.float32), None, True).any()
    assert linear(np.zeros((0, 4), np.float32), np.zeros((4, 5), np.float32)).shape == (0, 5)
    assert linear(np.zeros((2, 4), np.float32), np.zeros((4, 0), np.float32)).shape == (2, 0)


def test_many_callers(engine: str) -> None:
    """More at once than OpenBLAS has threads' buffers at hand; each gets the product alone."""
    x, w, bias = make((30, 64, 48), np.float32, False)
    want = linear(x, w, bias)
    with ThreadPoolExecutor(128) as pool:
        results = list(pool.map(lambda _: linear(x, w, bias), range(512)))
    assert all(np.array_equal(result, want) for result in results)


def test_no_memory_writes_nothing(tiles: None) -> None:
    x, w, _ = make((64, 64, 64), np.float32, False)
    out = np.full((64, 64), 7, np.float32)
    _core.trim()
    try:
        for nth in range(1, 10):
            _core.fail_set(nth)
            try:
                _core.linear(x, w, None, out, False)
            except sa.errors.OutOfMemory:
                assert (out == 7).all()
                _core.trim()
            else:
                break
        assert nth > 1, "the first allocation failed and nobody said so"
    finally:
        _core.fail_set(0)
    np.testing.assert_allclose(out, x @ w, rtol=0, atol=1e-4)


def errors() -> dict[str, tuple[tuple[Any, ...], type[Exception], str]]:
    x, w, b, o = (np.zeros(s, np.float32) for s in ((2, 3), (3, 4), (4,), (2, 4)))
    value, kind = sa.errors.ArgumentError, sa.errors.DtypeError
    return {
        "inner": ((x, np.zeros((5, 4), "f4"), None, o, False), value, "w must have 3 .* got 5"),
        "turned": ((x, w, None, o, True), value, "w must have 3 entries on axis -1, got 4"),
        "rows": ((x, w, None, o[:1], False), value, "out must have 2"),
        "columns": ((x, w, None, o[:, :3], False), value, "out must have 4"),
        "bias": ((x, w, b[:3], o, False), value, "bias must have 4"),
        "axes": ((x[0], w, None, o, False), value, "x must have 2 axes, got 1"),
        "last axis": ((x, w.T.copy().T, None, o, False), value, "last axis of w .* contiguous"),
        "read-only": ((x, w, None, np.broadcast_to(o[:1], (2, 4)), False), value, "out "),
        "overlap": ((o[:, :3], w, None, o, False), value, "out shares memory with x"),
        "mixed": ((x, w.astype("f8"), None, o, False), kind, "w must have the dtype of x, float32"),
        "mixed out": ((x, w, None, o.astype("f8"), False), kind, "out must have the dtype of x"),
        "mixed bias": ((x, w, b.astype("f8"), o, False), kind, "bias must have the dtype of x"),
        "integers": ((x, w.astype("i4"), None, o, False), kind, "w must be float32 or"),
        "half x": ((x.astype("f2"), w, None, o, False), kind, "x must be float32 or float64"),
        "list": (([[0.0]], w, None, o, False), kind, "x must be a NumPy array"),
    }


@pytest.mark.parametrize("case", errors())
def test_errors(case: str) -> None:
    args, kind, words = errors()[case]
    with pytest.raises(kind, match=words) as raised:
        _core.linear(*args)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["libm.so.6", "/nowhere/libopenblas.so"])
def test_a_library_that_will_not_do(name: str, tiles: None) -> None:
    _core.set_blas_path(name)
    assert _core.blas_config().startswith("tiles (")
    assert name in _core.blas_config()
    assert np.array_equal(linear(np.eye(3), np.eye(3)), np.eye(3))


FIRST_USE = """
import ctypes, os, sys
import numpy as np
def tasks(): return len(os.listdir("/proc/self/task"))
def loaded(): return "libscipy_openblas.so" in open("/proc/self/maps").read()
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
os.environ["SPARSEATTN_NUM_THREADS"] = "1"
names = (b"OPENBLAS_NUM_THREADS", b"OPENBLAS_CORETYPE", b"PATH", b"SPARSEATTN_NUM_THREADS")
before, settings = tasks(), [getenv(name) for name in names]
from sparseattn import _core
assert (tasks(), loaded()) == (before, False), "import loads OpenBLAS or starts a thread"
x = np.ones((300, 64), np.float32)
out = np.empty((300, 300), np.float32)
_core.linear(x, np.ascontiguousarray(x.T), None, out, False)
assert (out == 64).all()
assert (tasks(), loaded()) == (before, True), "OpenBLAS is not loaded, or started threads"
assert [getenv(name) for name in names] == settings, "the environment was not given back"
child = os.fork()
if child == 0:
    out[:] = 0
    _core.set_num_threads(2)
    _core.linear(x, np.ascontiguousarray(x.T), None, out, False)
    os._exit(0 if (out == 64).all() else 1)
assert os.waitpid(child, 0)[1] == 0, "a forked child cannot multiply"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not CARRIED, reason="this build carries no OpenBLAS")
@pytest.mark.parametrize("wanted", [None, "4"])
def test_first_use_starts_no_thread(wanted: str | None) -> None:
    settings = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    if wanted is not None:
        settings["OPENBLAS_NUM_THREADS"] = wanted
    command = [sys.executable, "-c", FIRST_USE]
    run = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
