"""Small calls through everything public that computes, and small calls that must be refused: what
the tests of faults, leaks, threads, forks and interrupts run. The same inputs give the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from conftest import make_qkv

import sparseattn as sa
from sparseattn import _core

Call = Callable[[], Any]
SHAPE = (2, 4, 2, 70, 70, 16, 24)


def digest(result: Any) -> str:
    """SHA-256 of all numbers of a result: arrays, plans, text, and whatever holds them."""
    sha = hashlib.sha256()
    for piece in pieces(result):
        sha.update(piece)
    return sha.hexdigest()


def pieces(result: Any) -> Iterator[bytes]:
    if isinstance(result, sa.Plan):
        yield result.to_mask().tobytes()
    elif isinstance(result, tuple | list):
        for part in result:
            yield from pieces(part)
    elif isinstance(result, np.ndarray):
        yield f"{result.dtype}{result.shape}".encode() + result.tobytes()
    else:
        yield repr(result).encode()


def decode(spec: str, q: Any, k: Any, v: Any, dtype: str | None = None) -> list[Any]:
    """Three steps of a cache, the last but one taken back and chosen among, and its state."""
    cache, outs = sa.Cache(spec, dtype, rollback=2), []
    for rows in (slice(0, 60), slice(60, 61), slice(61, 63)):
        x = (a[:, :, rows] for a in (q, k, v))
        outs.append(sa.attention(*x, causal=True, cache=cache))
    cache.crop(-2)
    cache.reorder_cache([1, 0])
    other = sa.Cache(spec, rollback=2).restore(cache.snapshot())
    outs.append(sa.attention(*(a[:, :, 61:63] for a in (q, k, v)), causal=True, cache=other))
    return outs


def backward(dout: Any, *args: Any, **how: Any) -> list[Any]:
    vjp = sa.attention_vjp(*args, **how)
    return [vjp.out, vjp.lse, *vjp.pullback(dout)[:3]]


def merging(parts: list[Any], dout: Any) -> list[Any]:
    out, lse, pullback = sa.merge_vjp(parts)
    return [out, lse, *sa.merge(parts), *map(list, pullback(dout, lse))]


def calls() -> dict[str, Call]:
    """Name to call; each takes a few milliseconds and gives the same numbers whenever it runs."""
    q, k, v = make_qkv(SHAPE)
    half = tuple(x.astype(np.float16) for x in (q, k, v))
    rng = np.random.default_rng(3)
    mask, key_mask = rng.random((2, 4, 70, 70)) < 0.6, rng.random((2, 70)) < 0.8
    bias, dout = rng.standard_normal((4, 70, 70), np.float32), np.ones((2, 4, 70, 24), np.float32)
    layout, cu = rng.random((4, 2, 2)) < 0.7, np.array([0, 9, 9, 40, 70])
    one = make_qkv((1, 1, 1, 3, 9000, 16, 16))
    topk = sa.plan(q, k, "topk:5", causal=True)
    parts = [sa.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in np.s_[:30, 30:]]
    logits, u = rng.standard_normal((3, 500), np.float32), rng.random(3)
    run = sa.attention
    return {
        "dense": lambda: run(q, k, v, causal=True, return_lse=True),
        "window": lambda: run(q, k, v, "window:9:sinks=2", causal=True),
        "topk": lambda: run(q, k, v, "topk:5", causal=True),
        "random": lambda: run(q, k, v, "random:5:seed=2", causal=True),
        "blockmask": lambda: run(q, k, v, "blockmask:64", params={"layout": layout}),
        "perhead": lambda: run(q, k, v, "perhead(2*window:9|2*topk:5)", causal=True),
        "combined": lambda: run(q, k, v, "window:9+topk:3", mask=mask, causal=True),
        "masks": lambda: run(q, k, v, mask=mask, key_mask=key_mask, bias=bias, softcap=5.0),
        "dropout": lambda: run(q, k, v, dropout_p=0.3, seed=5, params={"sink": np.ones(4, "f4")}),
        "packed": lambda: run(q, k, v, "topk:5", causal=True, cu_seqlens=cu),
        "half": lambda: run(*half, "topk:5", causal=True),
        "few rows": lambda: run(*one),
        "plan": lambda: run(q, k, v, topk),
        "weights": lambda: run(q, k, v, "topk:5", return_weights=True, causal=True),
        "topn": lambda: run(q, k, v, return_weights="topn:3", causal=True),
        "mass": lambda: run(q, k, v, return_weights="mass", causal=True),
        "mass, one head": lambda: run(*one, return_weights="mass"),
        "backward": lambda: backward(dout, q, k, v, bias=bias, causal=True),
        "backward of half": lambda: backward(dout.astype(np.float16), *half, causal=True),
        "backward of topk": lambda: backward(dout, q, k, v, "topk:5", causal=True),
        "making plans": lambda: [
            sa.plan(q, k, "topk:5&window:20", causal=True),
            sa.Plan.from_mask(mask),
            sa.Plan.from_intervals(0, np.arange(1, 71), 70),
            sa.Plan.from_documents([1] * 9 + [4] * 20),
        ],
        "counts": lambda: sa.plan(q, k, "window:9", mask=mask, causal=True).count(),
        "decode": lambda: decode("dense", q, k, v),
        "decode topk": lambda: decode("topk:5", q, k, v),
        "decode half": lambda: decode("window:9", q, k, v, "bfloat16"),
        "merge": lambda: merging(parts, dout),
        "sampling": lambda: [
            _core.sample(logits, u, 0.7, 50, 0.9),
            _core.nll(logits, np.array([3, 499, 0], np.int32)),
            _core.kl(logits, logits[::-1].copy()),
        ],
        "scores": lambda: _core.score_rows(q, k, (1, 0.25, 0.0, None, None, None), 0, 1, 3, 9),
    }


def model_calls() -> dict[str, Call]:
    """The same through the model that the package carries: all operators of models."""
    model = sa.Model.from_pretrained()
    ids = np.arange(1, 41)
    how = {"max_new_tokens": 3, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    return {
        "model": lambda: model(ids, attention="topk:8"),
        "generate": lambda: model.generate("The list of", **how),
    }


def refused_calls() -> dict[str, Call]:
    """Calls that end in an error of the package, each found at another depth."""
    q, k, v = make_qkv(SHAPE)
    run, plan = sa.attention, sa.plan(q, k, "topk:5", causal=True)
    good = plan.pieces[0].core.arrays()
    cache = sa.Cache("window:9")
    sa.attention(q, k, v, causal=True, cache=cache)
    target = np.array([3, 500], np.int32)
    return {
        "dtype": lambda: run(q.astype(int), k, v),
        "two dtypes": lambda: run(q.astype("f8"), k, v),
        "shape": lambda: run(q, k[..., :3], v),
        "heads": lambda: run(q[:, :3], k, v),
        "spec": lambda: run(q, k, v, "topk:0"),
        "word": lambda: run(q, k, v, "tpok:3"),
        "keyword": lambda: run(q, k, v, is_causal=True),
        "mask": lambda: run(q, k, v, mask=np.ones((3, 3), bool)),
        "scale": lambda: run(q, k, v, scale=float("nan")),
        "params": lambda: run(q, k, v, "blockmask:64", params={"layout": np.ones((1, 9), bool)}),
        "cu_seqlens": lambda: run(q, k, v, cu_seqlens=[0, 80]),
        "out": lambda: run(q, k, v, out=q),
        "plan of another call": lambda: run(q[:, :, :9], k, v, plan),
        "plan arrays": lambda: _core.plan_from_arrays(good | {"start": good["start"] + 999}),
        "intervals": lambda: sa.Plan.from_intervals(np.full(3, 5), 2, 70),
        "documents": lambda: sa.Plan.from_documents([1.5]),
        "cotangent": lambda: sa.attention_vjp(q, k, v).pullback(q[:1]),
        "merge": lambda: sa.merge([]),
        "crop": lambda: cache.crop(3),
        "cache": lambda: run(q[:1], k[:1], v[:1], cache=cache),
        "reorder": lambda: cache.reorder_cache([0, 7]),
        "target": lambda: _core.nll(np.zeros((2, 500), np.float32), target),
        "sample": lambda: _core.sample(np.full((1, 9), np.nan, "f4"), np.zeros(1), 1.0, 0, 1.0),
        "linear": lambda: _core.linear(*(np.zeros((2, 3), "f4"),) * 2, None, q[0, 0], False),
    }


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for a while."""
    before = sa.get_num_threads()
    sa.set_num_threads(count)
    try:
        yield
    finally:
        sa.set_num_threads(before)
