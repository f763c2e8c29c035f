"""attention_vjp against the definitions: numbers, shapes, dtypes, bits, bad values, wrong calls."""

from __future__ import annotations

import functools
import itertools
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import (
    CAUSAL_SPECS,
    EVERY_SPEC,
    causal_ids,
    causals,
    expected_rows,
    fit,
    make_params,
    make_qkv,
    random_masks,
)
from reference import attention as ref
from reference import gradients as ref_grad

import sparseattn as sa
from sparseattn import _core
from sparseattn.variants import Variant, variants

# The project's ceilings of gradients: |error| <= atol + rtol |value|.
CEILING = {np.dtype("f4"): (1e-5, 1e-4), np.dtype("f8"): (1e-10, 1e-10)}
SHAPE = (2, 6, 2, 33, 70, 16, 24)
SEED, SHARE = 12345, 0.3


def assert_gradient(ours: np.ndarray, want: np.ndarray, naive: np.ndarray | None = None) -> None:
    """Below the ceilings, and at most twice as far from float64 as a naive run in our type: in the
    root mean square, since the largest of thousands of roundings is a matter of luck."""
    assert ours.shape == want.shape
    atol, rtol = CEILING[ours.dtype]
    error = np.abs(ours - want)
    assert (error <= atol + rtol * np.abs(want)).all(), f"error {error.max():.3g}"
    if naive is not None and error.size:
        ours_rms, naive_rms = (np.sqrt(np.mean((x - want) ** 2)) for x in (ours, naive))
        bound = 2 * naive_rms + np.finfo(np.float32).eps * np.sqrt(np.mean(want**2))
        assert ours_rms <= bound, f"error {ours_rms:.3g}, bound {bound:.3g}"


def make_call(
    spec: Variant, causal: Any, shape: tuple[int, ...], dtype: Any, rich: bool
) -> tuple[list[np.ndarray], dict[str, Any], dict[str, Any]]:
    """Inputs of attention_vjp, and those of the reference; ``rich``: with all that it takes."""
    _, heads, _, _, n_k, *_ = shape
    q, k, v = make_qkv(shape, dtype, seed=7)
    call = {"causal": causal, "params": make_params(spec, shape)}
    if not rich:
        kept, full = expected_rows(spec, q, k, call)
        return [q, k, v], call, {"see": kept, "full": full}
    rng = np.random.default_rng(list(shape))
    terms = {"scale": 0.4, "softcap": 3.0, "bias": rng.standard_normal((heads, 1, n_k))}
    terms["bias"] = terms["bias"].astype(dtype)
    sink = rng.standard_normal(heads).astype(dtype)
    call |= random_masks(shape)
    kept, full = expected_rows(spec, q, k, call, **terms)
    call |= terms | {"dropout_p": SHARE, "seed": SEED}
    call["params"] = {**(call["params"] or {}), "sink": sink}
    keep = np.concatenate(list(keep_pieces(spec, shape)), 1)
    return [q, k, v], call, {"see": kept, "full": full, "sink": sink, "keep": keep, **terms}


def keep_pieces(spec: Variant, shape: tuple[int, ...]) -> Any:
    """Dropout of the pieces of a plan, each counting its heads from 0 under a seed of its own."""
    batch, heads, kv_heads, n_q, n_k, *_ = shape
    runs = spec.ranges(heads // kv_heads) if isinstance(spec, sa.PerHead) else [(0, heads)]
    for begin, end in runs:
        seed = (SEED + begin * (0x9E3779B97F4A7C15 // 2)) % 2**63
        yield ref_grad.keep_weights(seed, SHARE, (batch, end - begin, n_q, n_k))


def gradients_of(vjp: Any, dout: Any, dlse: Any) -> dict[str, np.ndarray]:
    dq, dk, dv, dbias, dparams = vjp.pullback(dout, dlse)
    return {"dq": dq, "dk": dk, "dv": dv, "dbias": dbias, "dsink": (dparams or {}).get("sink")}


def straight_heads(spec: Variant, heads: int) -> np.ndarray:
    specs = spec.specs if isinstance(spec, sa.PerHead) else [spec] * heads
    return np.array(["straight_through" in str(one) for one in specs])


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize(("spec", "causal"), CAUSAL_SPECS, ids=causal_ids)
def test_gradients_match_the_reference(spec: Variant, causal: Any, rich: bool) -> None:
    shape = fit(spec, SHAPE)
    rng = np.random.default_rng(8)
    results = {}
    for dtype in (np.float64, np.float32):
        args, call, terms = make_call(spec, causal, shape, dtype, rich)
        vjp = sa.attention_vjp(*args, spec, **call)
        if dtype == np.float64:
            dout = rng.standard_normal(vjp.out.shape)
            dlse = np.where(np.isneginf(vjp.lse), 0, rng.standard_normal(vjp.lse.shape))
        given = [x.astype(dtype) for x in (dout, dlse)]
        found = gradients_of(vjp, *given)
        want = ref_grad.gradients(*args, dout=given[0], dlse=given[1], **terms)
        if "straight_through" in str(spec):
            masks = {n: call[n] for n in ("causal", "mask", "key_mask") if n in call}
            see = ref.visible(*terms["see"].shape, **masks)
            dense = ref_grad.gradients(
                *args, dout=given[0], dlse=given[1], **{**terms, "see": see, "full": None}
            )
            assert np.abs(dense.dq - want.dq).max() > 1e-2  # another gradient than the kept keys'
            want = dense._replace(dv=want.dv)
        naive = {}
        if dtype == np.float32 and "straight_through" not in str(spec):
            naive = ref_grad.gradients(
                *args, dout=given[0], dlse=given[1], **terms, compute=np.float32
            )._asdict()
        for name, x in want._asdict().items():
            assert (found[name] is None) == (x is None), name
            if x is not None:
                assert found[name].dtype == dtype
                assert_gradient(found[name], x, naive.get(name))
        results[dtype] = found
    assert set(results) == {np.float64, np.float32}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("spec", ["dense", "window:16:sinks=2", "topk:9", "topk:9:placement=post"])
def test_gradients_of_awkward_shapes(
    spec: str, shape: tuple[int, ...], dtype: Any, isa: str, threads: int
) -> None:
    args, call, dout, want = awkward(spec, shape, dtype)
    found = sa.attention_vjp(*args, spec, **call).pullback(dout)
    for got, x in zip(found[:3], want[:3], strict=True):
        assert_gradient(got, x)


@functools.cache
def awkward(spec: str, shape: tuple[int, ...], dtype: Any) -> tuple[Any, ...]:
    args, call, terms = make_call(sa.parse(spec), True, shape, dtype, False)
    q, _, v = args
    dout = np.random.default_rng(1).standard_normal((*q.shape[:3], v.shape[3])).astype(dtype)
    return args, call, dout, ref_grad.gradients(*args, dout=dout, **terms)


def test_the_forward_of_options_matches_the_reference(isa: str) -> None:
    for spec in EVERY_SPEC:
        shape = fit(spec, SHAPE)
        for dtype, bound in ((np.float32, 1e-5), (np.float64, 1e-12)):
            args, call, want = rich_forward(spec, shape, dtype)
            got_both = sa.attention(*args, spec, return_lse=True, **call)
            for got, x in zip(got_both, want, strict=True):
                assert (np.abs(got - x) <= bound * (1 + np.abs(x))).all(), spec


@functools.cache
def rich_forward(spec: Variant, shape: tuple[int, ...], dtype: Any) -> tuple[Any, ...]:
    args, call, terms = make_call(spec, causals(spec)[-1], shape, dtype, True)
    return args, call, ref_grad.attend(*args, **terms)


def test_gradients_have_the_shapes_of_the_inputs() -> None:
    """Leading axes that were broadcast are summed back, whoever left them out."""
    rng = np.random.default_rng(2)
    q = rng.standard_normal((3, 1, 4, 7, 8))
    k = rng.standard_normal((2, 2, 9, 8))
    v = np.broadcast_to(rng.standard_normal((2, 9, 5)), (1, 2, 2, 9, 5))
    bias = rng.standard_normal((2, 1, 1, 9))
    vjp = sa.attention_vjp(q, k, v, bias=bias)
    assert vjp.out.shape == (3, 2, 4, 7, 5)
    dout = rng.standard_normal(vjp.out.shape)
    got = gradients_of(vjp, dout, None)
    whole = (3, 2)
    flat = [np.broadcast_to(x, whole + x.shape[-3:]).reshape(6, *x.shape[-3:]) for x in (q, k, v)]
    wide = np.broadcast_to(bias, (3, 2, 4, 7, 9)).reshape(6, 4, 7, 9)
    want = ref_grad.gradients(
        *flat, np.ones((6, 4, 7, 9), bool), dout.reshape(6, 4, 7, 5), bias=wide
    )
    for x, name in zip((q, k, v, bias), ("dq", "dk", "dv", "dbias"), strict=True):
        full = getattr(want, name)
        full = full.reshape(3, 2, *full.shape[1:])
        assert_gradient(got[name], ref_grad.reduce_to(full, x.shape))


@pytest.mark.parametrize("size", [(), (1,), (9,), (7, 1), (7, 9), (4, 1, 1), (1, 1, 1, 9)])
def test_the_bias_gets_its_own_shape(size: tuple[int, ...]) -> None:
    q, k, v = make_qkv((2, 4, 2, 7, 9, 8, 5), np.float64)
    bias = np.random.default_rng(3).standard_normal(size)
    vjp = sa.attention_vjp(q, k, v, bias=bias, causal=True)
    dout = np.random.default_rng(4).standard_normal(vjp.out.shape)
    see = ref.visible(2, 4, 7, 9, causal=True)
    want = ref_grad.gradients(q, k, v, see, dout, bias=bias.reshape((1,) * (4 - bias.ndim) + size))
    assert want.dbias is not None
    assert_gradient(gradients_of(vjp, dout, None)["dbias"], want.dbias.reshape(size))


def test_a_stretched_bias_has_a_gradient_for_each_element() -> None:
    q, k, v = make_qkv((2, 4, 2, 7, 9, 8, 5), np.float64)
    bias = np.broadcast_to(np.linspace(-1, 1, 9), (2, 4, 7, 9))
    dout = np.random.default_rng(4).standard_normal((2, 4, 7, 5))
    got = gradients_of(sa.attention_vjp(q, k, v, bias=bias), dout, None)["dbias"]
    want = gradients_of(sa.attention_vjp(q, k, v, bias=bias.copy()), dout, None)["dbias"]
    assert got.shape == (2, 4, 7, 9) and got.tobytes() == want.tobytes()


def test_half_inputs_have_half_gradients() -> None:
    """Computed in float32 from the rounded inputs, rounded once; dout is one of the inputs."""
    q, k, v = (x.astype(np.float16) for x in make_qkv((2, 4, 2, 33, 40, 16, 8)))
    bias = np.random.default_rng(0).standard_normal((33, 40)).astype(np.float16)
    vjp = sa.attention_vjp(q, k, v, "topk:9", causal=True, bias=bias)
    assert vjp.out.dtype == np.float16 and vjp.lse.dtype == np.float32
    dout = np.random.default_rng(1).standard_normal(vjp.out.shape).astype(np.float16)
    got = gradients_of(vjp, dout, None)
    wide = [x.astype(np.float64) for x in (q, k, v, bias)]
    plan = sa.plan(q, k, "topk:9", causal=True, bias=bias)
    want = ref_grad.gradients(
        *wide[:3], plan.to_mask(), dout.astype(float), bias=wide[3][None, None]
    )
    for name, x in zip(("dq", "dk", "dv", "dbias"), want[:4], strict=True):
        assert got[name].dtype == np.float16
        # 2^-11 for each rounding of an output, the output's own through delta
        np.testing.assert_allclose(got[name], np.reshape(x, got[name].shape), rtol=2e-3, atol=4e-3)


def test_any_layout_of_dout() -> None:
    q, k, v = make_qkv((2, 4, 2, 33, 40, 16, 8))
    vjp = sa.attention_vjp(q, k, v)
    dout = np.random.default_rng(1).standard_normal((2, 33, 8, 4)).astype(np.float32)
    layouts = [dout.transpose(0, 3, 1, 2), dout.transpose(0, 3, 1, 2)[:, ::-1, :, ::-1]]
    layouts += [np.broadcast_to(np.float32(1.5), (2, 4, 33, 8))]
    for x in layouts:
        want = gradients_of(vjp, np.ascontiguousarray(x), None)
        for name, grad in gradients_of(vjp, x, None).items():
            assert grad is want[name] is None or grad.tobytes() == want[name].tobytes()


def test_what_is_left_out_is_zero() -> None:
    q, k, v = make_qkv(SHAPE, np.float64)
    sink = np.linspace(-1, 1, 6)
    rng = np.random.default_rng(0)
    for spec in ("dense", "topk:9:placement=post", "topk:9:gradient=straight_through"):
        vjp = sa.attention_vjp(q, k, v, spec, causal=True, params={"sink": sink})
        dout, dlse = rng.standard_normal(vjp.out.shape), rng.standard_normal(vjp.lse.shape)
        for part, whole in (((dout, None), (dout, 0 * dlse)), ((None, dlse), (0 * dout, dlse))):
            got, want = (gradients_of(vjp, *given) for given in (part, whole))
            for name in ("dq", "dk", "dv", "dsink"):
                np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        both, alone = gradients_of(vjp, dout, dlse), gradients_of(vjp, dout, None)
        assert np.abs(both["dq"] - alone["dq"]).max() > 1e-3


def test_a_spec_and_its_plan_have_one_gradient() -> None:
    for spec in EVERY_SPEC:
        shape = fit(spec, SHAPE)
        q, k, v = make_qkv(shape)
        call = {"causal": causals(spec)[-1], "params": make_params(spec, shape)}
        one = sa.attention_vjp(q, k, v, spec, **call)
        two = sa.attention_vjp(q, k, v, sa.plan(q, k, spec, **call))
        for got, want in zip(one.pullback(one.out)[:3], two.pullback(one.out)[:3], strict=True):
            assert got.tobytes() == want.tobytes(), spec


def test_packed_sequences_have_the_gradients_of_each() -> None:
    q, k, v = make_qkv((2, 6, 2, 70, 70, 16, 24), np.float64)
    bias = np.random.default_rng(0).standard_normal((6, 70, 70))
    params = {"sink": np.linspace(-1, 1, 6)}
    cuts = [0, 13, 13, 40, 70]
    for spec in ("dense", "window:9", "topk:7:placement=post", "topk:7:gradient=straight_through"):
        packed = sa.attention_vjp(
            q, k, v, spec, causal=True, bias=bias, params=params, cu_seqlens=cuts
        )
        dout = np.random.default_rng(1).standard_normal(packed.out.shape)
        got = gradients_of(packed, dout, None)
        want: dict[str, Any] = {name: np.zeros_like(x) for name, x in got.items()}
        for begin, end in itertools.pairwise(cuts):
            at = np.s_[:, :, begin:end]
            own = bias[:, begin:end, begin:end]
            one = sa.attention_vjp(q[at], k[at], v[at], spec, causal=True, bias=own, params=params)
            for name, x in gradients_of(one, dout[at], None).items():
                to = {"dbias": np.s_[:, begin:end, begin:end], "dsink": np.s_[:]}.get(name, at)
                want[name][to] += x
        for name, x in want.items():
            np.testing.assert_allclose(got[name], x, rtol=1e-11, atol=1e-12, err_msg=name)


def test_same_bits_for_any_number_of_threads(with_threads: Callable[[int], None]) -> None:
    for spec in EVERY_SPEC:
        shape = fit(spec, (2, 6, 2, 130, 150, 16, 24))
        args, call, _ = make_call(spec, causals(spec)[-1], shape, np.float32, True)
        results = []
        for n in (1, 2, 3, 5):
            with_threads(n)
            vjp = sa.attention_vjp(*args, spec, **call)
            grads = gradients_of(vjp, vjp.out, vjp.lse)
            results.append([x.tobytes() for x in (vjp.out, vjp.lse, *grads.values())])
        assert all(result == results[0] for result in results), spec


# ---- dropout -------------------------------------------------------------------------------------


def test_a_seed_says_what_is_dropped() -> None:
    q, k, v = make_qkv(SHAPE)
    first = sa.attention(q, k, v, dropout_p=0.5, seed=3)
    assert sa.attention(q, k, v, dropout_p=0.5, seed=3).tobytes() == first.tobytes()
    for other in ({"seed": 4}, {"seed": 2**63 - 1}, {}):
        assert np.abs(sa.attention(q, k, v, dropout_p=0.5, **other) - first).max() > 0.01
    drawn = [sa.attention(q, k, v, dropout_p=0.5) for _ in range(2)]
    assert (drawn[0] != drawn[1]).any()
    assert sa.attention(q, k, v, dropout_p=0.0, seed=3).tobytes() == sa.attention(q, k, v).tobytes()
    lse = sa.attention(q, k, v, dropout_p=0.5, return_lse=True).lse
    np.testing.assert_allclose(lse, sa.attention(q, k, v, return_lse=True).lse, rtol=1e-6)


def test_the_pullback_drops_what_its_own_call_dropped() -> None:
    """out is linear in v, so <dout, out> = <dv, v> holds under the same mask and no other."""
    q, k, v = make_qkv(SHAPE, np.float64)
    for spec in ("dense", "topk:9", "perhead(3*topk:9|3*window:20)"):
        vjp = sa.attention_vjp(q, k, v, spec, causal=True, dropout_p=0.5)
        dout = np.random.default_rng(0).standard_normal(vjp.out.shape)
        for _ in range(2):
            inner = (vjp.pullback(dout).dv * v).sum()
            np.testing.assert_allclose(inner, (dout * vjp.out).sum(), rtol=1e-12)


def test_heads_and_batches_drop_apart() -> None:
    """Values that say their key show the mask: shares are right, and no two rows alike."""
    shape = (2, 6, 2, 4, 512, 8, 512)
    q, k = np.zeros((2, 6, 4, 8)), np.zeros((2, 2, 512, 8))
    v = np.broadcast_to(np.eye(512), (2, 2, 512, 512))
    for spec in ("dense", "perhead(dense|topk:512|4*dense)"):
        keep = sa.attention(q, k, v, spec, dropout_p=0.25, seed=1) > 0
        assert abs(keep.mean() - 0.75) < 0.02
        rows = keep.reshape(-1, 512)
        alike = (rows[:, None] == rows[None]).mean(-1)[~np.eye(len(rows), dtype=bool)]
        assert abs(alike.mean() - 0.625) < 0.01 and alike.max() < 0.75
    want = ref_grad.keep_weights(1, 0.25, (*shape[:2], 4, 512)) > 0
    np.testing.assert_array_equal(sa.attention(q, k, v, dropout_p=0.25, seed=1) > 0, want)


# ---- bad values ----------------------------------------------------------------------------------


def frozen(spec: Variant) -> tuple[Any, ...]:
    """A plan made before anything was bad, so that no selection changes."""
    shape = fit(spec, (2, 6, 2, 70, 90, 16, 24))
    q, k, v = make_qkv(shape, seed=5, strided=False)
    mask = np.ones((2, 1, 70, 90), bool)
    mask[..., 41] = False  # a key that nobody sees
    mask[1, :, 33] = False  # a row that sees nothing
    plan = sa.plan(q, k, spec, causal=causals(spec)[-1], params=make_params(spec, shape), mask=mask)
    return q, k, v, plan


@pytest.mark.promise("A6")
@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
def test_bad_values_stay_where_they_are(spec: Variant, isa: str) -> None:
    q, k, v, plan = frozen(spec)
    dout = np.random.default_rng(6).standard_normal((*q.shape[:3], v.shape[3]), np.float32)
    dlse = np.zeros(q.shape[:3], np.float32)
    clean = gradients_of(sa.attention_vjp(q, k, v, plan), dout, dlse)
    kept = plan.to_mask()
    straight = straight_heads(spec, q.shape[1])
    seen = kept | (straight[:, None, None] & plan.problem.mask)
    empty = ~kept.any(-1)
    assert empty[1, :, 33].all() and not clean["dq"][empty & ~seen.any(-1)].any()
    assert not clean["dk"][:, :, 41].any() and not clean["dv"][:, :, 41].any()
    for bad in (np.nan, np.inf):
        # what nobody sees, and rows that see nothing
        q2, k2, v2, dout2, dlse2 = (x.copy() for x in (q, k, v, dout, dlse))
        k2[:, :, 41], v2[:, :, 41] = bad, bad
        q2[1, :, 33], dout2[1, :, 33], dlse2[1, :, 33] = bad, bad, bad
        got = gradients_of(sa.attention_vjp(q2, k2, v2, plan), dout2, dlse2)
        for name in ("dq", "dk", "dv"):
            assert got[name].tobytes() == clean[name].tobytes(), (name, bad)


@pytest.mark.promise("A6")
@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
@pytest.mark.parametrize("where", ["q", "dout"])
def test_a_nan_row_reaches_its_keys_alone(spec: Variant, where: str) -> None:
    q, k, v, plan = frozen(spec)
    dout = np.random.default_rng(6).standard_normal((*q.shape[:3], v.shape[3]), np.float32)
    clean = gradients_of(sa.attention_vjp(q, k, v, plan), dout, None)
    (q2, dout2), (b, h, i) = (q.copy(), dout.copy()), (0, 3, 50)
    (q2 if where == "q" else dout2)[b, h, i] = np.nan
    got = gradients_of(sa.attention_vjp(q2, k, v, plan), dout2, None)
    kept = plan.to_mask()[b, h, i]
    whole = straight_heads(spec, 6)[h] or "post" in str(plan.spec)
    seen = plan.problem.mask[b, 0, i] if whole else kept
    rows = np.ones(q.shape[:3], bool)
    rows[b, h, i] = False
    assert np.isnan(got["dq"][b, h, i]).all() == kept.any()
    assert got["dq"][rows].tobytes() == clean["dq"][rows].tobytes()
    keys = np.ones(k.shape[:3], bool)
    keys[b, h // 3][seen] = False
    for name in ("dk", "dv"):
        assert got[name][keys].tobytes() == clean[name][keys].tobytes(), name
        assert np.isnan(got[name][b, h // 3][kept]).all(), name


@pytest.mark.promise("A6")
@pytest.mark.parametrize("spec", ["dense", "window:9", "window:9+random:4"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_an_infinite_row_beside_a_sink(spec: str, bad: float, isa: str) -> None:
    """All its scores are -inf and the sink keeps lse finite; keys that it does not see keep their
    bits all the same."""
    q, k, v = make_qkv((1, 2, 2, 70, 70, 16, 24), seed=5, strided=False)
    k[..., 3] = -np.copysign(1 + np.abs(k[..., 3]), bad)
    plan = sa.plan(q, k, spec, causal=True)
    dout = np.random.default_rng(6).standard_normal((*q.shape[:3], v.shape[3]), np.float32)
    params = {"sink": np.linspace(-1, 1, 2)}
    clean = gradients_of(sa.attention_vjp(q, k, v, plan, params=params), dout, None)
    q[0, 1, 40, 3] = bad
    vjp = sa.attention_vjp(q, k, v, plan, params=params)
    assert np.isfinite(vjp.lse).all() and not vjp.out[0, 1, 40].any()
    got = gradients_of(vjp, dout, None)
    hidden = ~plan.to_mask()[0, 1, 40]
    assert hidden.any()
    for name in ("dk", "dv"):
        assert got[name][0, 0].tobytes() == clean[name][0, 0].tobytes(), name
        assert got[name][0, 1, hidden].tobytes() == clean[name][0, 1, hidden].tobytes(), name


@pytest.mark.promise("A6")
@pytest.mark.parametrize("spec", ["dense", "topk:9", "topk:9:placement=post", "window:20:sinks=2"])
@pytest.mark.parametrize("scale", [10.0, 1e3, 1e30])
def test_large_scores(spec: str, scale: float) -> None:
    """Weights of near-ties carry the rounding of their scores, as in any float32 program, and no
    more: out and dv are as good as a naive run's, and gradients of scores are finite."""
    q, k, v = make_qkv(SHAPE, seed=3)
    kept, full = expected_rows(sa.parse(spec), q, k, {"causal": True}, scale=scale)
    vjp = sa.attention_vjp(q, k, v, spec, causal=True, scale=scale)
    dout = np.random.default_rng(0).standard_normal(vjp.out.shape).astype(np.float32)
    got = vjp.pullback(dout)
    assert all(np.isfinite(x).all() for x in (vjp.out, *got[:3]))
    given = {"full": full, "scale": scale}
    want, naive = (
        (
            ref.attention(q, k, v, kept, compute=compute, **given)[0],
            ref_grad.gradients(q, k, v, kept, dout, compute=compute, **given).dv,
        )
        for compute in (np.float64, np.float32)
    )
    for ours, exact, plain in zip((vjp.out, got.dv), want, naive, strict=True):
        error, bound = (np.sqrt(np.mean((x - exact) ** 2)) for x in (ours, plain))
        assert error <= 3 * bound + 1e-6, f"error {error:.3g}, naive {bound:.3g}"


# ---- straight-through ----------------------------------------------------------------------------


def test_straight_through_learns_of_keys_left_out() -> None:
    q, k, v = make_qkv(SHAPE, np.float64)
    call: dict[str, Any] = {"causal": True}
    spec = sa.TopK(9, gradient="straight_through")
    plain = sa.attention_vjp(q, k, v, "topk:9", **call)
    vjp = sa.attention_vjp(q, k, v, spec, **call)
    assert vjp.out.tobytes() == plain.out.tobytes()
    dout = np.random.default_rng(0).standard_normal(vjp.out.shape)
    got, selected = vjp.pullback(dout), plain.pullback(dout)
    dense = sa.attention_vjp(q, k, v, **call).pullback(dout)
    assert got.dv.tobytes() == selected.dv.tobytes()
    np.testing.assert_array_equal(got.dq, dense.dq)
    np.testing.assert_array_equal(got.dk, dense.dk)
    joined = sa.attention_vjp(q, k, v, spec + "window:4", **call).pullback(dout)
    np.testing.assert_array_equal(joined.dq, dense.dq)
    heads = sa.PerHead([spec] * 3 + ["topk:9"] * 3)
    split = sa.attention_vjp(q, k, v, heads, **call).pullback(dout)
    np.testing.assert_array_equal(split.dq[:, :3], dense.dq[:, :3])
    np.testing.assert_array_equal(split.dq[:, 3:], selected.dq[:, 3:])
    np.testing.assert_array_equal(split.dk[:, 0], dense.dk[:, 0])


# ---- wrong calls, memory -------------------------------------------------------------------------


def test_wrong_gradients_are_answered() -> None:
    q, k, v = make_qkv((2, 4, 2, 9, 11, 16, 8))
    vjp = sa.attention_vjp(q, k, v)
    dout, dlse = np.ones_like(vjp.out), np.ones_like(vjp.lse)
    with pytest.raises(sa.ArgumentError, match=r"dout must have shape \(2, 4, 9, 8\) as out has"):
        vjp.pullback(dout[0])
    with pytest.raises(sa.ArgumentError, match=r"dlse must have shape \(2, 4, 9\) as lse has"):
        vjp.pullback(dout, dlse[..., None])
    with pytest.raises(sa.DtypeError, match=r"dout must have dtype float32.*astype\(out\.dtype\)"):
        vjp.pullback(dout.astype(np.float64))
    with pytest.raises(sa.DtypeError, match=r"pass np\.asarray\(dout, out\.dtype\)"):
        vjp.pullback(dout.tolist())
    with pytest.raises(sa.DtypeError, match=r"dlse must have dtype float32 as lse has, got int64"):
        vjp.pullback(dout, dlse.astype(np.int64))
    with pytest.raises(sa.UnknownArgument, match=r"attention_vjp\(\) has no argument cache"):
        sa.attention_vjp(q, k, v, cache=object())
    with pytest.raises(sa.ArgumentError, match="bias"):
        sa.attention_vjp(q, k, v, bias=np.zeros((3, 9, 11), np.float32))
    assert vjp.pullback(dout, dlse).dq.shape == q.shape  # nothing was lost


def test_a_compose_rule_of_its_own_has_no_gradient_yet() -> None:
    @dataclass(frozen=True, slots=True)
    class Twice(Variant):
        kind: ClassVar[str] = "twice"

        def apply(self, ops: Any, q: Any, k: Any, v: Any, params: Any) -> Any:
            ops.attend(q, k, v, sa.Dense())
            return ops.attend(q, k, v, sa.TopK(3))

    assert "twice" not in variants()
    q, k, v = make_qkv((2, 4, 2, 9, 11, 16, 8))
    assert sa.attention(q, k, v, Twice()).shape == (2, 4, 9, 8)
    with pytest.raises(sa.NotSupported, match="twice"):
        sa.attention_vjp(q, k, v, Twice())


def test_empty_sizes() -> None:
    for shape in ((0, 4, 2, 5, 7, 8, 3), (2, 4, 2, 0, 7, 8, 3), (2, 4, 2, 5, 0, 8, 3)):
        q, k, v = make_qkv(shape)
        for spec in ("dense", "topk:3", "topk:3:placement=post"):
            vjp = sa.attention_vjp(q, k, v, spec, causal=True)
            got = vjp.pullback(np.ones_like(vjp.out), np.ones_like(vjp.lse))
            for x, grad in zip((q, k, v), got[:3], strict=True):
                assert grad.shape == x.shape and not grad.any()


def bytes_a_token(n: int) -> float:
    """Peak memory of one causal head, forward and backward, beside q, k, v."""
    q, k, v = make_qkv((1, 1, 1, n, n, 16, 16), strided=False)
    _core.trim()
    before = _core.live_bytes()
    _core.peak_reset()
    tracemalloc.start()
    vjp = sa.attention_vjp(q, k, v, causal=True)
    assert np.isfinite(vjp.pullback(vjp.out).dq).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (peak + _core.peak_bytes() - before) / n


@pytest.mark.parametrize("n", [16_384, pytest.param(65_536, marks=pytest.mark.nightly)])
def test_memory_is_linear_in_the_length(n: int, clean_memory: None) -> None:
    """out and three gradients are 256 bytes a token; n_q x n_k would be 64 KiB at least."""
    assert bytes_a_token(n) <= 1.2 * bytes_a_token(n // 4)
    assert bytes_a_token(n) <= 512
