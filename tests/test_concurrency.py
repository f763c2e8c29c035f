"""Many callers at once get what each gets alone; one cache serves one thread; the GIL is free."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from core_calls import build, problem
from public_calls import calls, digest, model_calls, refused_calls, threads

import sparseattn as sa
from sparseattn import _core


def together(count: int, work: Callable[[int], None]) -> None:
    """``work(i)`` on as many threads, which begin at the same moment; the first error is raised."""
    barrier, errors = threading.Barrier(count), []

    def run(i: int) -> None:
        try:
            barrier.wait(60)
            work(i)
        except BaseException as error:
            errors.append(error)

    runners = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    if errors:
        raise errors[0]


def mixed() -> dict[str, Callable[[], str]]:
    """Everything public on shared arrays, one model among it, and errors in between."""

    def said(call: Callable[[], Any]) -> str:
        try:
            return digest(call())
        except sa.SparseAttnError as error:
            return f"{type(error).__name__}: {error}"

    every = calls() | model_calls()
    every |= {name: call for name, call in refused_calls().items() if name not in ("crop", "cache")}
    return {name: lambda call=call: said(call) for name, call in every.items()}


@pytest.mark.promise("C1")
@pytest.mark.parametrize(
    ("count", "each"),
    [(16, 30), pytest.param(16, 500, marks=pytest.mark.nightly), (128, 1)],
)
def test_concurrent_calls_agree(count: int, each: int) -> None:
    """Bit-equal to the serial results, errors to the word, whoever has the pool."""
    every = mixed()
    names = sorted(every)
    want = {name: every[name]() for name in names}
    wrong = []

    def work(i: int) -> None:
        for at in range(each):
            name = names[(7 * i + at) % len(names)]
            if every[name]() != want[name]:
                wrong.append(name)

    with threads(3):
        together(count, work)
    assert not wrong


@pytest.mark.promise("C1")
def test_one_cache_of_many_threads() -> None:
    """The second caller is refused; what the cache holds is what the accepted calls appended."""
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((8, 1, 2, 1, 64), np.float32)
    cache = sa.Cache()
    first = rng.standard_normal((1, 2, 4000, 64), np.float32)
    sa.attention(first[:, :, -1:], first, first, cache=cache)
    taken: list[int] = []
    refused = []

    def work(i: int) -> None:
        for _ in range(20):
            try:
                sa.attention(steps[i], steps[i], steps[i], causal=True, cache=cache)
                taken.append(i)
            except RuntimeError as error:
                assert isinstance(error, sa.CacheInUse)
                refused.append(i)

    together(8, work)
    assert len(taken) + len(refused) == 160 and taken
    assert cache.get_seq_length() == 4000 + len(taken)
    k = cache.snapshot().held.k[0, :, 4000:]
    held = [
        int(np.flatnonzero((steps[:, 0, :, 0] == row).all((1, 2)))[0]) for row in k.swapaxes(0, 1)
    ]
    assert sorted(held) == sorted(taken)
    fresh = sa.attention(steps[0], steps[0], steps[0], causal=True, cache=cache)
    assert np.isfinite(fresh).all()


# ---- the GIL -------------------------------------------------------------------------------------


def long_call(rows: int = 4096, heads: int = 8) -> Callable[[], Any]:
    q = np.random.default_rng(0).standard_normal((1, heads, rows, 64))
    plan = build("dense", q, q, problem(0))
    out = np.empty_like(q)
    return lambda: _core.attend(q, q, q, plan, problem(0), out, None)


def beats(done: threading.Event) -> Iterator[int]:
    while not done.is_set():
        time.sleep(0.01)
        yield 0


def beat_while(work: Callable[[], Any], least: float = 1) -> float:
    """Beats of a thread that wakes every 10 ms, per second of some seconds of work."""
    done, ticks = threading.Event(), []
    beat = threading.Thread(target=lambda: ticks.extend(beats(done)))
    beat.start()
    start = time.perf_counter()
    while time.perf_counter() - start < least:
        work()
    seconds = time.perf_counter() - start
    done.set()
    beat.join()
    return len(ticks) / seconds


@pytest.mark.promise("C2")
def test_the_gil_is_released() -> None:
    """A thread gets 80 % of its turns while a kernel runs; under a held GIL it gets a few."""
    call, shares = long_call(), []
    with threads(1):
        for _ in range(3):  # other processes may take the CPU in one of them
            shares.append(beat_while(call) / beat_while(lambda: time.sleep(0.3), 0.3))
            if shares[-1] >= 0.8:
                break
    assert max(shares) >= 0.8, shares


@pytest.mark.nightly
@pytest.mark.promise("C2")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPUs")
def test_two_threads_work_at_once() -> None:
    """1.6 times the work of one thread, with a pool of one."""
    calls, gains = [long_call(2048), long_call(2048)], []

    def rate(count: int) -> float:
        start = time.perf_counter()
        together(count, lambda i: [calls[i]() for _ in range(4)] and None)
        return count / (time.perf_counter() - start)

    with threads(1):
        rate(2)
        for _ in range(5):
            gains.append(rate(2) / rate(1))
    assert max(gains) >= 1.6, gains
