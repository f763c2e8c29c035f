"""The same bits whatever the number of threads, by SHA-256 of outputs and gradients."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
from conftest import CAUSAL_SPECS, causal_ids, fit, make_params, make_qkv
from public_calls import calls, digest, model_calls

import sparseattn as sa
from sparseattn.variants import Variant

pytestmark = pytest.mark.promise("C5")

COUNTS = (1, 2, 3, 4, 7, 8)
SHAPE = (1, 4, 2, 200, 300, 16, 24)  # more tasks than threads, of any pass


def gradient_hash(spec: Variant, causal: bool | str) -> str:
    shape = fit(spec, SHAPE)
    q, k, v = make_qkv(shape)
    rng = np.random.default_rng(4)
    bias = rng.standard_normal((shape[1], *shape[3:5]), np.float32)
    how = {"causal": causal, "dropout_p": 0.2, "seed": 3}
    vjp = sa.attention_vjp(q, k, v, spec, params=make_params(spec, shape), bias=bias, **how)
    dout = rng.standard_normal(vjp.out.shape, np.float32)
    sha = hashlib.sha256()
    for array in (vjp.out, vjp.lse, *vjp.pullback(dout, np.ones_like(vjp.lse))[:4]):
        sha.update(array.tobytes())
    return sha.hexdigest()


@contextmanager
def load() -> Iterator[None]:
    """Two threads that keep the machine busy."""
    done = threading.Event()
    x = np.random.default_rng(0).standard_normal((300, 300))

    def work() -> None:
        while not done.is_set():
            x @ x

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        done.set()
        for worker in workers:
            worker.join()


@pytest.mark.parametrize(("spec", "causal"), CAUSAL_SPECS, ids=causal_ids)
def test_threads_change_no_bit(
    spec: Variant, causal: bool | str, with_threads: Callable[[int], None]
) -> None:
    hashes = set()
    for count in COUNTS:
        with_threads(count)
        hashes.add(gradient_hash(spec, causal))
    assert len(hashes) == 1


@pytest.mark.parametrize("entry", [*calls(), *model_calls()])
def test_threads_change_no_bit_of_other_calls(
    entry: str, with_threads: Callable[[int], None]
) -> None:
    call = (calls() | model_calls())[entry]
    hashes = set()
    for count in COUNTS:
        with_threads(count)
        hashes.add(digest(call()))
    assert len(hashes) == 1


def hashes_of_twenty(
    hash_of: Callable[[], str], busy: bool, with_threads: Callable[[int], None]
) -> set[str]:
    hashes = set()
    with load() if busy else nullcontext():
        for _ in range(20):
            for count in (*COUNTS, 16):
                with_threads(count)
                hashes.add(hash_of())
    return hashes


BUSY = pytest.mark.parametrize("busy", [False, True], ids=["alone", "under load"])


@pytest.mark.nightly
@BUSY
@pytest.mark.parametrize(("spec", "causal"), CAUSAL_SPECS, ids=causal_ids)
def test_twenty_times_the_same(
    spec: Variant, causal: bool | str, busy: bool, with_threads: Callable[[int], None]
) -> None:
    assert len(hashes_of_twenty(lambda: gradient_hash(spec, causal), busy, with_threads)) == 1


@pytest.mark.nightly
@BUSY
@pytest.mark.parametrize("entry", [*calls(), *model_calls()])
def test_twenty_times_the_same_of_other_calls(
    entry: str, busy: bool, with_threads: Callable[[int], None]
) -> None:
    call = (calls() | model_calls())[entry]
    assert len(hashes_of_twenty(lambda: digest(call()), busy, with_threads)) == 1
