"""Small calls straight into the C core, shared by the tests of the boundary."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from sparseattn import _core

Array = np.ndarray
B, H, G, NQ, NK, D, DV = 2, 4, 2, 70, 130, 16, 24


def make(dtype: Any = np.float32, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    shapes = [(B, H, NQ, D), (B, G, NK, D), (B, G, NK, DV)]
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return q, k, v


def problem(causal: int = 1, mask: Any = None, bias: Any = None, key_mask: Any = None) -> Any:
    return (causal, 0.25, 0.0, mask, bias, key_mask)


def spec_of(name: str) -> tuple[object, dict[str, Array]]:
    """Options for a record of any name, from its own description: 64 wherever it may stand."""
    fields: dict[str, Any] = {}
    params: dict[str, Array] = {}
    for field, kind, low, high, words in _core.describe(name):
        if kind == "int":
            fields[field] = int(min(max(64, low), high))
        elif kind == "array":
            params[field] = np.ones((1, -(-NQ // 64), -(-NK // 64)), bool)
        else:
            plain = {"float": low, "bool": False, "ints": (), "enum": words and words[0]}
            fields[field] = plain[kind]
    return SimpleNamespace(**fields), params


def build(name: str, q: Array, k: Array, of: Any = None) -> _core.Plan:
    spec, params = spec_of(name)
    return _core.plan_build(name, spec, params, q, k, problem() if of is None else of)


def attend(
    q: Array, k: Array, v: Array, parts: Any = None, of: Any = None, out: Any = None
) -> tuple[Array, Array]:
    of = problem() if of is None else of
    if parts is None:
        parts = build("dense", q, k, of)
    if out is None:
        out = np.empty((*q.shape[:3], v.shape[3]), q.dtype)
    lse = np.empty(q.shape[:3], q.dtype)
    _core.attend(q, k, v, parts, of, out, lse)
    return out, lse


def attend_grad(q: Array, k: Array, v: Array, parts: Any, dbias: bool = False) -> list[Array]:
    """dq, dk, dv and perhaps dbias, for a dout that is out itself."""
    bias = np.zeros((B, H, NQ, NK), q.dtype) if dbias else None
    of = problem(bias=bias)
    out, lse = attend(q, k, v, parts, of)
    delta = np.empty_like(lse)
    _core.attend_delta(out, out, None, delta)
    grads = [np.empty_like(x) for x in (q, k, v)] + ([np.zeros_like(bias)] if dbias else [])
    _core.attend_grad(q, k, v, parts, of, out, lse, delta, *grads, *[None] * (4 - len(grads)))
    return grads


def entries() -> dict[str, Callable[[], Any]]:
    """A small call of every entry that allocates."""
    q, k, v = make()
    mask = np.random.default_rng(6).random((B, H, NQ, NK)) < 0.5
    key_mask = np.random.default_rng(7).random((B, NK)) < 0.8
    dense, topk, masked = build("dense", q, k), build("topk", q, k), _core.plan_from_mask(mask)
    intervals = np.zeros((1, NQ), np.int64), np.arange(1, NQ + 1)[None]
    arrays, (out, lse) = topk.arrays(), attend(q, k, v)
    given, index = (q, k, v, dense, problem()), np.empty((B, H, NQ, 5), np.int64)
    calls: dict[str, Callable[[], Any]] = {
        f"build {name}": lambda name=name: build(name, q, k, problem(1, mask, None, key_mask))
        for name in _core.variants()
    }
    return calls | {
        "attend dense": lambda: attend(q, k, v, dense),
        "attend topk": lambda: attend(q, k, v, topk),
        "attend masked": lambda: attend(q, k, v, masked, problem(0)),
        "attend parts": lambda: attend(q, k, v, ((dense, 0, 2), (topk, 2, H))),
        "attend row": lambda: attend(q[:, :, -1:], k, v),
        "mass": lambda: _core.attend_mass(*given, lse, np.empty((B, H, NK), q.dtype)),
        "topn": lambda: _core.attend_topn(*given, lse, np.empty((B, H, NQ, 5), q.dtype), index),
        "attend_grad dense": lambda: attend_grad(q, k, v, dense, dbias=True),
        "attend_grad topk": lambda: attend_grad(q, k, v, topk),
        "merge_grad": lambda: _core.merge_grad(
            *(out, lse, out, lse, out, lse, np.empty_like(out), np.empty_like(lse))
        ),
        "from_mask": lambda: _core.plan_from_mask(mask),
        "from_arrays": lambda: _core.plan_from_arrays(arrays),
        "from_intervals": lambda: _core.plan_from_intervals(*intervals, NK, B, H),
        "pack": lambda: _core.plan_pack((dense, topk, dense), None, None),
        "union": lambda: _core.plan_combine(dense, topk, "union"),
        "intersection": lambda: _core.plan_combine(masked, topk, "intersection"),
        "to_mask": lambda: masked.to_mask(),
        "count": lambda: masked.count(G),
        "merge": lambda: _core.merge((out, out), (lse, lse), np.empty_like(out), None),
        "score_rows": lambda: _core.score_rows(q, k, problem(), 0, 0, 0, NQ),
        "select": lambda: _core.select_largest(np.arange(200.0), 7),
    }
