"""Decode equals prefill, for every causal spec: by chunks, single tokens, paddings, half storage.

Keys that a selector chooses are compared through inputs whose scores are exact in float32: q and k
are multiples of 1/64, so that no order of summation rounds, and ties go to the lower key anyhow.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import CAUSAL_SPECS, fit, make_params, make_qkv
from reference import attention as ref

import sparseattn as sa
from sparseattn import _core

Array = np.ndarray
SPECS = [spec for spec, causal in CAUSAL_SPECS if causal is True]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)

TOKENS = 300
SHAPE = (2, 4, 2, TOKENS, TOKENS, 16, 8)
BOUND = {"float32": 1e-6, "float64": 1e-13}


def make(spec: sa.Variant, dtype: Any = np.float32, tokens: int = TOKENS) -> tuple[Array, ...]:
    q, k, v = make_qkv((*fit(spec, SHAPE)[:3], tokens, tokens, 16, 8), dtype, seed=21)
    if spec.reads_keys:
        q, k = (np.round(x * 64).clip(-127, 127) / x.dtype.type(64) for x in (q, k))
    return q, k, v


def ragged(tokens: int = TOKENS) -> Array:
    """One entry padded on the left, the other in the middle, as a shorter prompt is."""
    there = np.ones((2, tokens), bool)
    there[0, : tokens // 5] = False
    there[1, tokens // 4 : tokens // 3] = False
    return there


def cuts(*sizes: int, tokens: int = TOKENS) -> list[slice]:
    """Slices of these sizes, the last one again and again."""
    ends = [0]
    for size in sizes:
        ends.append(min(ends[-1] + size, tokens))
    while ends[-1] < tokens:
        ends.append(min(ends[-1] + sizes[-1], tokens))
    return [slice(a, z) for a, z in pairwise(ends)]


def decode(
    q: Array, k: Array, v: Array, cache: sa.Cache, chunks: list[slice], **call: Any
) -> tuple[Array, Array]:
    """out and lse of chunk after chunk; a key_mask of all tokens is given by chunks as well."""
    key_mask = call.pop("key_mask", None)
    outs, lses = [], []
    for c in chunks:
        there = None if key_mask is None else key_mask[:, c]
        got = sa.attention(
            *(x[:, :, c] for x in (q, k, v)),
            causal=True,
            cache=cache,
            key_mask=there,
            return_lse=True,
            **call,
        )
        outs.append(got.out)
        lses.append(got.lse)
    return np.concatenate(outs, 2), np.concatenate(lses, 2)


def assert_near(got: tuple[Array, Array], want: tuple[Array, Array], bound: float) -> None:
    for ours, theirs in zip(got, want, strict=True):
        seen = np.isfinite(theirs)
        np.testing.assert_array_equal(ours[~seen], theirs[~seen])
        error = np.abs(ours[seen] - theirs[seen]) / (1 + np.abs(theirs[seen]))
        assert error.max(initial=0) <= bound


@every_spec
@pytest.mark.promise("A5")
@pytest.mark.parametrize(("dtype", "padded"), [("float32", False), ("float64", True)])
def test_decode_equals_prefill(spec: sa.Variant, dtype: str, padded: bool) -> None:
    """Lengths 1 to 300 in chunks of 1, 2, 7 and 64; a prefill's first rows are those of a shorter
    one, as tests of causality say."""
    q, k, v = make(spec, dtype)
    params = make_params(spec, fit(spec, SHAPE))
    call = {"params": params, "key_mask": ragged() if padded else None}
    want = sa.attention(q, k, v, spec, causal=True, return_lse=True, **call)
    for size in (1, 2, 7, 64):
        got = decode(q, k, v, sa.Cache(spec), cuts(size), **call)
        assert_near(got, want, BOUND[dtype])
    got = decode(q, k, v, sa.Cache(spec, rollback=5), cuts(130, 1, 1, 90, 7), **call)
    assert_near(got, want, BOUND[dtype])


@every_spec
@pytest.mark.promise("A5")
def test_decode_on_every_isa(spec: sa.Variant, isa: str, threads: int) -> None:
    q, k, v = make(spec, tokens=100)
    params = make_params(spec, fit(spec, (*SHAPE[:3], 100, 100, 16, 8)))
    want = sa.attention(q, k, v, spec, causal=True, params=params, return_lse=True)
    chunks = cuts(60, 1, 1, 1, 7, tokens=100)
    got = decode(q, k, v, sa.Cache(spec), chunks, params=params)
    assert_near(got, want, BOUND["float32"])


@pytest.mark.parametrize("spec", ["dense", "window:70:sinks=3", "topk:9", "random:9"])
def test_against_the_definition(spec: str) -> None:
    """Not only equal to our prefill: float64 NumPy over the keys that the prefill's plan keeps."""
    q, k, v = make(sa.parse(spec), np.float64)
    kept = sa.plan(q, k, spec, causal=True, key_mask=ragged()).to_mask()
    want = ref.attention(q, k, v, kept)
    got = decode(q, k, v, sa.Cache(spec), cuts(100, 1, 1, 30), key_mask=ragged())
    assert_near(got, want, 1e-12)


def to_bfloat16(x: Array) -> Array:
    """float32 values rounded to bfloat16, by arithmetic on exponents."""
    step = np.exp2(np.floor(np.log2(np.abs(np.where(x == 0, 1, x).astype(np.float64)))) - 7)
    return (np.round(x / step) * step).astype(np.float32)


ROUND: dict[str, Callable[[Array], Array]] = {
    "float16": lambda x: x.astype(np.float16).astype(np.float32),
    "bfloat16": to_bfloat16,
}


@every_spec
@pytest.mark.promise("A5")
@pytest.mark.parametrize("half", ROUND)
def test_half_storage_is_prefill_over_rounded_keys(spec: sa.Variant, half: str) -> None:
    q, k, v = make(spec)
    params = make_params(spec, fit(spec, SHAPE))
    call = {"params": params, "key_mask": ragged()}
    rounded = (ROUND[half](k), ROUND[half](v))
    want = sa.attention(q, *rounded, spec, causal=True, return_lse=True, **call)
    for sizes in ((40, 1, 1, 1, 1, 7), (2, 64)):
        cache = sa.Cache(spec, dtype=half)
        got = decode(q, k, v, cache, cuts(*sizes), **call)
        assert got[0].dtype == np.float32 and cache.dtype == half
        assert_near(got, want, BOUND["float32"])


@every_spec
def test_half_inputs(spec: sa.Variant) -> None:
    """float16 in, float16 held, float16 out: what the prefill gives, one rounding away."""
    q, k, v = (x.astype(np.float16) for x in make(spec, tokens=100))
    params = make_params(spec, fit(spec, (*SHAPE[:3], 100, 100, 16, 8)))
    want = sa.attention(q, k, v, spec, causal=True, params=params)
    cache = sa.Cache(spec)
    got, lse = decode(q, k, v, cache, cuts(60, 1, 1, 1, 7, tokens=100), params=params)
    assert got.dtype == want.dtype == np.float16 and lse.dtype == np.float32
    assert cache.dtype == "float16"
    far = np.abs(got.astype(np.float32) - want.astype(np.float32))
    assert (far <= np.spacing(np.maximum(np.abs(want), np.float16(2**-10)))).all()


# ---- same bits ----------------------------------------------------------------------------------


@every_spec
@pytest.mark.promise("C5")
def test_threads_change_no_bit(spec: sa.Variant, with_threads: Callable[[int], None]) -> None:
    q, k, v = make(spec, tokens=150)
    params = make_params(spec, fit(spec, (*SHAPE[:3], 150, 150, 16, 8)))
    bits = set()
    for count in (1, 2, 3, 5):
        with_threads(count)
        got = decode(q, k, v, sa.Cache(spec), cuts(120, 1, 1, 9, tokens=150), params=params)
        bits.add(got[0].tobytes() + got[1].tobytes())
    assert len(bits) == 1


@every_spec
@pytest.mark.promise("A5")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_snapshot_in_the_middle(spec: sa.Variant, dtype: str) -> None:
    """A run goes on to the same bits from its snapshot: here, in another cache, and once more."""
    q, k, v = make(spec, "float64" if dtype == "float64" else "float32")
    call = {"params": make_params(spec, fit(spec, SHAPE)), "key_mask": ragged()}
    cache = sa.Cache(spec, dtype, rollback=3)
    chunks = cuts(70, 1, 1, 30, 7)
    decode(q, k, v, cache, chunks[:4], **call)
    saved = cache.snapshot()
    want = decode(q, k, v, cache, chunks[4:20], **call)
    for other in (sa.Cache(spec, rollback=3), cache):
        got = decode(q, k, v, other.restore(saved), chunks[4:20], **call)
        assert got[0].tobytes() == want[0].tobytes() and got[1].tobytes() == want[1].tobytes()


@every_spec
@pytest.mark.promise("A5")
def test_crop_then_continue(spec: sa.Variant) -> None:
    """What was cropped leaves no trace, not even as NaN, wherever the next chunks begin."""
    q, k, v = make(spec)
    call = {"params": make_params(spec, fit(spec, SHAPE)), "key_mask": ragged()}
    wrong = np.full_like(k[:, :, :9], np.nan), np.full_like(v[:, :, :9], np.nan)
    cropped, fresh = sa.Cache(spec, rollback=9), sa.Cache(spec, rollback=9)
    begin = 0
    for sizes in ((3, 80, 1), (1, 1, 1, 1), (7, 60), (1, 7, 7)):
        chunks = [slice(c.start + begin, c.stop + begin) for c in cuts(*sizes, tokens=sum(sizes))]
        got = decode(q, k, v, cropped, chunks, **call)
        want = decode(q, k, v, fresh, chunks, **call)
        assert got[0].tobytes() == want[0].tobytes() and got[1].tobytes() == want[1].tobytes()
        begin = chunks[-1].stop
        for guess in (1, 8):
            cropped.append(wrong[0][:, :, :guess], wrong[1][:, :, :guess])
        cropped.crop(-9)
        assert cropped.get_seq_length() == fresh.get_seq_length() == begin


@every_spec
@pytest.mark.promise("A6")
def test_padding_is_not_touched(spec: sa.Variant) -> None:
    """NaN at tokens that are not there changes no bit; at one that is, none of an earlier row."""
    q, k, v = make(spec, tokens=150)
    params = make_params(spec, fit(spec, (*SHAPE[:3], 150, 150, 16, 8)))
    call = {"params": params, "key_mask": ragged(150)}
    chunks = cuts(100, 1, 1, 20, tokens=150)
    want = decode(q, k, v, sa.Cache(spec), chunks, **call)
    hole = ~ragged(150)[:, None, :, None]
    k, v = np.where(hole, np.float32(np.nan), k), np.where(hole, np.float32(np.nan), v)
    got = decode(q, k, v, sa.Cache(spec), chunks, **call)
    assert got[0].tobytes() == want[0].tobytes() and got[1].tobytes() == want[1].tobytes()
    k[:, :, 101], v[:, :, 101] = np.nan, np.nan
    got = decode(q, k, v, sa.Cache(spec), chunks, **call)
    assert got[0][:, :, :101].tobytes() == want[0][:, :, :101].tobytes()


@pytest.mark.promise("C1")
def test_caches_of_many_threads() -> None:
    """Each thread with a cache of its own gets what it gets alone."""
    specs = ["dense", "window:20:sinks=2", "topk:5", "random:5"] * 2
    q, k, v = make(sa.parse("topk:5"), tokens=120)
    chunks = cuts(60, 1, tokens=120)
    run = lambda spec: decode(q, k, v, sa.Cache(spec), chunks)[0].tobytes()  # noqa: E731
    alone = [run(spec) for spec in specs]
    with ThreadPoolExecutor(len(specs)) as pool:
        assert list(pool.map(run, specs)) == alone


def test_later_tokens_change_no_earlier_bit() -> None:
    """The rows of a chunk's prefix are those of the shorter chunk where tiles fall alike."""
    q, k, v = make(sa.Dense())
    other = [np.concatenate([x[:, :, :200], 2 + x[:, :, 200:]], 2) for x in (k, v)]
    for spec in ("dense", "window:40:sinks=2", "topk:5"):
        one = decode(q, k, v, sa.Cache(spec), cuts(64, 1, 64))
        two = decode(q, *other, sa.Cache(spec), cuts(64, 1, 64))
        assert one[0][:, :, :200].tobytes() == two[0][:, :, :200].tobytes()
        assert one[0][:, :, 200:].tobytes() != two[0][:, :, 200:].tobytes()


# ---- what else a call may say -------------------------------------------------------------------


@every_spec
def test_masks_and_bias_of_all_tokens(spec: sa.Variant) -> None:
    """mask and bias have a column a token, forgotten ones included; scale, soft-cap and sinks."""
    q, k, v = make(spec, np.float64, 200)
    batch, heads = q.shape[:2]
    rng = np.random.default_rng(5)
    mask = rng.random((batch, heads, 200, 200)) < 0.7
    bias = rng.integers(-64, 65, (heads, 200, 200)) / 64
    params = make_params(spec, fit(spec, (*SHAPE[:3], 200, 200, 16, 8))) or {}
    params = {**params, "sink": rng.standard_normal(heads)}
    call: dict[str, Any] = {"scale": 0.25, "params": params, "causal": True, "return_lse": True}
    if not spec.reads_keys:
        call["softcap"] = 3.0
    want = sa.attention(q, k, v, spec, mask=mask, bias=bias, **call)
    cache = sa.Cache(spec)
    for c in cuts(90, 1, 1, 1, 7, 30, 64, tokens=200):
        now = {"mask": mask[:, :, c, : c.stop], "bias": bias[:, c, : c.stop]}
        got = sa.attention(*(x[:, :, c] for x in (q, k, v)), spec, cache=cache, **call, **now)
        assert_near(tuple(got), (want.out[:, :, c], want.lse[:, :, c]), BOUND["float64"])


@pytest.mark.parametrize("spec", ["dense", "window:30:sinks=2", "topk:9"])
def test_key_mask_of_all_tokens(spec: str) -> None:
    """What is said of all tokens replaces what was said of the first ones."""
    q, k, v = make(sa.parse(spec), np.float64)
    want = sa.attention(q, k, v, spec, causal=True, key_mask=ragged(), return_lse=True)
    cache = sa.Cache(spec)
    sa.attention(*(x[:, :, :150] for x in (q, k, v)), causal=True, cache=cache)
    for c in cuts(30, 1, 2, 7, tokens=150):
        now = slice(c.start + 150, c.stop + 150)
        got = sa.attention(
            *(x[:, :, now] for x in (q, k, v)),
            causal=True,
            cache=cache,
            key_mask=ragged()[:, : now.stop],
            return_lse=True,
        )
        assert_near(tuple(got), (want.out[:, :, now], want.lse[:, :, now]), BOUND["float64"])


@pytest.mark.parametrize("spec", ["dense", "topk:9", "window:window_size=-1/2", "blockmask:16"])
def test_without_causality_all_kept_keys_are_seen(spec: str) -> None:
    parsed = sa.parse(spec)
    q, k, v = make(parsed, np.float64, 64)
    params = make_params(parsed, (*SHAPE[:3], 64, 64, 16, 8))
    cache = sa.Cache(spec)
    sa.attention(q, k, v, cache=cache, params=params)
    got = sa.attention(q[:, :, 5:21], k[:, :, :0], v[:, :, :0], cache=cache, params=params)
    if params:
        params = {"layout": params["layout"][:, 3:]}
    np.testing.assert_array_equal(got, sa.attention(q[:, :, 5:21], k, v, spec, params=params))


def test_prefix_then_tokens() -> None:
    """A prefix that came in one piece sees itself both ways; what follows is causal."""
    q, k, v = make(sa.Dense(), np.float64)
    want = sa.attention(q, k, v, "prefix:40")
    cache = sa.Cache("prefix:40")
    for c in cuts(45, 1, 1, 20):
        got = sa.attention(*(x[:, :, c] for x in (q, k, v)), cache=cache)
        np.testing.assert_allclose(got, want[:, :, c], rtol=0, atol=1e-13)


@every_spec
def test_other_numbers_of_queries(spec: sa.Variant) -> None:
    """Fewer queries than new keys, none, and queries without new keys: the last rows of all."""
    q, k, v = make(spec, np.float64)
    params = make_params(spec, fit(spec, SHAPE))
    want = sa.attention(q, k, v, spec, causal=True, params=params)
    cache = sa.Cache(spec)
    for a, z, n_q in ((0, 100, 100), (100, 164, 3), (164, 165, 0), (165, 300, 40), (300, 300, 1)):
        now = slice(z - n_q, z)
        new = (x[:, :, a:z] for x in (k, v))
        got = sa.attention(q[:, :, now], *new, causal=True, params=params, cache=cache)
        assert got.shape == want[:, :, now].shape
        np.testing.assert_allclose(got, want[:, :, now], rtol=0, atol=1e-13)


def test_leading_axes_and_out() -> None:
    q, k, v = make_qkv((6, 4, 2, 20, 20, 8, 8), seed=3, strided=False)
    many = [x.reshape(3, 2, *x.shape[1:]) for x in (q, k, v)]
    flat, split, single = sa.Cache("topk:4"), sa.Cache("topk:4"), sa.Cache("topk:4")
    out = np.empty((3, 2, 4, 10, 8), np.float32)
    for half in np.s_[:10], np.s_[10:]:
        want = sa.attention(*(x[:, :, half] for x in (q, k, v)), causal=True, cache=flat)
        got = sa.attention(*(x[..., half, :] for x in many), causal=True, cache=split, out=out)
        assert got is out and got.tobytes() == want.tobytes()
        one = sa.attention(*(x[0, :, half] for x in (q, k, v)), causal=True, cache=single)
        assert one.tobytes() == want[0].tobytes()
    with pytest.raises(sa.ArgumentError, match="out must not overlap k"):
        kept = split.append(k[:, :, :1], v[:, :, :1])[0]
        target = kept.view()[:, :, -1:].reshape(3, 2, 2, 1, 8)
        sa.attention(*(x[:, :, :2, :1] for x in many), causal=True, cache=split, out=target)


def test_torch_in_torch_out(torch: ModuleType) -> None:
    q, k, v = make(sa.Dense())
    want = decode(q, k, v, sa.Cache("window:30"), cuts(64, 1, 64))[0]
    for dtype in (torch.float32, torch.bfloat16):
        cache = sa.Cache("window:30")
        for c in cuts(64, 1, 64):
            now = (torch.from_numpy(x[:, :, c]).to(dtype) for x in (q, k, v))
            got = sa.attention(*now, causal=True, cache=cache)
            assert isinstance(got, torch.Tensor) and got.dtype == dtype
            bound = 1e-6 if dtype == torch.float32 else 0.05
            assert np.abs(got.float().numpy() - want[:, :, c]).max() <= bound
        assert cache.dtype == str(dtype).removeprefix("torch.")
    cache = sa.Cache(dtype=torch.float16)
    now = [torch.from_numpy(x[:, :, :5]) for x in (q, k, v)]
    sa.attention(*now, causal=True, cache=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.dtype == "float16"
    with pytest.raises(sa.NotSupported, match="no gradient goes through a cache"):
        sa.attention(now[0].requires_grad_(), *now[1:], causal=True, cache=cache)
    with torch.no_grad():
        sa.attention(*now, causal=True, cache=cache)
    assert cache.get_seq_length() == 10


def test_no_memory_leaves_the_cache_alone() -> None:
    """Each allocation of the core failing in turn: the same cache goes on as if nothing was."""
    q, k, v = make(sa.parse("window:30+topk:3"))
    chunks = cuts(64, 1)[:4]
    want = decode(q, k, v, sa.Cache("window:30+topk:3"), chunks)[0]
    cache = sa.Cache("window:30+topk:3")
    outs, failures = [], 0
    for c in chunks:
        for n in range(1, 200):
            _core.trim()
            _core.fail_set(n)
            try:
                outs.append(decode(q, k, v, cache, [c])[0])
                break
            except sa.OutOfMemory:
                failures += 1
                assert cache.get_seq_length() == c.start
            finally:
                _core.fail_set(0)
    assert failures > 4
    assert np.concatenate(outs, 2).tobytes() == want.tobytes()
