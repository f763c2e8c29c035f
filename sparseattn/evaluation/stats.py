"""Intervals by bootstrap: over text segments and seeds for quality, over repetitions for time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["DRAWS", "Interval", "bootstrap_mean", "bootstrap_median"]

DRAWS = 1_000
LEVEL = 0.95
CHUNK = 1 << 20  # resampled numbers held at once


class Interval(NamedTuple):
    """A value with its 95 % interval; `low` and `high` are NaN where one sample gives none."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width of the interval: what stands behind ± in the tables."""
        return (self.high - self.low) / 2


def bootstrap_mean(
    sums: ArrayLike, weights: ArrayLike, *, seed: int = 0, draws: int = DRAWS
) -> Interval:
    """Return the mean per token with its percentile interval over segments (and over seeds).

    Segments are drawn with replacement and weigh what they hold; where there is more than one
    seed, seeds are drawn with replacement as well, independently of the segments.

    Parameters
    ----------
    sums : array, shape (segments,) or (seeds, segments)
        The sum over each segment's tokens.
    weights : array, shape (segments,)
        Tokens of each segment; segments without any are left out.
    seed : int
        Of the draws: equal seeds draw equal segments, whatever is averaged.
    """
    totals = np.atleast_2d(np.asarray(sums, dtype=np.float64))
    tokens = np.asarray(weights, dtype=np.float64)
    totals, tokens = totals[:, tokens > 0], tokens[tokens > 0]
    n_seeds, n = totals.shape
    if n == 0:
        return Interval(np.nan, np.nan, np.nan)
    value = float(totals.sum() / (n_seeds * tokens.sum()))
    if n < 2:
        return Interval(value, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    step = max(1, CHUNK // (n * n_seeds))
    for begin in range(0, draws, step):
        count = min(step, draws - begin)
        picked = rng.integers(0, n, (count, n))
        share = np.full((count, n_seeds), 1 / n_seeds)
        if n_seeds > 1:
            share = _shares(rng.integers(0, n_seeds, (count, n_seeds)), n_seeds)
        drawn = np.einsum("csn,cs->c", totals.T[picked].transpose(0, 2, 1), share)
        means[begin : begin + count] = drawn / tokens[picked].sum(axis=1)
    return _percentiles(value, means)


def bootstrap_median(samples: ArrayLike, *, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Return the median with its percentile interval over the samples, shape ``(samples,)``."""
    data = np.asarray(samples, dtype=np.float64)
    value = float(np.median(data)) if data.size else np.nan
    if data.size < 2:
        return Interval(value, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    picked = rng.integers(0, data.size, (draws, data.size))
    return _percentiles(value, np.median(data[picked], axis=1))


def _shares(picked: NDArray[np.int64], n_seeds: int) -> NDArray[np.float64]:
    """How often each seed was drawn, as a share, of `picked` (draws, n_seeds)."""
    counts = (picked[:, :, None] == np.arange(n_seeds)).sum(axis=1)
    shares: NDArray[np.float64] = counts / n_seeds
    return shares


def _percentiles(value: float, draws: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
