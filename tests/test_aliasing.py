"""``out=`` on memory that the call reads: the bits of a call without, or a refusal (promise B2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import EVERY_SPEC, causals, fit, make_params, make_qkv

import sparseattn as sa
from sparseattn.variants import Variant

pytestmark = pytest.mark.promise("B2")

Array = np.ndarray
N = 12
REFUSALS = ("overlap", "shares memory")


def view_of(memory: Array, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """A view of that shape somewhere in flat memory: any order of axes, spread out or not, any
    offset that fits."""
    order = rng.permutation(len(shape)) if rng.random() < 0.5 else np.arange(len(shape))
    spread = [2 if rng.random() < 0.15 else 1 for _ in shape]
    wide = [shape[a] * spread[a] for a in order]
    size = int(np.prod(wide))
    if size > memory.size:
        return view_of(memory, shape, rng)
    at = int(rng.integers(0, memory.size - size + 1))
    block = memory[at : at + size].reshape(wide).transpose(np.argsort(order))
    steps = tuple(slice(None, None, -s if rng.random() < 0.2 else s) for s in spread)
    return block[steps]


def attempt(call: Any, out: Array, mine: bool = True) -> bool:
    """Whether it ran; else the refusal names the overlap, and nothing was written to memory that is
    the caller's (``mine``)."""
    before = out.tobytes()
    try:
        got = call(out)
    except sa.ArgumentError as error:
        assert any(word in str(error) for word in REFUSALS) and "out" in str(error), error
        assert not mine or out.tobytes() == before
        return False
    assert got is out
    return True


def one_overlap(seed: int) -> tuple[bool, bool]:
    """Some inputs and out in one memory; whether they overlap, and whether the call ran."""
    rng = np.random.default_rng([7, seed])
    spec: Variant = EVERY_SPEC[seed % len(EVERY_SPEC)]
    shape = fit(spec, (1, 4, 2, N, N, 8, 8))
    heads = shape[1]
    dtype = [np.float32, np.float64][seed // 7 % 2]
    given: dict[str, Array] = dict(zip("qkv", make_qkv(shape, dtype, seed=seed), strict=True))
    given["bias"] = rng.standard_normal((heads, N, N)).astype(dtype)
    given["sink"] = rng.standard_normal(heads).astype(dtype)
    most = max(x.size for x in given.values())
    memory = rng.standard_normal(int(rng.integers(2, 6)) * most).astype(dtype)
    inside = [name for name in given if rng.random() < 0.5] or ["v"]
    for name in inside:  # they may overlap one another, and are read as they then are
        given[name] = view_of(memory, given[name].shape, rng)
    out = view_of(memory, (1, heads, N, 8), rng)
    params = make_params(spec, shape) if spec.arrays else {}

    def call(arrays: dict[str, Array], out: Array | None) -> Any:
        q, k, v = (arrays[name] for name in "qkv")
        inner = {**(params or {}), "sink": arrays["sink"]}
        causal = causals(spec)[0]
        return sa.attention(
            q, k, v, spec, causal=causal, bias=arrays["bias"], params=inner, out=out
        )

    want = call({name: x.copy() for name, x in given.items()}, None)
    ran = attempt(lambda out: call(given, out), out)
    if ran:
        assert out.tobytes() == want.tobytes(), (seed, inside)
    return any(np.shares_memory(out, given[name]) for name in inside), ran


@pytest.mark.parametrize("part", range(4))
def test_random_overlaps(part: int) -> None:
    """500 of them over every spec: those that overlap are refused, the others run."""
    seen = [one_overlap(seed) for seed in range(part * 125, part * 125 + 125)]
    overlapping = [ran for overlaps, ran in seen if overlaps]
    apart = [ran for overlaps, ran in seen if not overlaps]
    assert len(overlapping) > 40 and len(apart) > 20
    assert all(apart)


@pytest.mark.nightly
def test_many_random_overlaps() -> None:
    assert len([one_overlap(seed) for seed in range(1000, 6000)]) == 5000


def test_bool_masks_count_as_inputs() -> None:
    q, k, v = make_qkv((1, 4, 2, 64, 64, 8, 8))
    out = np.zeros((1, 4, 64, 8), np.float32)
    flat = out.view(bool).reshape(-1)
    for name, mask in {
        "mask": flat[: 64 * 64].reshape(64, 64),
        "key_mask": flat[100:164].reshape(1, 64),
    }.items():
        assert not attempt(lambda o, m={name: mask}: sa.attention(q, k, v, out=o, **m), out)


def test_sinks_count_as_inputs_of_every_piece() -> None:
    """A piece of other heads writes before this one reads, and one after the softmax reads last."""
    q, k, v = make_qkv((1, 6, 2, 12, 12, 8, 8))
    out = np.zeros((1, 6, 12, 8), np.float32)
    for spec in ("dense", "topk:3:placement=post", "perhead(4*window:3|2*topk:3:placement=post)"):
        for at in (0, 200, out.size - 6):
            call = {"causal": True, "params": {"sink": out.reshape(-1)[at : at + 6]}}
            assert not attempt(lambda o, s=spec, c=call: sa.attention(q, k, v, s, out=o, **c), out)


def test_layouts_and_offsets_are_read_before_the_output_is_written() -> None:
    """What a plan is made of may lie where the output goes."""
    q, k, v = make_qkv((1, 4, 2, 64, 64, 8, 8))
    want = sa.attention(q, k, v, "blockmask:16", params={"layout": np.tri(4, dtype=bool)[None]})
    out = np.zeros((1, 4, 64, 8), np.float32)
    layout = out.view(bool).reshape(-1)[:16].reshape(1, 4, 4)
    layout[...] = np.tri(4, dtype=bool)
    call = {"params": {"layout": layout}}
    assert attempt(lambda o: sa.attention(q, k, v, "blockmask:16", out=o, **call), out)
    assert out.tobytes() == want.tobytes()
    want = sa.attention(q, k, v, cu_seqlens=[0, 30, 64])
    cu = out.view(np.int64).reshape(-1)[:3]
    cu[...] = 0, 30, 64
    assert attempt(lambda o: sa.attention(q, k, v, cu_seqlens=cu, out=o), out)
    assert out.tobytes() == want.tobytes()


def test_a_plan_keeps_masks_of_its_own() -> None:
    q, k, v = make_qkv((1, 4, 2, 64, 64, 8, 8))
    out = np.zeros((1, 4, 64, 8), np.float32)
    mask = out.view(bool).reshape(-1)[: 64 * 64].reshape(64, 64)
    mask[...] = np.tri(64, dtype=bool)
    plan, made = sa.plan(q, k, "topk:5", mask=mask), sa.Plan.from_mask(mask)
    for p in (plan, made):
        mask[...] = np.tri(64, dtype=bool)
        want = sa.attention(q, k, v, p)
        assert attempt(lambda o, p=p: sa.attention(q, k, v, p, out=o), out)
        assert out.tobytes() == want.tobytes()


# ---- caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["dense", "window:5", "topk:3", "window:4:sinks=2"])
def test_out_on_a_caches_memory(spec: str) -> None:
    """Rows that the cache keeps are inputs; its free rows are nobody's yet."""
    rng = np.random.default_rng(0)
    refused = ran = 0
    for seed in range(60):
        q, k, v = make_qkv((1, 2, 2, 20, 20, 8, 8), seed=seed)
        first, last = ([x[:, :, s] for x in (q, k, v)] for s in (slice(19), slice(19, 20)))
        caches = [sa.Cache(spec) for _ in range(2)]
        for cache in caches:
            sa.attention(*first, causal=True, cache=cache)
        want = sa.attention(*last, causal=True, cache=caches[1])
        held = caches[0]._held
        assert held is not None
        buffer = held.k if seed % 2 else held.v
        out = view_of(buffer.reshape(-1), (1, 2, 1, 8), rng)
        total = caches[0].get_seq_length()
        cached = {"causal": True, "cache": caches[0]}
        if attempt(lambda o, c=cached, x=last: sa.attention(*x, **c, out=o), out, mine=False):
            ran += 1
            assert out.tobytes() == want.tobytes()
            assert caches[0].get_seq_length() == total + 1
        else:
            refused += 1
            assert caches[0].get_seq_length() == total
            got = sa.attention(*last, causal=True, cache=caches[0])
            assert got.tobytes() == want.tobytes()
    assert refused > 5 and refused + ran == 60


def test_tokens_that_are_a_caches_own_rows() -> None:
    """k and v of a call may be views of what append() gave back."""
    q, k, v = make_qkv((1, 2, 2, 8, 8, 8, 8))
    one, two = sa.Cache(), sa.Cache()
    kept, values = one.append(k, v)
    two.append(k, v)
    for _ in range(9):  # until the buffer has moved
        rows = kept[:, :, :8], values[:, :, :8]
        got = sa.attention(q, *rows, causal=True, cache=one)
        want = sa.attention(q, *(x.copy() for x in rows), causal=True, cache=two)
        assert got.tobytes() == want.tobytes()
        kept, values = one.snapshot().held[:2]  # type: ignore[index]


def test_new_tokens_may_lie_where_the_output_goes() -> None:
    """They are in the cache before anything is written."""
    q, k, v = make_qkv((1, 2, 2, 8, 8, 8, 8))
    want = sa.attention(q, k, v, causal=True, cache=sa.Cache())
    for at, name in enumerate("kv"):
        arrays = [q.copy(), k.copy(), v.copy()]
        out = arrays[1 + at]
        if attempt(lambda o, a=arrays: sa.attention(*a, causal=True, cache=sa.Cache(), out=o), out):
            assert out.tobytes() == want.tobytes(), name
