"""Random calls of every kernel, to run on one instruction set after the other: what a case is, and
how near two results of it must be.

q and k are coarse, so that scores are exact in float32 and no order of summation decides what is
selected. All numbers are cut from two pools: a million cases are made in little more than the time
their kernels take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from random import Random
from typing import Any

import numpy as np
from conftest import EVERY_SPEC, causals, fit, make_params, random_masks

import sparseattn as sa
from sparseattn import _core
from sparseattn.variants import Variant

Array = np.ndarray
BOUND = {"float32": 2e-6, "float64": 2e-14}  # of (1 + |value|); sums of a hundred terms

_rng = np.random.default_rng(8)
_size = 1 << 19
COARSE = {t: (_rng.integers(-32, 33, _size) / 16).astype(t) for t in BOUND}
NORMAL = {t: _rng.standard_normal(_size).astype(t) for t in BOUND}
HALF = NORMAL["float32"].astype(np.float16)


class Case:
    """A spec on a shape, with masks and terms or without; the same of the same seed."""

    def __init__(
        self, spec: Variant, shape: tuple[int, ...], dtype: str, masked: bool, seed: int
    ) -> None:
        self.spec, self.dtype, self.masked, self.seed = spec, dtype, masked, seed
        self.shape = fit(spec, shape)
        self.rng = Random(seed)
        batch, heads, kv_heads, n_q, n_k, dim, dim_v = self.shape
        self.q = self.cut(COARSE[dtype], batch, heads, n_q, dim)
        self.k = self.cut(COARSE[dtype], batch, kv_heads, n_k, dim)
        self.v = self.cut(NORMAL[dtype], batch, kv_heads, n_k, dim_v)

    def __str__(self) -> str:
        return f"{self.spec}, {self.shape}, {self.dtype}, masked {self.masked}, seed {self.seed}"

    def cut(self, pool: Array, *shape: int) -> Array:
        """An array out of the pool, at any offset."""
        count = int(np.prod(shape))
        at = self.rng.randrange(pool.size - count + 1)
        return pool[at : at + count].reshape(shape)

    @cached_property
    def call(self) -> dict[str, Any]:
        self.rng.seed(self.seed)
        _, heads, _, n_q, n_k, *_ = self.shape
        given: dict[str, Any] = {
            "causal": self.rng.choice(causals(self.spec)),
            "params": make_params(self.spec, self.shape),
            "scale": 0.25,
        }
        if self.masked:
            given |= random_masks(self.shape)
            given["bias"] = self.cut(COARSE[self.dtype], heads, n_q, n_k)
        elif "topk" not in str(self.spec) and self.rng.random() < 0.5:
            given["softcap"] = 3.0  # where no exact score decides
        return given

    def rows(self, *shape: int) -> Array:
        return self.cut(NORMAL[self.dtype], *shape)

    def decodes(self) -> bool:
        *_, n_q, n_k, _, _ = self.shape
        return True in causals(self.spec) and not self.spec.arrays and n_q < n_k


def forward(case: Case) -> dict[str, Array]:
    return sa.attention(case.q, case.k, case.v, case.spec, return_lse=True, **case.call)._asdict()


def backward(case: Case) -> dict[str, Array]:
    vjp = sa.attention_vjp(case.q, case.k, case.v, case.spec, **case.call)
    case.rng.seed(case.seed)
    back = vjp.pullback(case.rows(*vjp.out.shape), case.rows(*vjp.lse.shape))._asdict()
    return {name: x for name, x in back.items() if isinstance(x, np.ndarray)}


def plan(case: Case) -> dict[str, Array]:
    how = {name: x for name, x in case.call.items() if name in PLANNED}
    return {"exact": sa.plan(case.q, case.k, case.spec, **how).to_mask()}


PLANNED = ("causal", "params", "scale", "mask", "key_mask", "bias", "softcap")


def mass(case: Case) -> dict[str, Array]:
    weights = sa.attention(
        case.q, case.k, case.v, case.spec, return_weights="mass", **case.call
    ).weights
    return {"mass": weights}


def top(case: Case) -> dict[str, Array]:
    """The weights; which of two equal ones comes first is rounding's affair."""
    found = sa.attention(
        case.q, case.k, case.v, case.spec, return_weights="topn:3", **case.call
    ).weights
    return {"top": found[0]}


def decode(case: Case) -> dict[str, Array]:
    """Up to three steps behind what the cache is given."""
    *_, n_q, n_k, _, _ = case.shape
    cache, first = sa.Cache(case.spec), n_k - n_q
    cache.append(case.k[:, :, :first], case.v[:, :, :first])
    outs = [
        sa.attention(
            case.q[:, :, i : i + 1],
            *(x[:, :, first + i : first + i + 1] for x in (case.k, case.v)),
            cache=cache,
            causal=True,
            scale=0.25,
        )
        for i in range(min(3, n_q))
    ]
    return {"decode": np.concatenate(outs, 2)}


def merge(case: Case) -> dict[str, Array]:
    case.rng.seed(case.seed)
    batch, heads, _, n_q, *_, dim_v = case.shape
    parts = [(case.rows(batch, heads, n_q, dim_v), case.rows(batch, heads, n_q)) for _ in range(3)]
    return dict(zip(("merged", "lse"), sa.merge(parts), strict=True))


def select(case: Case) -> dict[str, Array]:
    case.rng.seed(case.seed)
    scores = case.cut(COARSE[case.dtype], case.shape[3] * case.shape[4])
    return {"exact": np.sort(_core.select_largest(scores, case.rng.randint(1, scores.size)))}


def scores(case: Case) -> dict[str, Array]:
    of = (0, 0.25, 0.0, None, None, None)
    return {"exact": _core.score_rows(case.q, case.k, of, 0, 0, 0, case.shape[3])}


def linear(case: Case) -> dict[str, Array]:
    """Of weights in float32 or float64, or (on the tiles, whatever BLAS there is) in float16."""
    case.rng.seed(case.seed)
    *_, m, n, inner, _ = case.shape
    turned = case.rng.random() < 0.5
    half = case.dtype == "float32" and case.rng.random() < 0.7
    shape = (n, inner) if turned else (inner, n)
    w, bias = case.cut(HALF if half else NORMAL[case.dtype], *shape), case.rows(n)
    out = np.empty((m, n), case.dtype)
    _core.linear(case.rows(m, inner), w, bias, out, turned)
    return {"product": out}


def widen(case: Case) -> dict[str, Array]:
    case.rng.seed(case.seed)
    halves = case.cut(HALF, case.shape[3] * case.shape[4]).view(np.uint16)
    out = np.empty(halves.shape, np.float32)
    _core.widen(halves, case.rng.choice(["f16", "bf16"]), out)
    return {"exact": out}


KERNELS: dict[str, Callable[[Case], dict[str, Array]]] = {
    f.__name__: f
    for f in (forward, backward, plan, mass, top, decode, merge, select, scores, linear, widen)
}


def applies(kernel: str, case: Case) -> bool:
    return kernel != "decode" or case.decodes()


def random_case(seed: int) -> tuple[str, Case]:
    """A kernel and what to run it on: sizes small more often than large."""
    rng = Random(seed)

    def up_to(most: int) -> int:
        return int((most + 1) ** rng.random())

    kv_heads = up_to(3)
    shape = (up_to(3), kv_heads * up_to(4), kv_heads, up_to(130), up_to(200), 8 * up_to(9))
    spec = rng.choice(EVERY_SPEC)
    dtype = rng.choice(["float32", "float64"])
    case = Case(spec, (*shape, up_to(70)), dtype, rng.random() < 0.3, seed)
    kernel = rng.choice(list(KERNELS))
    return (kernel if applies(kernel, case) else "forward"), case


def compare(got: dict[str, Array], want: dict[str, Array], case: Case, where: str) -> float:
    """Bit-equal, or with rounding alone between them; of infinities none is elsewhere. Returns the
    largest error in units of its bound."""
    assert got.keys() == want.keys()
    rounded, worst = {}, 0.0
    for name, x in got.items():
        y = want[name]
        assert x.shape == y.shape and x.dtype == y.dtype, f"{where}: {name}"
        if x.tobytes() == y.tobytes():
            continue
        assert name != "exact", f"{where}: {np.count_nonzero(x != y)} of {x.size} entries differ"
        finite = np.isfinite(y)
        np.testing.assert_array_equal(x[~finite], y[~finite], err_msg=f"{where}: {name}")
        rounded[name] = x[finite], y[finite]
    for name, (x, y) in rounded.items():
        # Gradients of scores are differences that cancel: those of one call share a size.
        near = want.values() if name in ("dq", "dk", "dv", "dbias") else [want[name]]
        size = max(np.abs(z[np.isfinite(z)]).max(initial=1) for z in near)
        error, bound = np.abs(x - y).max(initial=0), BOUND[case.dtype] * size
        if error > bound and name in ("dq", "dk", "dv"):
            bound = BOUND[case.dtype] / 4 * gradient_terms(case)
        assert error <= bound, f"{where}: {name} {error:.3g}, bound {bound:.3g}"
        worst = max(worst, float(error / bound))
    return worst


def gradient_terms(case: Case) -> float:
    """The largest sum of absolute terms of an entry of dq, dk or dv, from weights in float64: about
    one call in a million sums terms that are so many times what comes out."""
    q, k, v = (x.astype("f8") for x in (case.q, case.k, case.v))
    wide = {n: x.astype("f8") if n == "bias" else x for n, x in case.call.items()}
    found = sa.attention(q, k, v, case.spec, return_weights=True, **wide)
    case.rng.seed(case.seed)
    dout, dlse = (np.abs(case.rows(*shape)) for shape in (found.out.shape, found.out.shape[:3]))
    group = q.shape[1] // k.shape[1]
    keys, values = (np.repeat(np.abs(x), group, 1) for x in (k, v))
    delta = (dout * np.abs(found.out)).sum(-1) + dlse
    dscores = found.weights * (dout @ values.swapaxes(2, 3) + delta[..., None]) * 0.25
    dkeys = (dscores.swapaxes(2, 3) @ np.abs(q), found.weights.swapaxes(2, 3) @ dout)
    grouped = (x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(2) for x in dkeys)
    return max(float(x.max()) for x in (dscores @ keys, *grouped))
