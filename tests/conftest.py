"""What all tests share: inputs, every ISA and thread count, poisoned memory, optional parts.

``from conftest import requires`` gives a test its optional module or the shared data: absent, it
skips with the reason, and with ``SPARSEATTN_REQUIRE_ALL=1`` it fails.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import os
import platform
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from reference import attention as ref

import sparseattn as sa
from sparseattn import _core
from sparseattn.variants import Variant, variants

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("SPARSEATTN_SHARED") or ROOT.parent / "shared")
REQUIRE_ALL = os.environ.get("SPARSEATTN_REQUIRE_ALL") == "1"

# Compiled into the module, whatever this CPU has.
ISAS = ["baseline"]
if platform.machine().lower() in {"x86_64", "amd64"}:
    ISAS += ["avx2", "avx512"]

# The project's ceilings of |error| / (1 + |value|), forward, by real type.
CEILING = {np.dtype("f4"): 1e-5, np.dtype("f8"): 1e-12}


def _absent(reason: str) -> Any:
    if REQUIRE_ALL:
        pytest.fail(f"{reason}, and SPARSEATTN_REQUIRE_ALL=1 allows no skip", pytrace=False)
    pytest.skip(reason)


def requires(what: str) -> Any:
    """The module ``what``, or for ``"shared"`` the path of the shared data; else skip, or fail."""
    if what == "shared":
        data = SHARED / "data"
        return data if data.is_dir() else _absent(f"no {data}: set SPARSEATTN_SHARED")
    try:
        return importlib.import_module(what)
    except ImportError as error:
        return _absent(f"needs {what}, which cannot be imported ({error})")


def shared_path(relative: str) -> Path:
    """A file or folder of the shared data that the test needs."""
    path: Path = requires("shared") / relative
    return path if path.exists() else _absent(f"the shared data has no {relative}")


@pytest.fixture
def shared() -> Path:
    path: Path = requires("shared")
    return path


@pytest.fixture
def torch() -> ModuleType:
    module: ModuleType = requires("torch")
    return module


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each compiled instruction set in turn; one that this CPU lacks is skipped, and said so."""
    if request.param not in _core.isas():
        pytest.skip(f"compiled, but could not run: this CPU has no {request.param}")
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


@pytest.fixture(params=[1, 3], ids=["threads1", "threads3"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = sa.get_num_threads()
    sa.set_num_threads(request.param)
    yield request.param
    sa.set_num_threads(before)


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    """``with_threads(n)`` inside a test; the count is put back afterwards."""
    before = sa.get_num_threads()
    yield sa.set_num_threads
    sa.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread_of_torch() -> Iterator[None]:
    """For tiny models: torch's threads spin at barriers, a thousand times as long as they compute
    where other work runs beside the tests."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def few_objects() -> None:
    """What is there already is left out of collections, which would take most of the time of tests
    that collect after every call."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> None:
    """A shell's background job ignores Ctrl-C, and so would the children that tests interrupt."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """Fresh and freed memory of the core holds 0xA5: what is read before it is written shows."""
    _core.poison(True)
    yield
    _core.poison(False)


@pytest.fixture
def clean_memory() -> Iterator[None]:
    """No poison, for tests that measure time or peak memory."""
    _core.poison(False)
    yield
    _core.poison(True)


@pytest.fixture
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons do not start transformers, which takes seconds: the rest is tested."""
    monkeypatch.setattr(
        "sparseattn.evaluation.compare.reference_difference", lambda *_: {"reason": "left out"}
    )


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != getattr(socket, "AF_UNIX", None):
            raise AssertionError(f"a test tried to reach the network at {address}")
        original(self, address)

    original = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)


# Shapes are awkward on purpose: batch, heads, kv_heads, n_q, n_k, dim, dim_v.
SHAPES = [
    (16, 1, 1, 1, 1, 16, 16),
    (2, 6, 2, 63, 63, 16, 24),
    (1, 6, 2, 65, 65, 40, 40),
    (1, 2, 1, 257, 257, 128, 128),
    (6, 3, 3, 5, 130, 16, 16),
    (2, 2, 2, 70, 9, 16, 7),
    (12, 4, 2, 1, 257, 40, 33),
]
MIDDLE = (2, 6, 2, 65, 131, 40, 24)
shape_ids = ["x".join(map(str, shape)) for shape in SHAPES]


@pytest.fixture(params=SHAPES, ids=shape_ids)
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    value: tuple[int, ...] = request.param
    return value


def make_qkv(
    shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0, strided: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v of a SHAPES entry; ``strided``: views as models make them (heads after length)."""
    batch, heads, kv_heads, n_q, n_k, dim, dim_v = shape
    rng = np.random.default_rng([seed, *shape])
    sizes = [(n_q, heads, dim), (n_k, kv_heads, dim), (n_k, kv_heads, dim_v)]
    q, k, v = (rng.standard_normal((batch, *s)).astype(dtype).swapaxes(1, 2) for s in sizes)
    if not strided:
        q, k, v = map(np.ascontiguousarray, (q, k, v))
    return q, k, v


def assert_no_worse(
    ours: np.ndarray, want: np.ndarray, *, than: np.ndarray, factor: float = 2.0, plus: float = 0.0
) -> None:
    """Our error against float64 is at most ``factor`` times the naive run's in our own type, plus
    one ulp of the largest value, and below the project's ceilings; float64 has the ceilings alone.
    ``plus``: rounding that the naive run does not have, with its reason where it is given."""
    assert_within_ceiling(ours, want)
    finite = np.isfinite(want)
    if finite.any() and ours.dtype == np.float32:
        wanted = want[finite]
        error, naive = (np.abs(x[finite] - wanted).max() for x in (ours, than))
        bound = factor * naive + np.spacing(np.float32(np.abs(wanted).max())) + plus
        assert error <= bound, f"error {error:.3g}, naive {naive:.3g}"


def assert_within_ceiling(ours: np.ndarray, want: np.ndarray) -> None:
    """|error| / (1 + |value|) is below the project's ceiling; infinities stand in place."""
    assert ours.shape == want.shape
    finite = np.isfinite(want)
    np.testing.assert_array_equal(ours[~finite], want[~finite].astype(ours.dtype))
    error = np.abs(ours[finite].astype(want.dtype) - want[finite]) / (1 + np.abs(want[finite]))
    assert (error <= CEILING[ours.dtype]).all(), f"relative error {error.max():.3g}"


# ---- cases out of the registry: a new variant is in all of them by its ``examples`` -------------


def every_spec() -> list[Variant]:
    """Every example of every variant; of one-spec-a-layer, the specs of the layers."""
    specs: list[Variant] = []
    for cls in variants().values():
        for spec in map(sa.parse, cls.examples):
            specs += spec.children if isinstance(spec, sa.PerLayer) else [spec]
    return list(dict.fromkeys(specs))


def fit(spec: Variant, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, with as many heads as a spec that names heads asks for."""
    if not isinstance(spec, sa.PerHead):
        return shape
    return (shape[0], len(spec.specs), 2, *shape[3:])


def make_layout(spec: Variant, shape: tuple[int, ...]) -> np.ndarray:
    _, heads, _, n_q, n_k, *_ = shape
    block = spec.block
    size = (heads, -(-n_q // block), -(-n_k // block))
    layout = np.random.default_rng(list(size)).random(size) < 0.6
    layout[:, -1] = False  # rows that see nothing
    layout[-1, :, 0] = True  # one head where every row sees something
    return layout


PARAMS: dict[str, Callable[[Variant, tuple[int, ...]], np.ndarray]] = {"layout": make_layout}


def make_params(spec: Variant, shape: tuple[int, ...]) -> dict[str, np.ndarray] | None:
    return {name: PARAMS[name](spec, shape) for name in spec.arrays} or None


@functools.cache
def causals(spec: Variant) -> tuple[bool | str, ...]:
    """The alignments that a spec takes: a bare window refuses to go without, prefix-LM with."""
    shape = fit(spec, SHAPES[0])
    q, k, _ = make_qkv(shape)
    taken: list[bool | str] = []
    for causal in (False, True, "top_left"):
        try:
            sa.plan(q, k, spec, params=make_params(spec, shape), causal=causal)
            taken.append(causal)
        except sa.ArgumentError as error:
            assert "causal" in str(error)
    return tuple(taken)


EVERY_SPEC = every_spec()
SPECS = [spec for spec in EVERY_SPEC if True in causals(spec)]  # what a causal call takes
CAUSAL_SPECS = [(spec, causal) for spec in EVERY_SPEC for causal in causals(spec)]
causal_ids = [f"{spec}-{causal}" for spec, causal in CAUSAL_SPECS]


def random_masks(shape: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    """A mask with empty rows and a padding mask with one wholly padded entry (but for batch 1)."""
    batch, heads, _, n_q, n_k, *_ = shape
    rng = np.random.default_rng([seed, *shape])
    mask = rng.random((batch, heads, n_q, n_k)) < 0.7
    mask[..., n_q // 2, :] = False
    key_mask = np.arange(n_k) >= np.arange(batch)[:, None] * n_k
    key_mask[0, n_k // 3 : n_k // 2] = False
    return {"mask": mask, "key_mask": key_mask}


def full_row(spec: Variant, heads: int) -> np.ndarray:
    """Per head: weights are normalised over the full row (selection after the softmax)."""
    specs = spec.specs if isinstance(spec, sa.PerHead) else [spec] * heads
    return np.array([getattr(one, "placement", "pre") == "post" for one in specs])


_found: dict[bytes, Any] = {}


def once(function: Callable[..., Any], *arrays: np.ndarray, **terms: Any) -> Any:
    """``function(*arrays, **terms)`` of the reference; kept, since every ISA asks for the same."""
    sha = hashlib.sha256(function.__qualname__.encode())
    for name, x in (*enumerate(arrays), *terms.items()):
        if isinstance(x, np.ndarray):
            sha.update(f"{name} {x.dtype} {x.shape}".encode())
            sha.update(np.ascontiguousarray(x))
        else:
            sha.update(f"{name} {x!r}".encode())
    if len(_found) > 700:
        _found.clear()
    if sha.digest() not in _found:
        _found[sha.digest()] = function(*arrays, **terms)
    return _found[sha.digest()]


def expected_rows(
    spec: Variant, q: Any, k: Any, call: dict[str, Any], **terms: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """The keys kept by the plan, and those of the normaliser where they are others."""
    kept = sa.plan(q, k, spec, **call, **terms).to_mask()
    post = full_row(spec, q.shape[1])
    if not post.any():
        return kept, None
    masks = {name: call[name] for name in ("causal", "mask", "key_mask") if name in call}
    see = ref.visible(*kept.shape, **masks)
    return kept, np.where(post[:, None, None], see, kept)
