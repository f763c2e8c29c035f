"""What a variant costs: rows counted from the plans that ran, and attention timed by length.

Timing keeps to a budget. At every length dense and the variants run in turn, so that each
repetition gives a ratio of its own; a length runs on as many heads as its share of the budget
allows, and what does not fit is left out and said so, never extrapolated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseattn import _core
from sparseattn.attention import Plan, attention
from sparseattn.errors import SparseAttnError
from sparseattn.evaluation.stats import Interval, bootstrap_median
from sparseattn.evaluation.table import number
from sparseattn.variants.base import Variant

__all__ = [
    "LENGTHS",
    "PEAK_LENGTH",
    "Counter",
    "HeadShape",
    "LengthTiming",
    "Timer",
    "head_shape",
    "peak_bytes",
    "random_heads",
    "wins_from",
]

LENGTHS = tuple(1 << n for n in range(9, 17))  # 512 ... 65,536
MIN_REPEATS = 3
MAX_REPEATS = 30
MANY_REPEATS = 5  # wanted before more heads are
PROBE_LENGTH = 512
PEAK_LENGTH = 4096
WARM = 0.1  # seconds
GROWTH = 4.0  # of the time per doubling, until two lengths have been measured
SHARE = 3.0  # each length gets this many times the budget of the one before,
LEAST = 0.02  # and at least this part of what is left
MOST = 0.95  # of what is left, for a length that does not fit its share

Call = Callable[[], Any]


class Counter:
    """Count rows read by each layer's plan; pass it as a model's `on_attend`.

    Rows are counted once per key/value head: the union over its group of query heads. A selector
    reads every visible key row, whatever it keeps.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.kept = self.visible = self.v_rows = self.k_rows = self.visible_rows = 0

    def __call__(self, layer: int, plan: Plan) -> None:
        """Add one layer's plan."""
        begin = time.perf_counter()
        counts = plan.count()
        visible_rows = counts.visible // plan.group
        selects = plan.spec is not None and plan.spec.reads_keys
        self.kept += counts.kept
        self.visible += counts.visible
        self.v_rows += counts.union_rows
        self.k_rows += visible_rows if selects else counts.union_rows
        self.visible_rows += visible_rows
        self.seconds += time.perf_counter() - begin

    def counts(self) -> dict[str, int]:
        """Return the sums so far by name."""
        return {
            "kept": self.kept,
            "visible": self.visible,
            "k_rows": self.k_rows,
            "v_rows": self.v_rows,
            "visible_rows": self.visible_rows,
        }


@dataclass(frozen=True)
class HeadShape:
    """Heads that attention is timed with."""

    heads: int
    kv_heads: int
    dim: int

    def of_size(self, kv_heads: int) -> HeadShape:
        """Return the same group size with fewer key/value heads."""
        return HeadShape(self.heads // self.kv_heads * kv_heads, kv_heads, self.dim)


def head_shape(config: Any) -> HeadShape:
    """Return 12 heads of 64, or the model's own heads where those are more."""
    if config.n_heads * config.head_dim > 12 * 64:
        return HeadShape(config.n_heads, config.n_kv_heads, config.head_dim)
    return HeadShape(12, 12, 64)


@dataclass
class LengthTiming:
    """Dense and variants timed at one length: `seconds[name]` has one entry per repetition."""

    length: int
    heads: int
    kv_heads: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    spent: float = 0.0

    def ratio(self, name: str, dense: str, seed: int) -> Interval | None:
        """Return time over dense of the same repetition: median and interval."""
        if name not in self.seconds or dense not in self.seconds:
            return None
        own, base = np.array(self.seconds[name]), np.array(self.seconds[dense])
        return bootstrap_median(own / base, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Return the record kept in result files."""
        return asdict(self)


class Timer:
    """Time variants against dense over lengths, within a budget of seconds.

    Parameters
    ----------
    specs : mapping from name to Variant
        The first is dense.
    shape : HeadShape
    lengths : sequence of int
        Ascending.
    budget : float
        Seconds for all lengths together.
    done : list of LengthTiming
        Lengths measured by an earlier run that was interrupted.
    causal : bool
        False where queries see keys on both sides.
    """

    growth = GROWTH

    def __init__(
        self,
        specs: dict[str, Variant],
        shape: HeadShape,
        lengths: Sequence[int],
        budget: float,
        *,
        seed: int = 0,
        done: Sequence[LengthTiming] = (),
        attend: Callable[..., Any] = attention,
        causal: bool = True,
    ) -> None:
        self.specs, self.shape, self.seed, self.attend = specs, shape, seed, attend
        self.causal = causal
        self.lengths = tuple(lengths)
        self.done = list(done)
        self.probed: dict[str, tuple[int, float]] = {}
        self.refused: dict[str, str] = {}
        self.left = budget - sum(d.spent for d in self.done)

    def run(self) -> Iterator[LengthTiming]:
        """Yield each length not measured yet."""
        for length in self.lengths[len(self.done) :]:
            begin = time.perf_counter()
            result = self._length(length)
            result.spent = time.perf_counter() - begin
            self.left -= result.spent
            self.done.append(result)
            yield result

    def _length(self, length: int) -> LengthTiming:
        """Measure one length on as many heads as its share allows, of all specs that fit at all.

        A length that does not fit its share may take all that is left: longer ones cost more
        than their shares grow, so they would not fit after it either.
        """
        begin = time.perf_counter()
        n_left = len(self.lengths) - len(self.done)
        share = self.left * max(1 / sum(SHARE**i for i in range(n_left)), LEAST)
        cost = self._predict(length)
        result = LengthTiming(length, 0, 0)
        names = self._affordable(cost, self.left * MOST, result)
        if names:
            shape = self._fit(sum(cost[n] for n in names), share)
            result.heads, result.kv_heads = shape.heads, shape.kv_heads
            self._measure(result, names, shape, begin + share, begin + self.left)
        return result

    def _predict(self, length: int) -> dict[str, float]:
        """Seconds per key/value head of each spec, from the lengths measured before."""
        if not self.probed:
            self._probe(min(length, PROBE_LENGTH))
        cost = {}
        for name, probe in self.probed.items():
            known = [probe] + [
                (d.length, float(np.median(d.seconds[name])) / d.kv_heads)
                for d in self.done
                if name in d.seconds
            ]
            (before, fewer), (last, seconds) = known[-2 % len(known)], known[-1]
            growth = self.growth
            if last > before:
                rise = np.log(seconds / fewer) / np.log(last / before)
                growth = 2.0 ** float(np.clip(rise + 0.1, 1.0, 2.2))
            cost[name] = seconds * growth ** float(np.log2(length / last))
        return cost

    def _probe(self, length: int) -> None:
        """Time one call of each spec on one key/value head; a spec that cannot run is dropped."""
        for name in self.specs:
            try:
                call = self.calls(self.shape.of_size(1), length, [name])[name]
                for _ in range(2):  # the first call also warms up
                    begin = time.perf_counter()
                    call()
                    self.probed[name] = (length, time.perf_counter() - begin)
            except SparseAttnError as error:
                self.refused[name] = str(error)

    def calls(self, shape: HeadShape, length: int, names: list[str]) -> dict[str, Call]:
        """What is timed, by name: one call over the whole length."""
        q, k, v = random_heads(shape, length, self.seed)
        out = np.empty_like(q)
        call = partial(self.attend, q, k, v, causal=self.causal, out=out)
        return {n: partial(call, spec=self.specs[n]) for n in names}

    def _affordable(self, cost: dict[str, float], limit: float, result: LengthTiming) -> list[str]:
        """Names that fit on one key/value head; the dearest are left out first, dense last."""
        result.left_out.update(self.refused)
        names = [n for n in self.specs if n in cost]
        while names and MIN_REPEATS * sum(cost[n] for n in names) > limit:
            dearest = max(names[1:] or names, key=lambda n: cost[n])
            names.remove(dearest)
            need = MIN_REPEATS * (cost[dearest] + (cost[names[0]] if names else 0.0))
            result.left_out[dearest] = f"needs about {number(need, 2)} s of the time budget"
        if len(names) == 1 < len(self.specs):
            return []  # dense alone is no comparison
        return names

    def _fit(self, cost: float, share: float) -> HeadShape:
        """Return the most heads that leave room for a few repetitions."""
        counts = [n for n in range(1, self.shape.kv_heads + 1) if self.shape.kv_heads % n == 0]
        fitting = [n for n in counts if MANY_REPEATS * cost * n <= share]
        return self.shape.of_size(max(fitting, default=1))

    def _measure(
        self, result: LengthTiming, names: list[str], shape: HeadShape, soon: float, latest: float
    ) -> None:
        """Repeat all names in turn until `soon`, but often enough; give up before `latest`."""
        calls = self.calls(shape, result.length, names)
        seconds: dict[str, list[float]] = {n: [] for n in names}
        for turn in range(MAX_REPEATS + 1):
            begin = time.perf_counter()
            for name in names if turn % 2 == 0 else names[::-1]:
                start = time.perf_counter()
                calls[name]()
                seconds[name].append(time.perf_counter() - start)
            now = time.perf_counter()
            next_end = now + (now - begin)
            if turn == 0 and now - begin < WARM:  # a short first turn only warms up
                seconds = {n: [] for n in names}
            elif len(seconds[names[0]]) >= MIN_REPEATS and next_end > soon:
                break
            elif len(seconds[names[0]]) < MIN_REPEATS and next_end > latest:
                reason = "took longer than the time budget allows"
                result.left_out.update(dict.fromkeys(names, reason))
                return
        result.seconds = seconds


def peak_bytes(
    spec: Variant, shape: HeadShape, length: int, seed: int = 0, causal: bool = True
) -> int:
    """Return the bytes that one call takes beyond its inputs and its output."""
    q, k, v = random_heads(shape, length, seed)
    out = np.empty_like(q)
    _core.trim()  # scratch that earlier calls left would hide what this one needs
    before = _core.live_bytes()
    _core.peak_reset()
    attention(q, k, v, spec, causal=causal, out=out)
    return int(_core.peak_bytes() - before)


def wins_from(timings: Sequence[LengthTiming], name: str, dense: str, seed: int) -> int | None:
    """Return the first length from which the whole interval lies below 1 at all longer ones."""
    first = None
    for timing in reversed(timings):
        ratio = timing.ratio(name, dense, seed)
        if ratio is None:
            continue
        if not ratio.high < 1:
            break
        first = timing.length
    return first


def random_heads(
    shape: HeadShape, length: int, seed: int, n_q: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return unit-normal q, k, v of shape (1, heads, length, dim), q of `n_q` rows where given."""
    rng = np.random.default_rng((seed, length))

    def draw(heads: int, rows: int) -> NDArray[np.float32]:
        x = np.empty((1, heads, rows, shape.dim), dtype=np.float32)
        for head in range(heads):  # in pieces, so that an interrupt is noticed between them
            rng.standard_normal(dtype=np.float32, out=x[0, head])
        return x

    q = draw(shape.heads, length if n_q is None else n_q)
    return q, draw(shape.kv_heads, length), draw(shape.kv_heads, length)
