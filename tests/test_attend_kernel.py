"""The inner loops of attention, over plans of every kind: what a row does not see changes no bit of
it, what it does see counts whatever it weighs, and no size of score is too large.

One key of width 1 and a query of 1 make any score at will; large queries make running maxima move
and weights underflow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import assert_within_ceiling, once
from reference import attention as ref

import sparseattn as sa

Array = np.ndarray
DTYPES = [np.float32, np.float64]
ROWS = [1, 2, 7, 70]  # the row path, the tile path, more than one strip

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def of_scores(
    scores: Array, n_q: int, dtype: Any, v: Array | None = None, **call: Any
) -> tuple[Any, Array]:
    """Attention of n_q equal rows over keys that score so, and its values."""
    k = np.asarray(scores, dtype)[None, None, :, None]
    if v is None:
        v = np.random.default_rng(k.shape[2]).standard_normal((1, 1, k.shape[2], 3)).astype(dtype)
    q = np.ones((1, 1, n_q, 1), dtype)
    return sa.attention(q, k, v, scale=1.0, return_lse=True, **call), v


def expected(scores: Array, v: Array, n_q: int, dtype: Any) -> tuple[Array, Array]:
    """out and lse in the widest type there is; scores are those that the dtype can hold."""
    s = np.asarray(scores, dtype).astype(np.longdouble)
    top = s.max()
    p = np.exp(s - top)
    out = p @ v[0, 0].astype(np.longdouble) / p.sum()
    return np.tile(out, (1, 1, n_q, 1)), np.full((1, 1, n_q), top + np.log(p.sum()))


def extremes(dtype: Any) -> dict[str, Array]:
    n, most = 200, float(np.finfo(dtype).max)
    at = np.arange(n)
    return {
        "alternating": np.where(at % 2, most, -most),
        "all largest": np.full(n, most),
        "all lowest": np.full(n, -most),
        "rising": most * np.linspace(-1, 1, n),
        "falling": most * np.linspace(1, -1, n),
        "all equal": np.full(n, 1234.5),
        "denormal": np.full(n, float(np.finfo(dtype).smallest_subnormal) * 7),
        "below the slack of the maximum": at * 0.29,
        "steps below it": at * 19.0,
        "steps above it": at * 21.0,
        "coarse": 1e8 + at % 7 * 8,
        "waves": np.round(1e6 * np.sin(at)),
        "from nothing": np.where(at < 130, -np.inf, 1.0),
        "one at last": np.where(at < n - 1, -np.inf, 1.0),
    }


@pytest.mark.promise("A6")
@pytest.mark.parametrize("n_q", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
def test_scores_of_any_size(n_q: int, dtype: Any, isa: str) -> None:
    for name, scores in extremes(dtype).items():
        got, v = of_scores(scores, n_q, dtype)
        out, lse = expected(scores, v, n_q, dtype)
        assert np.isfinite(got.out).all() and np.isfinite(got.lse).all(), name
        assert_within_ceiling(got.out, out)
        np.testing.assert_allclose(got.lse, lse, rtol=1e-6 if dtype == np.float32 else 1e-14)


@pytest.mark.promise("A6")
@pytest.mark.parametrize("n_q", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
def test_scores_that_are_not_finite(n_q: int, dtype: Any, isa: str) -> None:
    for at in (0, 3, 70, 150):
        scores = np.sin(np.arange(200.0))
        for bad in (np.inf, np.nan):
            scores[at] = bad
            got, _ = of_scores(scores, n_q, dtype)
            assert np.isnan(got.out).all() and np.isnan(got.lse).all()
        scores[at] = -np.inf  # weighs nothing
        got, v = of_scores(scores, n_q, dtype)
        assert_within_ceiling(got.out, expected(scores, v, n_q, dtype)[0])
    for n_k in (1, 63, 64, 65, 200):  # weighs nothing, and so do all others
        got, _ = of_scores(np.full(n_k, -np.inf), n_q, dtype)
        assert not got.out.any() and np.isneginf(got.lse).all()


@pytest.mark.promise("A6")
@pytest.mark.parametrize("n_q", ROWS)
def test_bias_of_minus_infinity_hides(n_q: int, isa: str) -> None:
    v = np.full((1, 1, 150, 3), np.nan, np.float32)
    hidden = np.full((1, 1, n_q, 150), -np.inf, np.float32)
    got, _ = of_scores(np.zeros(150), n_q, np.float32, v, bias=hidden, causal=True)
    assert not got.out.any() and np.isneginf(got.lse).all()
    hidden[..., 17] = 0
    v[0, 0, 17] = [0.1, -3, 7e20]
    got, _ = of_scores(np.zeros(150), n_q, np.float32, v, bias=hidden)
    assert (got.out == v[0, 0, 17]).all() and not got.lse.any()  # one key: its value, exactly


@pytest.mark.promise("A6")
@pytest.mark.parametrize("n_q", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_seen_value_counts_though_its_weight_underflows(
    n_q: int, dtype: Any, bad: float, isa: str
) -> None:
    scores = np.where(np.arange(150) == 17, -1e4, 0.0)
    v = np.ones((1, 1, 150, 3), dtype)
    v[0, 0, 17, 1] = bad
    seen = np.ones((1, 1, n_q, 150), bool)
    seen[..., 40] = False
    for call in ({}, {"causal": True}, {"mask": seen}, {"bias": np.zeros(seen.shape, dtype)}):
        got, _ = of_scores(scores, n_q, dtype, v, **call)
        spoilt = np.isnan(got.out)
        assert spoilt[..., 1].all() and not spoilt[..., [0, 2]].any()
    parts = [
        of_scores(scores[c], n_q, dtype, v[:, :, c])[0] for c in (slice(17, 18), slice(18, 150))
    ]
    assert np.isnan(sa.merge([(part.out, part.lse) for part in parts]).out[..., 1]).all()


@pytest.mark.promise("A4")
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
def test_a_later_key_changes_no_sign_of_zero(dtype: Any, isa: str) -> None:
    """Sums that underflow are -0; later weights of 0, or their being passed over, must not show."""
    n = 70
    scores = np.where(np.arange(n) == 0, 0.0, -1.0)
    v = np.zeros((1, 1, n, 5), dtype)
    v[0, 0, 1:6] = -np.finfo(dtype).smallest_subnormal
    before, _ = of_scores(scores, n, dtype, v, causal=True)
    assert not before.out.any()
    for at, bad in ((40, np.nan), (63, np.inf), (64, np.nan)):
        spoilt = v.copy()
        spoilt[:, :, at] = bad
        after, _ = of_scores(scores, n, dtype, spoilt, causal=True)
        assert after.out[:, :, :at].tobytes() == before.out[:, :, :at].tobytes()


@pytest.mark.promise("A6")
@pytest.mark.parametrize("spec", ["dense", "window:30"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
def test_a_key_of_other_rows_decides_nothing(spec: str, dtype: Any, isa: str) -> None:
    """Key 0 scores -inf and its value is NaN; a later key so large that its rows are done again
    changes nothing about rows before it."""
    q = np.full((1, 1, 40, 8), 4, dtype)
    k, v = np.zeros_like(q), np.ones_like(q)
    k[0, 0, 0], v[0, 0, 0] = np.finfo(dtype).min, np.nan
    before = sa.attention(q, k, v, spec, causal=True)
    for j in range(1, 40):
        k2 = k.copy()
        k2[0, 0, j] = 100
        after = sa.attention(q, k2, v, spec, causal=True)
        assert after[:, :, :j].tobytes() == before[:, :, :j].tobytes(), j


@pytest.mark.promise("A6")
@pytest.mark.parametrize("spec", ["window:1", "window:3", "window:6", "window:19"])
def test_a_row_has_its_maximum_from_its_own_keys(spec: str, isa: str) -> None:
    """In a narrow window a row's first key may stand beside keys of other rows alone."""
    q, k, v = np.random.default_rng(4).standard_normal((3, 1, 2, 75, 16), np.float32)
    kept = sa.plan(q, k, spec, causal=True).to_mask()
    before = sa.attention(q, k, v, spec, causal=True, return_lse=True)
    for j in range(75):
        k2, v2 = k.copy(), v.copy()
        k2[:, :, j], v2[:, :, j] = 2 * k[:, :, j], np.nan
        got = sa.attention(q, k2, v2, spec, causal=True, return_lse=True)
        rows = ~kept[..., j]
        assert got.out[rows].tobytes() == before.out[rows].tobytes()
        assert got.lse[rows].tobytes() == before.lse[rows].tobytes()


@pytest.mark.promise("A4")
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
def test_a_later_key_redoes_no_earlier_row(dtype: Any, isa: str) -> None:
    """A score far above the running maximum redoes a tile for all its rows: other rows keep their
    bits, those too that have seen nothing but -inf."""
    n = 150
    q = np.ones((1, 1, n, 1), dtype)
    v = np.random.default_rng(0).standard_normal((1, 1, n, 5)).astype(dtype)
    for scores in (
        np.sin(np.arange(n)),
        np.arange(n) * 3.0,
        np.where(np.arange(n) < 90, -np.inf, 0),
    ):
        k = scores.astype(dtype)[None, None, :, None]
        call: dict[str, Any] = {"causal": True, "scale": 1.0, "return_lse": True}
        before = sa.attention(q, k, v, **call)
        for at in (3, 63, 64, 75, 100, 149):
            for score in (1e4, 1e30, np.inf, -np.inf, np.nan):
                k2 = k.copy()
                k2[:, :, at] = score
                after = sa.attention(q, k2, v, **call)
                assert after.out[:, :, :at].tobytes() == before.out[:, :, :at].tobytes()
                assert after.lse[:, :, :at].tobytes() == before.lse[:, :, :at].tobytes()


@pytest.mark.parametrize("n_q", [1, 8])
def test_long_rows_keep_their_digits(n_q: int, isa: str) -> None:
    """Sums of 100,000 terms are split: naive float32 sums would miss the ceiling."""
    rng = np.random.default_rng(1)
    n_k, heads = 100_000, 8  # as many tasks as need no split over the keys
    q = rng.standard_normal((1, heads, n_q, 2)).astype(np.float32)
    k = rng.standard_normal((1, heads, n_k, 2)).astype(np.float32)
    v = (rng.standard_normal((1, heads, n_k, 2)) + 4).astype(np.float32)
    got = sa.attention(q, k, v, return_lse=True)
    s = q.astype(float) @ k.astype(float).swapaxes(-1, -2) / np.sqrt(2)
    p = np.exp(s)
    total = p.sum(-1, keepdims=True)
    np.testing.assert_allclose(got.out, p @ v.astype(float) / total, rtol=5e-6)
    np.testing.assert_allclose(got.lse, np.log(total)[..., 0], rtol=1e-6)


# ---- random calls --------------------------------------------------------------------------------


def random_call(rng: np.random.Generator) -> tuple[tuple[Array, Array, Array], Any, dict[str, Any]]:
    """q, k, v of an awkward shape, a plan of any kind over them, and terms of the scores."""
    kv_heads = int(rng.integers(1, 4))
    heads, batch = kv_heads * int(rng.integers(1, 5)), int(rng.integers(1, 3))
    n_q = int(rng.choice([1, 2, 3, 5, 17, 33, 65, 97, 130]))
    n_k = int(rng.choice([1, 2, 7, 63, 64, 65, 130, 200]))
    if rng.random() < 0.1:  # few tasks over many keys: pieces
        batch, heads, n_q, n_k = 1, kv_heads, int(rng.choice([1, 3, 40])), 8200
    dim, dim_v = (int(rng.choice([1, 2, 3, 5, 8, 15, 17, 31, 40, 80, 129])) for _ in range(2))
    dtype = DTYPES[rng.integers(2)]
    sizes = [(heads, n_q, dim), (kv_heads, n_k, dim), (kv_heads, n_k, dim_v)]
    q, k, v = (rng.standard_normal((batch, *size)).astype(dtype) for size in sizes)
    q *= dtype(rng.choice([1, 8]))
    spec = ["dense", "window:33:sinks=3", f"topk:{rng.integers(1, 40)}", "random:9"][
        rng.integers(4)
    ]
    if heads == 2 * kv_heads and rng.random() < 0.5:
        spec = f"perhead({kv_heads}*{spec}|{kv_heads}*dense)" if kv_heads % 2 == 0 else spec
    call: dict[str, Any] = {"causal": [True, "top_left"][rng.integers(2)]}
    if rng.random() < 0.4:
        call["mask"] = rng.random((batch, int(rng.choice([1, heads])), n_q, n_k)) < rng.random()
    if rng.random() < 0.3:
        call["key_mask"] = rng.random((batch, n_k)) < 0.8
    terms: dict[str, Any] = {}
    if rng.random() < 0.2:
        terms["bias"] = rng.standard_normal((1, heads, 1, n_k)).astype(dtype)
    if rng.random() < 0.2:
        terms["softcap"] = 0.5 + 5 * rng.random()
    return (q, k, v), sa.plan(q, k, spec, **call, **terms), terms


@pytest.mark.promise("A4")
@pytest.mark.promise("A6")
@pytest.mark.promise("C5")
@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(s, marks=pytest.mark.nightly) for s in range(6, 30))]
)
def test_random_calls(seed: int, isa: str, with_threads: Any) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(6):
        (q, k, v), plan, terms = random_call(rng)

        def run(q: Array, k: Array, v: Array, threads: int, plan: Any = plan) -> Any:
            with_threads(threads)
            return sa.attention(q, k, v, plan, return_lse=True, **terms)  # noqa: B023

        kept = plan.to_mask()
        first = run(q, k, v, 1)
        # float64 is what some calls compute in: its own rounding must not count as ours.
        out, lse = once(ref.attention, q, k, v, kept, compute=np.longdouble, **terms)
        seen = np.where(kept, once(ref.scores, q, k, **terms), 0)
        scale = max(1.0, float(np.abs(seen).max()))
        limit = 4 * np.finfo(q.dtype).eps * scale
        assert np.abs(first.out - out).max() < limit * max(1, np.abs(v).max())
        np.testing.assert_array_equal(np.isneginf(first.lse), ~kept.any(-1))
        finite = np.isfinite(lse)
        assert np.abs(first.lse[finite] - lse[finite]).max(initial=0) < limit
        for threads in (2, 3, 5):
            assert_same_bits(run(q, k, v, threads), first)

        unseen = ~kept.reshape(*k.shape[:2], -1, k.shape[2]).any(2)
        k2, v2 = k.copy(), v.copy()
        k2[unseen], v2[unseen] = rng.choice([np.nan, np.inf, -np.inf, 3e38]), np.nan
        assert_same_bits(run(q, k2, v2, 3), first)

        for bad in (np.nan, np.inf, -np.inf, 1e30, 0):
            j = int(rng.integers(k.shape[2]))
            k2, v2 = k.copy(), v.copy()
            k2[:, :, j], v2[:, :, j] = bad, rng.choice([np.nan, np.inf, 1e20])
            after = run(q, k2, v2, 2)
            blind = ~kept[..., j]
            assert_same_bits(after, first, blind)
            if np.isnan(bad):
                assert np.isnan(after.out[~blind]).all() and np.isnan(after.lse[~blind]).all()
            v2[:, :, j] = np.nan
            after = run(q, k, v2, 2)
            assert np.isnan(after.out[~blind]).all()
            assert_same_bits(after, first, blind)

        i = int(rng.integers(q.shape[2]))
        q2 = q.copy()
        q2[:, :, i, -1] = np.nan
        after = run(q2, k, v, 2)
        others = np.broadcast_to(np.arange(q.shape[2]) != i, kept.shape[:3])
        assert_same_bits(after, first, others)
        np.testing.assert_array_equal(np.isnan(after.lse[:, :, i]), kept[:, :, i].any(-1))


def assert_same_bits(a: Any, b: Any, rows: Any = np.s_[:]) -> None:
    assert a.out[rows].tobytes() == b.out[rows].tobytes()
    assert a.lse[rows].tobytes() == b.lse[rows].tobytes()
