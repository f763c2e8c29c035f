"""The gradient of merge: finite differences, definitions, and whole attention made of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import make_qkv
from reference import attention as ref
from reference import gradients as ref_grad

import sparseattn as sa

Pairs = list[tuple[np.ndarray, np.ndarray]]


def make_parts(dtype: Any = np.float64, lead: tuple[int, ...] = (2,), n: int = 3) -> Pairs:
    """Random parts; some rows are seen by some parts only, one by one, one by none."""
    rng = np.random.default_rng(0)
    outs = rng.standard_normal((n, *lead, 3, 70, 5))
    lses = 2 * rng.standard_normal((n, *lead, 3, 70))
    lses[rng.random(lses.shape) < 0.2] = -np.inf
    lses[:, ..., 7] = -np.inf
    lses[:, ..., 8] = -np.inf
    lses[0, ..., 8] = 1.5
    outs[np.isneginf(lses)] = 0
    return [(o.astype(dtype), x.astype(dtype)) for o, x in zip(outs, lses, strict=True)]


def make_grads(parts: Pairs, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    out, lse = sa.merge(parts)
    rng = np.random.default_rng(seed)
    dout = rng.standard_normal(out.shape).astype(out.dtype)
    dlse = np.where(np.isneginf(lse), 0, rng.standard_normal(lse.shape)).astype(lse.dtype)
    return dout, dlse


def test_gradients_are_slopes() -> None:
    parts = make_parts()
    dout, dlse = make_grads(parts)
    grads = sa.merge_vjp(parts).pullback(dout, dlse)
    rng = np.random.default_rng(2)
    for at, which in np.ndindex(3, 2):
        for _ in range(10):
            x = parts[at][which]
            step = np.where(np.isneginf(x), 0, rng.standard_normal(x.shape))
            sides = []
            for eps in (1e-6, -1e-6):
                moved: list[Any] = [list(part) for part in parts]
                moved[at][which] = x + eps * step
                out, lse = sa.merge(moved)
                sides.append((out * dout).sum() + (np.where(np.isneginf(lse), 0, lse) * dlse).sum())
            want = (sides[0] - sides[1]) / 2e-6
            got = (grads[at][which] * step).sum()
            assert abs(got - want) <= 1e-5 + 1e-3 * abs(want)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_gradients_match_the_definition(
    dtype: Any, bound: float, lead: tuple[int, ...], threads: int
) -> None:
    parts = make_parts(dtype, lead)
    dout, dlse = make_grads(parts)
    vjp = sa.merge_vjp(parts)
    assert vjp.out.tobytes() == sa.merge(parts).out.tobytes()
    wide = [(o.astype(np.float64), x.astype(np.float64)) for o, x in parts]
    want = ref_grad.merge_gradients(wide, dout.astype(float), dlse.astype(float))
    for got in (vjp.pullback(dout, dlse), vjp.pullback(dout, dlse)):
        for pair, wanted, part in zip(got, want, parts, strict=True):
            for x, y, like in zip(pair, wanted, part, strict=True):
                assert (x.shape, x.dtype) == (like.shape, like.dtype)
                assert (np.abs(x - y) <= 4 * bound * (1 + np.abs(y))).all()
    assert not any(x[..., 7, :].any() for x, _ in vjp.pullback(dout))  # seen by no part
    np.testing.assert_array_equal(vjp.pullback(dout)[0][0][..., 8, :], dout[..., 8, :])


def test_what_is_left_out_is_zero() -> None:
    parts = make_parts()
    dout, dlse = make_grads(parts)
    vjp = sa.merge_vjp(parts)
    for given, whole in (((dout,), (dout, 0 * dlse)), ((None, dlse), (0 * dout, dlse))):
        for got, want in zip(vjp.pullback(*given), vjp.pullback(*whole), strict=True):
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("sink", [False, True])
def test_parts_have_the_gradients_of_the_whole(sink: bool) -> None:
    """Attention in three parts of the keys; a learned sink is one more part, (0, sigma)."""
    q, k, v = make_qkv((2, 6, 2, 33, 50, 16, 24), np.float64)
    mask = np.random.default_rng(3).random((2, 6, 33, 50)) < 0.5
    mask[:, :, 4, :20] = False
    params = {"sink": np.linspace(-1, 2, 6)} if sink else None
    whole = sa.attention_vjp(q, k, v, mask=mask, params=params)
    cuts = np.s_[:20, 20:21, 21:]
    vjps = [sa.attention_vjp(q, k[:, :, c], v[:, :, c], mask=mask[..., c]) for c in cuts]
    parts = [(vjp.out, vjp.lse) for vjp in vjps]
    if params:
        sigma = np.broadcast_to(params["sink"][:, None], (2, 6, 33))
        parts.append((np.zeros_like(parts[0][0]), sigma))
    joined = sa.merge_vjp(parts)
    np.testing.assert_allclose(joined.out, whole.out, atol=1e-13)
    np.testing.assert_allclose(joined.lse, whole.lse, atol=1e-13)
    dout, dlse = make_grads(parts)
    want = whole.pullback(dout, dlse)
    pieces = joined.pullback(dout, dlse)
    grads = [vjp.pullback(*d) for vjp, d in zip(vjps, pieces, strict=False)]
    np.testing.assert_allclose(sum(g.dq for g in grads), want.dq, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([g.dk for g in grads], 2), want.dk, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([g.dv for g in grads], 2), want.dv, atol=1e-12)
    if params:
        dsink = pieces[-1][1].sum((0, 2))
        np.testing.assert_allclose(dsink, want.dparams["sink"], atol=1e-12)


def test_half_parts() -> None:
    """Outputs in half precision, their log-sum-exps in float32, as attention gives them."""
    q, k, v = (x.astype(np.float16) for x in make_qkv((2, 4, 2, 9, 40, 16, 8)))
    parts = [sa.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in np.s_[:9, 9:]]
    vjp = sa.merge_vjp(parts)
    assert vjp.out.dtype == np.float16
    dout = np.random.default_rng(0).standard_normal(vjp.out.shape).astype(np.float16)
    wide = [(o.astype(np.float64), x.astype(np.float64)) for o, x in parts]
    want = ref_grad.merge_gradients(wide, dout.astype(float), np.zeros(vjp.lse.shape))
    for (do, dl), (wo, wl) in zip(vjp.pullback(dout), want, strict=True):
        assert (do.dtype, dl.dtype) == (np.float16, np.float32)
        np.testing.assert_allclose(do, wo, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(
            dl, wl, rtol=1e-3, atol=6e-3
        )  # the rounding of out: 2^-11 |dout|


def test_bad_values_stay_where_they_are() -> None:
    parts = make_parts()
    dout, dlse = make_grads(parts)
    clean = sa.merge_vjp(parts).pullback(dout, dlse)
    dirty = [(o.copy(), x.copy()) for o, x in parts]
    for o, x in dirty:
        o[np.isneginf(x)] = np.nan  # parts that saw nothing are never read
    got = sa.merge_vjp(dirty).pullback(dout, dlse)
    assert all(
        x.tobytes() == y.tobytes()
        for a, b in zip(got, clean, strict=True)
        for x, y in zip(a, b, strict=True)
    )
    dout[1, 2, 3] = np.nan
    got = sa.merge_vjp(parts).pullback(dout, dlse)
    rows = np.ones((2, 3, 70), bool)
    rows[1, 2, 3] = False
    for (do, dl), (wo, wl), (_, lse) in zip(got, clean, parts, strict=True):
        assert do[rows].tobytes() == wo[rows].tobytes() and dl[rows].tobytes() == wl[rows].tobytes()
        assert np.isnan(do[1, 2, 3]).all() == (lse[1, 2, 3] > -np.inf)


def test_same_bits_for_any_number_of_threads(with_threads: Callable[[int], None]) -> None:
    parts = make_parts(np.float32, (40,))
    dout, dlse = make_grads(parts)
    found = []
    for n in (1, 2, 3, 5):
        with_threads(n)
        grads = sa.merge_vjp(parts).pullback(dout, dlse)
        found.append([x.tobytes() for pair in grads for x in pair])
    assert all(x == found[0] for x in found)


def test_wrong_calls_are_answered() -> None:
    parts = make_parts()
    dout, dlse = make_grads(parts)
    vjp = sa.merge_vjp(parts)
    with pytest.raises(sa.ArgumentError, match=r"dout must have shape \(2, 3, 70, 5\) as out has"):
        vjp.pullback(dout[0])
    with pytest.raises(sa.DtypeError, match="dlse must have dtype float64 as lse has, got float32"):
        vjp.pullback(dout, dlse.astype(np.float32))
    with pytest.raises(sa.ArgumentError, match="got 0 parts"):
        sa.merge_vjp([])
    pair = sa.attention(*[np.ones((2, 3, 4))] * 3, return_lse=True)
    for wrong in (None, pair, pair.out):
        with pytest.raises(sa.ArgumentError, match=r"parts must be a list, got .*\[\(out, lse\)"):
            sa.merge(wrong)
    mass = sa.attention(*[np.ones((2, 3, 4))] * 3, return_weights="mass")
    for wrong in ([pair.out], [mass], [None], [(pair.out,)]):  # mass has the shape of an lse
        with pytest.raises(sa.ArgumentError, match=r"parts\[0\] must be \(out, lse\).*return_lse"):
            sa.merge(wrong)
    with pytest.raises(sa.ArgumentError, match=r"parts\[1\] has shapes"):
        sa.merge_vjp([parts[0], (parts[1][0][:1], parts[1][1])])


def test_the_reference_itself() -> None:
    parts = make_parts()
    out, lse = sa.merge(parts)
    want = ref.merge(parts)
    np.testing.assert_allclose(out, want[0], atol=1e-14)
    np.testing.assert_allclose(lse, want[1], atol=1e-14)
