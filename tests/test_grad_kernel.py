"""attend_grad of the core, where specs do not reach: plans of parts, dbias of any strides, runs of
rows and keys, outputs that may not be, and that nothing unseen changes a bit."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import SPECS, fit, make_layout, make_params, make_qkv
from reference import gradients as ref_grad

import sparseattn as sa
from sparseattn import _core
from sparseattn.packed import build
from sparseattn.variants.base import Problem, Variant

Array = np.ndarray
NAMES = ("dq", "dk", "dv", "dbias")


def core_plan(spec: str, q: Array, k: Array, problem: Problem) -> _core.Plan:
    variant = sa.parse(spec)
    shape = (*q.shape[:2], k.shape[1], q.shape[2], k.shape[2])
    params = {"layout": make_layout(variant, shape)} if variant.kind == "blockmask" else None
    (piece,) = build(variant, q, k, problem, params)
    return piece.core


def stretched(size: tuple[int, ...], shape: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
    """Zeros of a size, and their view over a shape: strides 0 where the size is 1."""
    sums = np.zeros(size, dtype)
    strides = [0 if n == 1 else step for n, step in zip(size, sums.strides, strict=True)]
    return sums, np.lib.stride_tricks.as_strided(sums, shape, strides)


class Call(NamedTuple):
    q: Array
    k: Array
    v: Array
    parts: Any
    problem: Problem
    dout: Array
    bias_size: tuple[int, ...] | None = None

    def rows(self) -> tuple[Array, Array]:
        """lse and delta, dlse being 0."""
        real = np.float64 if self.q.dtype == np.float64 else np.float32
        out, lse = np.empty(self.dout.shape, real), np.empty(self.q.shape[:3], real)
        _core.attend(*self[:5], out, lse)
        delta = np.empty_like(lse)
        _core.attend_delta(out, self.dout, None, delta)
        return lse, delta

    def grads(self) -> list[Array]:
        """dq, dk, dv and, with a bias, dbias in the size that it has."""
        lse, delta = self.rows()
        grads = [np.empty(x.shape, lse.dtype) for x in self[:3]]
        dbias = None
        if self.bias_size is not None:
            shape = (*self.q.shape[:3], self.k.shape[2])
            sums, dbias = stretched(self.bias_size, shape, lse.dtype)
            grads.append(sums)
        _core.attend_grad(*self[:5], self.dout, lse, delta, *grads[:3], dbias)
        return grads

    def seen(self) -> Array:
        parts = self.parts if isinstance(self.parts, tuple) else ((self.parts, 0, None),)
        return np.concatenate([core.to_mask()[:, a:b] for core, a, b in parts], 1)

    def want(self) -> ref_grad.Gradients:
        """The same by the definitions."""
        see, bias = self.seen(), self.problem.bias
        terms: dict[str, Any] = {"scale": self.problem.scale, "sink": self.problem.sink}
        if bias is not None:
            see = see & (bias > -np.inf)
            terms["bias"] = np.where(np.isneginf(bias), 0, bias).astype(np.float64)
        wide = [x.astype(np.float64) for x in self[:3]]
        return ref_grad.gradients(*wide, see, self.dout.astype(np.float64), **terms)


def make_call(spec: str, shape: tuple[int, ...], dtype: Any, **terms: Any) -> Call:
    q, k, v = make_qkv(shape, dtype)
    dout = np.random.default_rng(9).standard_normal((*q.shape[:3], v.shape[3])).astype(dtype)
    problem = Problem(scale=shape[5] ** -0.5, **terms)
    return Call(q, k, v, core_plan(spec, q, k, problem), problem, dout)


def split(call: Call, *cuts: tuple[str, int]) -> Call:
    """Parts: each spec up to the head behind it."""
    plans = [core_plan(spec, call.q, call.k, call.problem) for spec, _ in cuts]
    ends = [end for _, end in cuts]
    return call._replace(parts=tuple(zip(plans, [0, *ends], ends, strict=False)))


def bits(arrays: list[Array]) -> list[bytes]:
    return [x.tobytes() for x in arrays]


# ---- parts, runs, dbias --------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(6, 2, 70, 90), (4, 1, 300, 300)], ids=["one run", "two runs"])
def test_parts_may_split_the_heads_of_a_key(heads: tuple[int, ...], isa: str, threads: int) -> None:
    query, kv, n_q, n_k = heads
    call = make_call("dense", (2, query, kv, n_q, n_k, 16, 24), np.float64, causal=1)
    call = split(call, ("topk:9", 1), ("dense", query - 1), ("window:20:sinks=2", query))
    for got, want, name in zip(call.grads(), call.want(), NAMES, strict=False):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("spec", ["dense", "window:200:sinks=3", "topk:16", "blockmask:64"])
def test_runs_of_rows_and_keys_add_up(spec: str, threads: int) -> None:
    """One head is cut into runs; of a head among many the sums are made at one go."""
    one = make_call(spec, (1, 1, 1, 700, 700, 16, 16), np.float32, causal=1)
    q, k, v, dout = (np.repeat(x, 33, 0) for x in (*one[:3], one.dout))
    whole = Call(q, k, v, core_plan(spec, q, k, one.problem), one.problem, dout)
    cut, uncut, want = one.grads(), whole.grads(), one.want()
    for a, b, x in zip(cut, uncut, want, strict=False):
        assert (b == b[:1]).all()
        np.testing.assert_allclose(a, x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(b[:1], x, rtol=1e-4, atol=1e-5)
    if spec == "dense":
        assert (cut[0] != uncut[0][:1]).any()  # runs there were


@pytest.mark.parametrize("parts", [False, True], ids=["plan", "parts"])
def test_dbias_of_every_broadcast(parts: bool, threads: int) -> None:
    shape = (2, 3, 1, 70, 300, 8, 8)
    full = (2, 3, 70, 300)
    bias = np.random.default_rng(0).standard_normal(full)
    bias[:, :, 9:12, 100:] = -np.inf
    call = make_call("dense", shape, np.float64, causal=1, bias=bias)
    if parts:
        call = split(call, ("topk:30", 1), ("dense", 3))
    whole = call.want().dbias
    for axes in itertools.product([False, True], repeat=4):
        size = tuple(1 if one else n for one, n in zip(axes, full, strict=True))
        got = call._replace(bias_size=size).grads()[3]
        want = ref_grad.reduce_to(whole, size)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10, err_msg=str(size))


def test_dbias_is_added_to_along_any_strides() -> None:
    call = make_call("dense", (2, 3, 1, 9, 40, 8, 8), np.float32)
    lse, delta = call.rows()
    want = call._replace(bias_size=(2, 3, 9, 40)).grads()[3]
    for dtype in (np.float32, np.float64):
        into = np.ones((40, 2, 9, 6), dtype).transpose(1, 3, 2, 0)[:, ::2, ::-1, ::-1]
        _core.attend_grad(*call[:5], call.dout, lse, delta, None, None, None, into)
        np.testing.assert_allclose(into - 1, want, atol=1e-6)


# ---- what is not seen ----------------------------------------------------------------------------


def packed_call(rng: np.random.Generator, dtype: Any) -> Call:
    """Sequences of uneven lengths, one of them empty, each with a plan of its own kind."""
    lengths = [(33, 40), (0, 9), (1, 1), (70, 17)]
    plans = []
    for (n_q, n_k), spec in zip(lengths, ("dense", "dense", "window:5", "topk:4"), strict=True):
        q, k = (rng.standard_normal((2, heads, n, 16)) for heads, n in ((4, n_q), (2, n_k)))
        plans.append(core_plan(spec, q, k, Problem(causal=1)))
    call = make_call("dense", (2, 4, 2, 104, 67, 16, 17), dtype)
    return call._replace(parts=_core.plan_pack(tuple(plans), None, None))


def masked_call(rng: np.random.Generator, dtype: Any) -> Call:
    mask = rng.random((2, 4, 70, 90)) < 0.5
    mask[:, :, 30] = False
    call = make_call("dense", (2, 4, 2, 70, 90, 17, 24), dtype)
    return call._replace(parts=_core.plan_from_mask(mask))


def calls(dtype: Any) -> dict[str, Call]:
    rng = np.random.default_rng(4)
    shape = (2, 4, 2, 70, 90, 24, 17)
    bias = rng.standard_normal((4, 1, 90)).astype(dtype)
    bias[:, :, ::7] = -np.inf
    bias = np.broadcast_to(bias, (2, 4, 70, 90))
    key_mask = rng.random((2, 90)) < 0.6
    dense = make_call("dense", shape, dtype, causal=1)
    return {
        "dense": dense,
        "top-left": make_call("dense", (1, 4, 1, 200, 60, 16, 16), dtype, causal=2),
        "window": make_call("window:9:sinks=2", shape, dtype, causal=1),
        "blocks": make_call("blockmask:24", shape, dtype),
        "mask": masked_call(rng, dtype),
        "key_mask": make_call("dense", shape, dtype, key_mask=key_mask),
        "topk": make_call("topk:5", shape, dtype, causal=1),
        "union": make_call("topk:8+random:8+window:4", shape, dtype, causal=1, key_mask=key_mask),
        "bias": make_call("window:30", shape, dtype, causal=1, bias=bias),
        "cap": make_call("random:9", shape, dtype, causal=1, softcap=2.0, dropout_p=0.3, seed=1),
        "one row": make_call("dense", (2, 4, 2, 1, 90, 24, 17), dtype, bias=bias[:, :, :1]),
        "packed": packed_call(rng, dtype),
        "parts": split(dense, ("topk:9", 1), ("window:7", 4)),
    }


@pytest.mark.promise("A6")
@pytest.mark.promise("A4")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_not_seen_changes_no_bit(dtype: Any, isa: str) -> None:
    """Keys, values, queries and rows of dout, NaN, infinite or huge: what does not see them, and
    what is not seen by them, keeps its bits."""
    rng = np.random.default_rng(7)
    for name, call in calls(dtype).items():
        call = call._replace(q=call.q.copy(), k=call.k.copy(), v=call.v.copy())
        seen, (_, heads, n_q, _), kv = call.seen(), call.q.shape, call.k.shape[1]
        if call.problem.bias is not None:
            seen &= call.problem.bias > -np.inf
        clean = call.grads()
        for bad in (np.nan, -np.inf, 1e30):
            head, i, j = rng.integers(heads), rng.integers(n_q), rng.integers(call.k.shape[2])
            group = slice(head * kv // heads * heads // kv, (head * kv // heads + 1) * heads // kv)
            for what in ("k", "v", "q", "dout"):
                x = getattr(call, what).copy()
                rows, keys = np.ones(seen.shape[:3], bool), np.ones(call.k.shape[:3], bool)
                if what in "kv":
                    x[0, head * kv // heads, j] = bad
                    see = seen[0, group, :, j]
                    rows[0, group] = ~see
                    keys[0, head * kv // heads] = ~seen[0, group][see].any(0)
                else:
                    x[0, head, i] = bad
                    rows[0, head, i] = False
                    keys[0, head * kv // heads] = ~seen[0, head, i]
                dq, dk, dv = call._replace(**{what: x}).grads()
                where = f"{name}: {what} {bad} at {head}, {i}, {j}"
                assert dq[rows].tobytes() == clean[0][rows].tobytes(), where
                assert dk[keys].tobytes() == clean[1][keys].tobytes(), where
                assert dv[keys].tobytes() == clean[2][keys].tobytes(), where


@pytest.mark.promise("A4")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_of_queries_are_causal(spec: Variant) -> None:
    """Whatever comes from position j on, of no earlier row does a bit of dq change; one kv head, so
    that there are runs."""
    shape = fit(spec, (1, 2, 1, 400, 400, 16, 16))
    params = make_params(spec, shape)
    rng = np.random.default_rng(3)
    inputs = [x.copy() for x in make_qkv(shape)]
    inputs.append(rng.standard_normal(inputs[0].shape).astype(np.float32))

    def dq_of(q: Array, k: Array, v: Array, dout: Array) -> Array:
        vjp = sa.attention_vjp(q, k, v, spec, causal=True, params=params)
        dq: Array = vjp.pullback(dout).dq
        return dq

    before = dq_of(*inputs)
    for j in (1, 130, 257, 399):
        changed = [x.copy() for x in inputs]
        for x in changed:
            x[:, :, j:] = 3 * rng.standard_normal(x[:, :, j:].shape)
        got = dq_of(*changed)
        assert got[:, :, :j].tobytes() == before[:, :, :j].tobytes(), j
        assert (got != before).any() or np.abs(got).max() < 1e-5  # of one key: no gradient


@pytest.mark.promise("A4")
def test_how_later_rows_choose_changes_no_bit() -> None:
    """Rows that select near themselves could be cut into runs, rows that select anywhere could not:
    a cut that looked at the selection would tell earlier rows of later ones."""
    rng = np.random.default_rng(5)
    q, k, v, dout = (rng.standard_normal((1, 1, 512, 16), np.float32) for _ in range(4))
    near = 20 * (np.arange(16) == np.arange(512)[:, None] // 64)
    q[..., 352:384, :] += np.roll(near[352:384], -5, 1)  # keys of two runs
    near_q, near_k = (q + near).astype(np.float32), (k + near).astype(np.float32)
    plan = sa.plan(near_q, near_k, "topk:16", causal=True).to_mask()
    assert plan[0, 0, 370, :64].any() and plan[0, 0, 370, 320:].any()
    far_q = near_q.copy()
    far_q[:, :, 384:, :8] = 0  # noise alone is left
    dqs = [
        sa.attention_vjp(x, near_k, v, "topk:16", causal=True).pullback(dout).dq
        for x in (near_q, far_q)
    ]
    assert dqs[0][:, :, :384].tobytes() == dqs[1][:, :, :384].tobytes()
    assert (dqs[0][:, :, 384:] != dqs[1][:, :, 384:]).any()


def test_halves_are_read_as_they_are(isa: str) -> None:
    """Bits of a call on the widened arrays, whichever of them are halves and however they lie."""
    rng = np.random.default_rng(1)
    for spec, dim, dim_v in (("dense", 16, 40), ("window:9", 17, 3), ("random:5", 64, 64)):
        call = make_call(spec, (2, 4, 2, 33, 70, dim, dim_v), np.float32, causal=1)
        for _ in range(4):
            stored = {n: getattr(call, n) for n in ("q", "k", "v", "dout")}
            for name, x in stored.items():
                if rng.random() < 0.5:
                    stored[name] = x.astype(np.float16)
                elif rng.random() < 0.5:
                    stored[name] = (x.copy().view(np.uint32) >> 16).astype(np.uint16)  # bfloat16
                if rng.random() < 0.5:
                    stored[name] = stored[name].copy()[:, ::-1, ::-1]
            wide = {
                name: (x.astype(np.uint32) << 16).view(np.float32)
                if x.dtype == np.uint16
                else x.astype(np.float32)
                for name, x in stored.items()
            }
            wide = {name: np.ascontiguousarray(x) for name, x in wide.items()}
            got, want = call._replace(**stored).grads(), call._replace(**wide).grads()
            assert bits(got) == bits(want), {n: x.dtype for n, x in stored.items()}


# ---- wrong calls ---------------------------------------------------------------------------------


def grad_arguments(call: Call) -> dict[str, Any]:
    lse, delta = call.rows()
    grads = {f"d{n}": np.empty_like(getattr(call, n)) for n in "qkv"}
    sums = np.zeros((*call.q.shape[:3], call.k.shape[2]), np.float32)
    given = {"dout": call.dout, "lse": lse, "delta": delta}
    return call._asdict() | given | grads | {"dbias": sums}


def attend_grad(arguments: dict[str, Any]) -> None:
    order = ("q", "k", "v", "parts", "problem", "dout", "lse", "delta", *NAMES)
    _core.attend_grad(*(arguments[name] for name in order))


SMALL = (2, 4, 2, 7, 9, 8, 5)


@pytest.mark.parametrize("name", ["dout", "lse", "delta", *NAMES])
def test_wrong_arrays_are_named(name: str) -> None:
    given = grad_arguments(make_call("dense", SMALL, np.float32))
    x = given[name]
    for axis in range(x.ndim):
        longer = np.concatenate([x, x], axis)
        with pytest.raises(sa.ArgumentError, match=f"{name} has {2 * x.shape[axis]} entries on"):
            attend_grad(given | {name: longer})
    with pytest.raises(sa.DtypeError, match=f"{name} must be .*float32"):
        attend_grad(given | {name: np.zeros(x.shape, np.int64)})
    if name in ("lse", "delta"):
        with pytest.raises(sa.DtypeError, match=f"{name} must be float32.*convert it"):
            attend_grad(given | {name: x.astype(np.float64)})


@pytest.mark.parametrize("thing", [[1.0], 3, "out", (), np.float32(1), object()])
def test_outputs_must_be_arrays(thing: Any) -> None:
    call = make_call("dense", SMALL, np.float32)
    out = np.empty_like(call.dout)
    for into in ((thing, None), (out, thing)):
        with pytest.raises(sa.DtypeError, match="must be a NumPy array, got"):
            _core.attend(*call[:5], *into)
    given = grad_arguments(call)
    for name in NAMES:
        with pytest.raises(sa.DtypeError, match=f"{name} must be a NumPy array, got"):
            attend_grad(given | {name: thing})


@pytest.mark.promise("B2")
@pytest.mark.parametrize("name", NAMES)
def test_outputs_may_share_no_memory_with_what_is_read(name: str) -> None:
    sink = np.zeros(4, np.float32)
    given = grad_arguments(make_call("dense", SMALL, np.float32, sink=sink))
    size = given[name].size
    for other in ("q", "k", "v", "dout", "lse", "delta", "sink", *NAMES):
        if other == name:
            continue
        read = sink if other == "sink" else given[other]
        memory = np.zeros(read.size + size, np.float32)
        memory[: read.size] = read.ravel()
        shared = memory[: read.size].reshape(read.shape)
        into = memory[read.size - 1 : read.size - 1 + size].reshape(given[name].shape)
        problem = given["problem"]._replace(sink=shared if other == "sink" else sink)
        with pytest.raises(sa.ArgumentError, match="shares memory with"):
            attend_grad(given | {other: shared, name: into, "problem": problem})


@pytest.mark.promise("B2")
def test_outputs_may_not_be_a_plans_mask() -> None:
    q, k, v = make_qkv(SMALL)
    out = np.zeros((2, 4, 7, 5), np.float32)
    masks = {"mask": (4, 7, 9), "key_mask": (2, 9)}
    for name, shape in masks.items():
        mask = out.reshape(-1).view(bool)[: np.prod(shape)].reshape(shape)
        if name == "mask":
            mask = np.broadcast_to(mask, (2, 4, 7, 9))
        mask_of_plan: dict[str, Any] = {name: mask}
        plan = core_plan("dense", q, k, Problem(**mask_of_plan))
        with pytest.raises(sa.ArgumentError, match=f"out shares memory with the {name} of a plan"):
            _core.attend(q, k, v, plan, Problem(), out, None)


def test_dbias_may_not_overlap_itself() -> None:
    """Strides of 0 are sums; elements that meet otherwise would have two writers."""
    given = grad_arguments(make_call("dense", SMALL, np.float32))
    memory = np.zeros(1000, np.float32)
    for strides in ((0, 0, 4, 4), (0, 4, 36, 4), (4, 0, 36, 4)):
        band = np.lib.stride_tricks.as_strided(memory, (2, 4, 7, 9), strides)
        with pytest.raises(sa.ArgumentError, match="dbias overlaps itself"):
            attend_grad(given | {"dbias": band})
    with pytest.raises(sa.ArgumentError, match="dbias is read-only"):
        attend_grad(given | {"dbias": np.broadcast_to(memory[0], (2, 4, 7, 9))})
