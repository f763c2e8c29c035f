"""A child process that times one kind of thing at a time, on request.

The parent starts one worker per library and thread count and asks them in turn, because the thread
pools of two libraries in one process disturb each other. A request is one JSON line
``{"job": name, "args": {...}, "seconds": s}``; the answer is ``{"value": seconds per call,
"calls": n}`` or ``{"error": text}``.
"""

from __future__ import annotations

import ctypes
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Call = Callable[[], Any]


def qkv(
    heads: int,
    n_q: int,
    n_k: int,
    dim: int,
    kv_heads: int | None = None,
    *,
    with_dout: bool = False,
) -> list[np.ndarray]:
    """Unit-normal float32 q, k, v of one batch, and dout."""
    rng = np.random.default_rng(0)
    rows = [(heads, n_q), (kv_heads or heads, n_k), (kv_heads or heads, n_k)]
    rows += [(heads, n_q)] * with_dout
    return [rng.standard_normal((1, h, n, dim), dtype=np.float32) for h, n in rows]


@functools.lru_cache(maxsize=4)
def cached(heads: int, n: int, dim: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Unit-normal k and v of one batch in a storage type, bfloat16 as its bits."""
    rng = np.random.default_rng(1)
    k, v = (rng.standard_normal((1, heads, n, dim), dtype=np.float32) for _ in range(2))
    if dtype == "bfloat16":
        k, v = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (k, v))
        return k, v
    return k.astype(dtype, copy=False), v.astype(dtype, copy=False)


def decode(heads: int, n: int, dim: int = 64, group: int = 1, dtype: str = "float32") -> Call:
    """One query row of ``group`` query heads to each of ``heads`` key heads; the plan is made."""
    import sparseattn as sa
    from sparseattn import _core
    from sparseattn.variants.base import Problem

    k, v = cached(heads, n, dim, dtype)
    q = np.random.default_rng(0).standard_normal((1, heads * group, 1, dim), dtype=np.float32)
    problem = Problem(scale=dim**-0.5)
    plan = _core.plan_build("dense", sa.Dense(), None, q, k, problem)
    out = np.empty_like(q)
    return lambda: _core.attend(q, k, v, plan, problem, out, None)


def decode_call(heads: int, n: int, dim: int = 64, spec: str = "dense") -> Call:
    """The same as a user calls it, planning included."""
    import sparseattn as sa

    k, v = cached(heads, n, dim, "float32")
    q = np.random.default_rng(0).standard_normal((1, heads, 1, dim), dtype=np.float32)
    chosen = sa.parse(spec)
    return lambda: sa.attention(q, k, v, chosen)


def read(heads: int, n: int, threads: int, dim: int = 64) -> Call:
    """A plain sum over the keys and values of ``decode``."""
    from sparseattn import _core

    k, v = cached(heads, n, dim, "float32")
    return lambda: _core.bench_read(k, v, threads)


def layout(heads: int, n: int, block: int, share: float) -> np.ndarray:
    """A random block layout with the same number of live blocks in every row."""
    rng = np.random.default_rng(1)
    blocks = n // block
    live = max(1, round(share * blocks))
    rows = [rng.permutation(blocks) < live for _ in range(heads * blocks)]
    return np.array(rows).reshape(heads, blocks, blocks)


def ours(
    heads: int, n: int, dim: int, causal: bool = False, spec: str | None = None, share: float = 0.0
) -> Call:
    """sparseattn.attention; the plan of a pattern is built outside the timed call."""
    import sparseattn as sa

    q, k, v = qkv(heads, n, n, dim)
    out = np.empty_like(q)
    params = {"layout": layout(1, n, 64, share)} if share else None
    plan = sa.plan(q, k, sa.parse(spec or "dense"), causal=causal, params=params)
    return lambda: sa.attention(q, k, v, plan, causal=causal, out=out)


def grad(
    heads: int, n: int, dim: int, causal: bool = False, spec: str | None = None, share: float = 0.0
) -> Call:
    """The kernels of the backward, into arrays that are there; plan and forward are not timed."""
    import sparseattn as sa
    from sparseattn import _core

    q, k, v, dout = qkv(heads, n, n, dim, with_dout=True)
    params = {"layout": layout(1, n, 64, share)} if share else None
    plan = sa.plan(q, k, sa.parse(spec or "dense"), causal=causal, params=params)
    out, lse = sa.attention(q, k, v, plan, causal=causal, return_lse=True)
    delta, into = np.empty_like(lse), [np.empty_like(x) for x in (q, k, v)]
    (piece,) = plan.pieces

    def call() -> None:
        _core.attend_delta(out, dout, None, delta)
        _core.attend_grad(q, k, v, piece.core, plan.problem, dout, lse, delta, *into, None)

    return call


def grad_call(heads: int, n: int, dim: int, causal: bool = False, spec: str | None = None) -> Call:
    """The pullback of sparseattn.attention_vjp as a user calls it; the forward is not timed."""
    import sparseattn as sa

    q, k, v, dout = qkv(heads, n, n, dim, with_dout=True)
    vjp = sa.attention_vjp(q, k, v, spec, causal=causal)
    return lambda: vjp.pullback(dout)


def ours_call(heads: int, n: int, dim: int, causal: bool = False, spec: str | None = None) -> Call:
    """sparseattn.attention as a user calls it: planning included."""
    import sparseattn as sa

    q, k, v = qkv(heads, n, n, dim)
    chosen = sa.parse(spec or "dense")
    return lambda: sa.attention(q, k, v, chosen, causal=causal)


def weights(heads: int, n: int, dim: int, word: str | bool) -> Call:
    """A causal call that gives weights as ``word`` says; False: the forward alone."""
    import sparseattn as sa

    q, k, v = qkv(heads, n, n, dim)
    out = np.empty_like(q)
    plan = sa.plan(q, k, causal=True)
    return lambda: sa.attention(q, k, v, plan, causal=True, out=out, return_weights=word)


def sgemm(n: int = 1024, threads: int = 1) -> Call:
    """OpenBLAS's own sgemm, n x n x n, from the library that the package carries."""
    import sparseattn

    folder = pathlib.Path(sparseattn.__file__).parent / "_libs"
    blas = ctypes.CDLL(str(next(folder.glob("libscipy_openblas*"))))
    blas.scipy_openblas_set_num_threads(ctypes.c_int(threads))
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((n, n), dtype=np.float32) for _ in range(2))
    c = np.empty((n, n), np.float32)
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    pointers = [x.ctypes.data_as(ctypes.c_void_p) for x in (a, b, c)]

    def call() -> None:
        blas.scipy_cblas_sgemm(
            101, 111, 111, n, n, n, one, pointers[0], n, pointers[1], n, zero, pointers[2], n
        )

    call.keep = (a, b, c)  # type: ignore[attr-defined]
    return call


def fma(threads: int = 1) -> Call:
    """The register-only loop: returns flops per second."""
    from sparseattn import _core

    return lambda: _core.bench_fma(200_000, threads)


def dispatch(tasks: int = 2) -> Call:
    """Seconds of one empty parallel region, warm."""
    from sparseattn import _core

    return lambda: _core.bench_dispatch(2_000, tasks)


def select(n: int, count: int, quick: bool = False) -> Call:
    """Exact top-k of rows of n normal scores: ours, or quickselect on a copy."""
    from sparseattn import _core

    rows = np.random.default_rng(0).standard_normal((16, n), dtype=np.float32)
    return lambda: _core.bench_select(rows, count, quick)


def idle(heads: int, n: int, dim: int, causal: bool = False, of: str = "ours") -> Call:
    """One call of another job after 60 ms of sleep; the sleep is not timed."""
    call = JOBS[of](heads, n, dim, causal)

    def timed() -> float:
        time.sleep(0.06)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timed


def error(n: int, dim: int, causal: bool, backward: bool) -> Call:
    """Largest error of out, or of dq, dk and dv, against float64; two heads."""
    import exact

    import sparseattn as sa

    q, k, v, dout = qkv(2, n, n, dim, with_dout=True)
    out, grads = exact.attention(q, k, v, sa.plan(q, k, causal=causal).to_mask(), dout)

    def call() -> float:
        vjp = sa.attention_vjp(q, k, v, causal=causal)
        ours = vjp.pullback(dout)[:3] if backward else (vjp.out,)
        return exact.largest_error(ours, grads if backward else (out,))

    return call


def torch_sdpa(heads: int, n: int, dim: int, causal: bool = False, window: int = 0) -> Call:
    """PyTorch's scaled_dot_product_attention; window: through a boolean mask."""
    import torch

    q, k, v = (torch.from_numpy(x) for x in qkv(heads, n, n, dim))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if not window:
        return lambda: sdpa(q, k, v, is_causal=causal)
    at = torch.arange(n)
    mask = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - window)
    return lambda: sdpa(q, k, v, attn_mask=mask)


def torch_decode(heads: int, n: int, dim: int = 64) -> Call:
    """PyTorch's fused kernel on one query row over the same cache as `decode`."""
    import torch

    q = np.random.default_rng(0).standard_normal((1, heads, 1, dim), dtype=np.float32)
    k, v = (torch.from_numpy(a) for a in cached(heads, n, dim, "float32"))
    sdpa, row = torch.nn.functional.scaled_dot_product_attention, torch.from_numpy(q)
    return lambda: sdpa(row, k, v)


def torch_grad(heads: int, n: int, dim: int, causal: bool = False) -> Call:
    """The gradients of q, k and v by PyTorch's autograd; the forward is not timed."""
    import torch

    *inputs, dout = (torch.from_numpy(x) for x in qkv(heads, n, n, dim, with_dout=True))
    for x in inputs:
        x.requires_grad_()
    out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def torch_flex(heads: int, n: int, dim: int, window: int) -> Call:
    """Compiled FlexAttention with a causal window; the first call compiles and is not timed."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (torch.from_numpy(x) for x in qkv(heads, n, n, dim))

    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & (j > i - window)

    blocks = create_block_mask(mask_mod, None, None, n, n, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=blocks)


JOBS: dict[str, Callable[..., Call]] = {
    f.__name__: f
    for f in (
        *(ours, ours_call, grad, grad_call, weights, sgemm, fma, dispatch, select, idle, error),
        *(decode, decode_call, read),
        *(torch_sdpa, torch_decode, torch_grad, torch_flex),
    )
}
REPORTS_ITSELF = {"fma", "dispatch", "select", "idle", "error"}


def measure(name: str, call: Call, seconds: float) -> dict[str, Any]:
    """Time per call over at least ``seconds``, or what the call reports of itself."""
    calls, total, reports = 0, 0.0, []
    begin = time.perf_counter()
    while calls == 0 or total < seconds:
        answer = call()
        if name in REPORTS_ITSELF:
            reports.append(answer)
        del answer  # the next call may have its memory
        calls += 1
        total = time.perf_counter() - begin
    return {"value": float(np.median(reports)) if reports else total / calls, "calls": calls}


def main() -> None:
    """Serve requests until standard input closes."""
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    if "torch" in sys.argv[2:]:
        import torch

        torch.set_num_threads(threads)
    else:
        import sparseattn as sa

        sa.set_num_threads(threads)
    ready: dict[str, Call] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = json.dumps([request["job"], request["args"]], sort_keys=True)
        try:
            if key not in ready:
                ready[key] = JOBS[request["job"]](**request["args"])
                ready[key]()
            answer = measure(request["job"], ready[key], request["seconds"])
        except Exception as error:  # the parent prints it beside the row
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
