"""Index arrays under attack: another thread of the caller's rewrites them while they are read. What
a call uses is a checked copy, or one number read once, so it gives a result or an error of the
package and never leaves its memory: red zones stand (and AddressSanitizer, where it is loaded, is
silent)."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from core_calls import NK, NQ, B, H, attend, build, make, problem

import sparseattn as sa
from sparseattn import _core

pytestmark = pytest.mark.promise("B4")

Victim = tuple[Callable[[], Any], list[np.ndarray]]


def plan_arrays(name: str) -> Victim:
    """A plan of arrays, then what it shows: what was accepted must be a plan all through."""
    q, k, v = make()
    arrays = build(name, q, k).arrays()
    given = [a for a in arrays.values() if isinstance(a, np.ndarray)]

    def call() -> None:
        plan = _core.plan_from_arrays(arrays)
        _core.plan_from_arrays(plan.arrays())
        attend(q, k, v, plan, problem(0))
        plan.to_mask()

    return call, given


def plan_intervals() -> Victim:
    lo, hi = np.zeros((B, NQ), np.int64), np.full((B, NQ), NK)
    q, k, v = make()

    def call() -> None:
        plan = _core.plan_from_intervals(lo, hi, NK, B, H)
        _core.plan_from_arrays(plan.arrays())
        attend(q, k, v, plan, problem(0))

    return call, [lo, hi]


def masks(name: str, key_mask: bool) -> Victim:
    """Padding and masks are no indices, but what they show sizes lists and ends scans."""
    q, k, v = make()
    mask = np.ones((B, NK) if key_mask else (B, H, NQ, NK), bool)
    terms = (None, None, mask) if key_mask else (mask, None, None)

    def call() -> None:
        plan = build(name, q, k, problem(1, *terms))
        out, lse = attend(q, k, v, plan, problem(1, *terms))
        plan.count(2)
        plan.to_mask()
        values, index = np.empty((B, H, NQ, 5), "f4"), np.empty((B, H, NQ, 5), np.int64)
        _core.attend_topn(q, k, v, plan, problem(1, *terms), lse, values, index)
        assert index.min() >= -1 and index.max() < NK and np.isfinite(out).all()

    return call, [mask]


def layout() -> Victim:
    q, k, v = make()
    blocks = np.ones((H, 5, 9), bool)
    how: dict[str, Any] = {"params": {"layout": blocks}}
    return lambda: sa.attention(q, k, v, "blockmask:16", **how), [blocks]


def combined() -> Victim:
    _q, _k, _v = make()
    mask = np.ones((B, H, NQ, NK), bool)
    a = _core.plan_from_mask(mask)

    def call() -> None:
        for op in ("union", "intersection"):
            plan = _core.plan_combine(a, _core.plan_from_mask(mask), op)
            _core.plan_from_arrays(plan.arrays())

    return call, [mask]


def cu_seqlens() -> Victim:
    q, k, v = make()
    cu_q, cu_k = np.array([0, 9, 30, NQ]), np.array([0, 50, 60, NK])
    return lambda: sa.attention(q, k, v, "topk:5", cu_seqlens=(cu_q, cu_k)), [cu_q, cu_k]


def documents() -> Victim:
    ids = np.arange(NQ) // 9
    return lambda: sa.Plan.from_documents(ids).to_mask(), [ids]


def reorder() -> Victim:
    q, k, v = (x[:, :, :9] for x in make())
    cache, index = sa.Cache(), np.array([0, 1])
    cache.append(k, v)
    return lambda: (cache.reorder_cache(index), sa.attention(q, k, v, cache=cache)), [index]


def positions() -> Victim:
    x, pos = np.ones((300, 2, 8), np.float32), np.zeros(300, np.int32)
    cos = np.ones((40, 4), np.float32)
    return lambda: _core.rope(x, cos, cos, pos), [pos]


def targets() -> Victim:
    logits, target = np.ones((300, 40), np.float32), np.zeros(300, np.int32)
    return lambda: _core.nll(logits, target), [target]


def tokens() -> Victim:
    model = sa.Model.from_pretrained()
    ids = np.arange(20)
    return lambda: model(ids), [ids]


def scores(n: int) -> Victim:
    """No indices either, but as many indices as there are scores above a level."""
    s = np.full(n, -np.inf, np.float32)

    def call() -> None:
        index = _core.select_largest(s, 7)
        assert index.size <= 7 and (index < n).all()

    return call, [s]


def logits() -> Victim:
    x, u = np.zeros((4, 3000), np.float32), np.full(4, 0.5)

    def call() -> None:
        token = _core.sample(x, u, 0.7, 50, 0.9)
        assert token.min() >= 0 and token.max() < 3000

    return call, [x, u]


VICTIMS: dict[str, Callable[[], Victim]] = {
    "arrays of dense": lambda: plan_arrays("dense"),
    "arrays of window": lambda: plan_arrays("window"),
    "arrays of topk": lambda: plan_arrays("topk"),
    "intervals": plan_intervals,
    "mask": lambda: masks("dense", False),
    "mask of topk": lambda: masks("topk", False),
    "key_mask": lambda: masks("window", True),
    "key_mask of topk": lambda: masks("topk", True),
    "layout": layout,
    "combined": combined,
    "cu_seqlens": cu_seqlens,
    "documents": documents,
    "reorder_cache": reorder,
    "positions": positions,
    "targets": targets,
    "tokens": tokens,
    "scores": lambda: scores(900),
    "many scores": lambda: scores(9000),
    "logits": logits,
}


def noise(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random numbers of an array's dtype: mostly of its own size, some of any."""
    if array.dtype.kind == "f":
        return rng.choice(np.array([-np.inf, 0.5, 7, np.inf], array.dtype), array.shape)
    if array.dtype == bool:
        return rng.random(array.shape) < rng.choice([0.02, 0.5, 0.98])
    wide = np.iinfo(array.dtype)
    some = rng.integers(-1, 140, array.shape)
    return np.where(rng.random(array.shape) < 0.1, rng.integers(wide.min, wide.max), some).astype(
        array.dtype
    )


@contextmanager
def rewriting(arrays: list[np.ndarray]) -> Iterator[threading.Lock]:
    """A thread writes honest and random numbers over the arrays, one after the other, all along;
    but for who holds the lock, who sees honest ones."""
    rng = np.random.default_rng(1)
    scripts = [(array, [array.copy(), *(noise(array, rng) for _ in range(8))]) for array in arrays]
    done, honest = threading.Event(), threading.Lock()

    def rewrite() -> None:
        while not done.is_set():
            with honest:
                for array, script in scripts:
                    array[...] = script[rng.integers(len(script))]
                    array[...] = script[0]

    thread = threading.Thread(target=rewrite)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        yield honest
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", VICTIMS)
def test_rewritten_arrays_lead_nowhere(name: str, count: int) -> None:
    call, arrays = VICTIMS[name]()
    call()
    breaches = _core.breaches()
    with rewriting(arrays) as honest:
        for i in range(count):
            if i % 50 == 0:
                with honest:
                    call()
            try:
                call()
            except sa.SparseAttnError as error:
                assert not isinstance(error, sa.InternalError), error
    _core.trim()
    assert _core.breaches() == breaches
    call()  # the honest numbers are back
