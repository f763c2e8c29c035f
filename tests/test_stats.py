"""Intervals: against scipy where it has the same thing, by hand where it has not."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import requires

from sparseattn.evaluation.stats import Interval, bootstrap_mean, bootstrap_median


def test_mean_of_equal_segments_is_scipys():
    stats = requires("scipy.stats")
    segments = np.random.default_rng(0).gamma(2.0, size=40)
    ours = bootstrap_mean(segments * 512, np.full(40, 512), seed=7)
    theirs = stats.bootstrap(
        (segments,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    assert ours.value == pytest.approx(segments.mean(), rel=1e-14)
    np.testing.assert_allclose(ours[1:], theirs, rtol=1e-12)


def test_weighted_mean_is_scipys_paired_ratio():
    stats = requires("scipy.stats")
    rng = np.random.default_rng(1)
    tokens = rng.integers(10, 500, 25).astype(float)
    sums = rng.standard_normal(25) * tokens

    def ratio(s, t, axis):
        return s.sum(axis=axis) / t.sum(axis=axis)

    theirs = stats.bootstrap(
        (sums, tokens),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    ours = bootstrap_mean(sums, tokens, seed=3)
    assert ours.value == pytest.approx(sums.sum() / tokens.sum(), rel=1e-14)
    np.testing.assert_allclose(ours[1:], theirs, rtol=1e-12)


def test_median_is_scipys():
    stats = requires("scipy.stats")
    samples = np.random.default_rng(2).gamma(3.0, size=9)
    theirs = stats.bootstrap(
        (samples,), np.median, n_resamples=1000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    ours = bootstrap_median(samples)
    assert ours.value == np.median(samples)
    np.testing.assert_allclose(ours[1:], theirs, rtol=1e-12)


def test_median_of_three_spans_them():
    assert bootstrap_median([0.5, 0.9, 0.7]) == Interval(0.7, 0.5, 0.9)


def test_seeds_widen_the_interval():
    """With segments alike and seeds that differ, only a draw of seeds sees any variance."""
    seeds = np.array([1.0, 2.0, 3.0, 4.0])
    sums = seeds[:, None] * np.full((1, 20), 100.0)
    got = bootstrap_mean(sums, np.full(20, 100), seed=0)
    assert got.value == 2.5
    assert got.low < 2.0 and got.high > 3.0
    one = bootstrap_mean(sums[:1], np.full(20, 100), seed=0)
    assert one.low == one.high == 1.0


def test_chunks_do_not_matter(monkeypatch):
    sums = np.random.default_rng(0).standard_normal((3, 50))
    whole = bootstrap_mean(sums[:1], np.ones(50), seed=5)
    monkeypatch.setattr("sparseattn.evaluation.stats.CHUNK", 700)
    np.testing.assert_allclose(bootstrap_mean(sums[:1], np.ones(50), seed=5), whole, rtol=1e-13)


def test_coverage_is_near_its_level():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        tokens = np.full(40, 100)
        sums = (0.3 + rng.standard_normal(40)) * tokens
        got = bootstrap_mean(sums, tokens, seed=trial)
        hits += got.low <= 0.3 <= got.high
    assert 0.90 <= hits / 300 <= 0.98


def test_segments_without_tokens_are_left_out():
    a = bootstrap_mean([1.0, 5.0, 0.0], [10, 10, 0], seed=1)
    assert a == bootstrap_mean([1.0, 5.0], [10, 10], seed=1)


def test_too_little_gives_no_interval():
    value, low, high = bootstrap_mean([3.0], [2])
    assert value == 1.5 and np.isnan(low) and np.isnan(high)
    assert np.isnan(bootstrap_mean([], [])).all()
    assert np.isnan(bootstrap_median([])).all()
    assert bootstrap_median([2.0])[0] == 2.0
