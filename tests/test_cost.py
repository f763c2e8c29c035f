"""Counted rows, matched budgets, and timing that keeps to its budget (on a clock of its own)."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fake_lm import FakeModel, fake_ids

import sparseattn as sa
from sparseattn.evaluation import cost, token_cost
from sparseattn.evaluation.cost import Counter, HeadShape, LengthTiming, Timer, wins_from
from sparseattn.evaluation.rows import (
    DENSE,
    check_specs,
    is_random,
    kept_share,
    matched_rows,
    parse_attention,
    seeded,
)
from sparseattn.evaluation.token_cost import DecodeTimer, decode_lengths

N = 40


def counted(spec: str) -> dict[str, float]:
    """Counts of one call of the fake model, 4 heads over 2."""
    model, counter = FakeModel(), Counter()
    model.hidden(fake_ids(N)[None], spec, on_attend=counter)
    return counter.counts()


# ---- counts ------------------------------------------------------------------------------------


def test_dense_reads_everything_visible():
    got = counted("dense")
    pairs = N * (N + 1) // 2
    assert got["kept"] == got["visible"] == 4 * pairs
    assert got["k_rows"] == got["v_rows"] == got["visible_rows"] == 2 * pairs


def test_window_reads_what_it_keeps():
    got = counted("window:8")
    kept = sum(min(i + 1, 8) for i in range(N))
    assert got["kept"] == 4 * kept
    assert got["k_rows"] == got["v_rows"] == 2 * kept  # heads of a group see the same keys


def test_a_selector_reads_every_key_and_the_union_of_its_groups_values():
    model, counter = FakeModel(), Counter()
    plans = []

    def on_attend(layer, plan):
        plans.append(plan)
        counter(layer, plan)

    model.hidden(fake_ids(N)[None], "topk:3", on_attend=on_attend)
    got = counter.counts()
    mask = plans[0].to_mask()[0]
    assert got["kept"] == mask.sum() == 4 * sum(min(i + 1, 3) for i in range(N))
    assert got["v_rows"] == (mask[:2].any(0).sum() + mask[2:].any(0).sum())
    assert got["k_rows"] == got["visible_rows"] == 2 * N * (N + 1) // 2


def test_a_union_with_a_selector_reads_every_key():
    got = counted("window:4+topk:3")
    assert got["k_rows"] == got["visible_rows"] > got["v_rows"]


# ---- rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [17, 64])
@pytest.mark.parametrize("budget", [0.5, 0.25, 0.1])
def test_matched_rows_keep_the_share(budget, length):
    specs = parse_attention(["dense", "window:4", "topk:2"])
    rows = matched_rows(specs, [budget], length)
    assert [(row.role, row.bound) for row in rows] == [
        ("matched", ""),
        ("matched", "ceiling"),
        ("bound", "floor"),
    ]
    assert [type(row.spec).__name__ for row in rows] == ["Window", "TopK", "RandomKeys"]
    size = rows[0].spec.size
    assert [row.spec.k for row in rows[1:]] == [size] * 2
    one = 1 / ((length + 1) / 2)  # what one more key a row can change, at most
    for row in rows:
        assert abs(kept_share(row.spec, length) - budget) <= one / 2 + 1e-9
    assert kept_share(rows[0].spec, length) == pytest.approx(
        sum(min(i + 1, size) for i in range(length)) / (length * (length + 1) / 2)
    )


def test_bounds_stand_beside_what_is_neither():
    rows = matched_rows(parse_attention("window:4"), [0.25], 64)
    assert [(row.role, row.bound) for row in rows] == [
        ("matched", ""),
        ("bound", "floor"),
        ("bound", "ceiling"),
    ]


def test_matching_keeps_the_other_settings_and_comes_as_near_as_it_can():
    (row, *_) = matched_rows(parse_attention("window:9:sinks=2"), [0.5], 64)
    assert row.spec.sinks == 2 and abs(kept_share(row.spec, 64) - 0.5) < 0.02
    (row, *_) = matched_rows(parse_attention("window:9:sinks=20"), [0.05], 64)
    assert row.spec == sa.Window(1, sinks=20)  # less is not to be had


def test_two_sided_windows_are_matched_on_their_left():
    (row, *_) = matched_rows(parse_attention("window:window_size=3/-1"), [0.5], 32)
    assert row.spec.right == -1 and row.spec.left > 3


@pytest.mark.parametrize(
    ("specs", "budget", "words"),
    [
        ("window:4", 0.0, "between 0 and 1"),
        ("window:4", 1.0, "between 0 and 1"),
        ("window:4+topk:2", 0.5, "cannot be matched for window:4\\+topk:2"),
    ],
)
def test_budgets_that_cannot_be_matched(specs, budget, words):
    with pytest.raises(sa.ArgumentError, match=words):
        matched_rows(parse_attention(specs), [budget], 32)


def test_several_specs_in_one_text_and_repeats():
    specs = parse_attention(["dense,window:4", "topk:2", sa.Window(4)])
    assert [str(s) for s in specs] == ["dense", "window:4", "topk:2"]


def test_seeds_reach_into_compositions():
    spec = sa.parse("window:4+random:3:seed=5")
    assert str(seeded(spec, 2)) == "window:4+random:3:seed=7"
    assert is_random(spec) and not is_random(sa.parse("window:4+topk:2"))
    layers = sa.PerLayer({1: "random:3"}, other="window:4")
    assert str(seeded(layers, 1).layer(1)) == "random:3:seed=1"


def test_specs_that_cannot_run_are_refused_early():
    config = FakeModel().config
    check_specs(parse_attention(["dense", "topk:3"]), config)
    with pytest.raises(sa.ArgumentError, match="layout"):
        check_specs(parse_attention("blockmask:16"), config)
    with pytest.raises(sa.ArgumentError, match="3 specs"):
        check_specs([sa.PerHead(["dense"] * 3)], config)


# ---- timing ------------------------------------------------------------------------------------


class Clock:
    """Time passes only inside attention calls, as a formula of length and heads says."""

    def __init__(self, seconds):
        self.now, self.seconds, self.calls = 0.0, seconds, []

    def attend(self, q, k, v, spec, *, causal, out=None):
        assert causal and q.shape[2] == k.shape[2]
        self.calls.append((str(spec), q.shape[2], q.shape[1]))
        self.now += self.seconds[str(spec)](q.shape[2]) * q.shape[1]


QUADRATIC = {"dense": lambda n: 1e-9 * n * n, "window:64": lambda n: 5e-8 * n}
SPECS = {"dense": DENSE, "window:64": sa.Window(64)}
SHAPE = HeadShape(12, 12, 64)


@pytest.fixture
def clock(monkeypatch):
    def start(seconds=QUADRATIC):
        made = Clock(seconds)
        monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: made.now))
        monkeypatch.setattr(cost, "random_heads", empty_heads)
        return made

    return start


def empty_heads(shape, length, seed, n_q=None):
    """Shapes without memory."""
    one = np.zeros(1, np.float32)
    return tuple(
        np.broadcast_to(one, (1, heads, length, 1))
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )


def timed(clock, specs=SPECS, budget=30.0, shape=SHAPE, **options):
    timer = Timer(specs, shape, cost.LENGTHS, budget, attend=clock.attend, **options)
    return list(timer.run())


def test_timing_keeps_to_its_budget_and_prefers_all_heads(clock):
    now = clock()
    results = timed(now)
    assert now.now <= 30.0
    assert now.now > 15.0  # and uses what it has
    assert [r.length for r in results] == list(cost.LENGTHS)
    assert results[0].heads == 12
    heads = [r.heads for r in results]
    assert sorted(heads, reverse=True) == heads and all(12 % h == 0 for h in heads)
    assert [r.heads for r in results[:2]] == [12, 12]
    for r in results:
        assert all(3 <= len(s) <= 30 for s in r.seconds.values())
        assert r.left_out == {}


def test_repetitions_are_interleaved(clock):
    now = clock()
    timed(now)
    names = [name for name, length, _ in now.calls if length == 1024]
    assert names[:4] in (
        ["dense", "window:64", "window:64", "dense"],
        ["window:64", "dense", "dense", "window:64"],
    )


def test_what_does_not_fit_is_left_out_with_its_reason(clock):
    slow = {**QUADRATIC, "topk:16": lambda n: 2e-7 * n * n}
    now = clock(slow)
    results = timed(now, {**SPECS, "topk:16": sa.TopK(16)}, budget=45.0)
    assert now.now <= 45.0
    assert "topk:16" in results[0].seconds
    last = results[-1]
    assert "topk:16" not in last.seconds and "time budget" in last.left_out["topk:16"]
    assert "window:64" in last.seconds  # the cheap one goes on against dense
    short = timed(clock(slow), {**SPECS, "topk:16": sa.TopK(16)}, budget=0.05)[-1]
    assert short.seconds == {} and set(short.left_out) >= {"window:64", "topk:16"}


def test_a_first_length_that_is_long_is_probed_first(clock):
    now = clock()
    timer = Timer(SPECS, SHAPE, [65536], 4.0, attend=now.attend)
    (result,) = timer.run()
    assert now.calls[0][1] == cost.PROBE_LENGTH
    assert now.now <= 4.0 and not result.seconds and result.left_out


def test_a_length_that_is_slower_than_foreseen_is_given_up(clock):
    sudden = {**QUADRATIC, "window:64": lambda n: 5e-8 * n * (1 if n < 4096 else 1e5)}
    now = clock(sudden)
    results = timed(now)
    assert now.now < 30.0 + sudden["window:64"](4096) * 12  # one call may overrun, no more
    assert results[2].seconds and not results[3].seconds
    assert "longer than" in results[3].left_out["window:64"]
    assert all(not r.seconds for r in results[3:])


def test_specs_that_attention_alone_cannot_run_say_why(clock):
    def refuse(n):
        raise sa.ArgumentError("one spec a layer")

    layers = sa.PerLayer({0: "dense"}, other="window:64")
    results = timed(clock({**QUADRATIC, str(layers): refuse}), {**SPECS, str(layers): layers})
    assert all(r.left_out == {str(layers): "one spec a layer"} for r in results)
    assert all("window:64" in r.seconds for r in results)


def test_an_interrupted_timing_goes_on(clock):
    whole = timed(clock())
    now = clock()
    rest = timed(now, done=whole[:3])
    assert [r.length for r in rest] == list(cost.LENGTHS[3:])
    assert min(length for _, length, _ in now.calls) == 512  # the probe, no more
    assert now.now <= 30.0 - sum(r.spent for r in whole[:3])


def test_groups_stay_whole_on_fewer_heads(clock):
    for r in timed(clock(), shape=HeadShape(32, 8, 128)):
        assert r.heads == 4 * r.kv_heads


# ---- decoding ----------------------------------------------------------------------------------


class DecodeClock(Clock):
    """The same for a token on a cache, whose length is what it was filled with."""

    def attend(self, q, k, v, spec, *, causal, cache):
        assert causal and q.shape[2] == k.shape[2] == 1 and cache.spec == spec
        self.calls.append((str(spec), cache.length, q.shape[1]))
        self.now += self.seconds[str(spec)](cache.length) * q.shape[1]


class FakeCache:
    """A cache that holds nothing."""

    def __init__(self, spec):
        self.spec = spec

    def append(self, k, v):
        self.length = k.shape[2]


LINEAR = {"dense": lambda n: 5e-9 * n, "window:64": lambda n: 1e-5}


def decoded(monkeypatch, seconds, budget=4.5, shape=SHAPE, **options):
    now = DecodeClock(seconds)
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now.now))
    monkeypatch.setattr(token_cost, "random_heads", empty_heads)
    monkeypatch.setattr(token_cost, "Cache", FakeCache)
    lengths = decode_lengths(cost.LENGTHS)
    timer = DecodeTimer(SPECS, shape, lengths, budget, attend=now.attend, **options)
    return now, list(timer.run())


def test_decoding_is_timed_by_cache_length_within_its_budget(monkeypatch):
    now, results = decoded(monkeypatch, LINEAR)
    assert now.now <= 4.5
    assert [r.length for r in results] == [1024 << i for i in range(7)]
    for r in results:
        assert r.left_out == {} and all(3 <= len(s) <= 30 for s in r.seconds.values())
        dense, window = (np.median(r.seconds[name]) for name in SPECS)
        assert dense == pytest.approx(token_cost.TOKENS * 5e-9 * r.length * r.heads)
        assert window == pytest.approx(token_cost.TOKENS * 1e-5 * r.heads)
    names = [name for name, length, _ in now.calls if length == 4096]
    first, last = names[:: token_cost.TOKENS], names[token_cost.TOKENS - 1 :: token_cost.TOKENS]
    assert first == last  # the tokens of a call stay together
    assert first[:4] in (
        ["dense", "window:64", "window:64", "dense"],
        ["window:64", "dense", "dense", "window:64"],
    )


def test_long_caches_have_as_many_heads_as_memory_has_room_for(monkeypatch):
    _, results = decoded(monkeypatch, LINEAR, budget=1000.0)
    for r in results:
        assert 12 % r.heads == 0
        assert 8 * r.length * 64 * r.heads * len(SPECS) <= token_cost.MEMORY
    assert results[0].heads == 12 and 1 <= results[-1].heads < 12
    _, groups = decoded(monkeypatch, LINEAR, budget=1000.0, shape=HeadShape(32, 8, 128))
    assert all(r.heads == 4 * r.kv_heads for r in groups)


def test_cache_lengths_beyond_the_budget_are_left_out(monkeypatch):
    now, results = decoded(monkeypatch, {**LINEAR, "dense": lambda n: 1e-6 * n}, budget=0.5)
    assert now.now <= 0.5
    assert results[0].seconds and not results[-1].seconds
    assert all("time budget" in reason for reason in results[-1].left_out.values())


def test_decoding_goes_on_after_an_interrupt(monkeypatch):
    _, whole = decoded(monkeypatch, LINEAR)
    _, rest = decoded(monkeypatch, LINEAR, done=whole[:3])
    assert [r.length for r in rest] == [r.length for r in whole[3:]]


def test_short_lengths_are_no_caches():
    assert decode_lengths((16, 512, 1023)) == ()
    assert decode_lengths(cost.LENGTHS) == cost.LENGTHS[1:]


def timing(length, ratio, spread=0.01):
    own = [ratio * (1 + d) for d in (-spread, 0, spread, spread / 2, -spread / 2)]
    return LengthTiming(length, 1, 1, {"dense": [1.0] * 5, "x": own})


@pytest.mark.parametrize(
    ("ratios", "first"),
    [
        ([0.5, 0.4, 0.3], 512),
        ([1.5, 0.9, 0.5], 1024),
        ([0.5, 1.1, 0.9], 2048),
        ([0.5, 0.9, 1.1], None),
        ([1.5, 1.2, 0.995], None),  # below 1, but not its whole interval
    ],
)
def test_wins_from(ratios, first):
    timings = [timing(512 << i, r) for i, r in enumerate(ratios)]
    assert wins_from(timings, "x", "dense", 0) == first
    timings.append(LengthTiming(4096, 1, 1, {"dense": [1.0] * 3}, {"x": "needs 40 s"}))
    assert wins_from(timings, "x", "dense", 0) == first  # nothing is said of what was left out


def test_ratio_pairs_repetitions():
    """A drift that hits both alike leaves the ratio as it is."""
    drift = np.array([1.0, 2.0, 4.0, 3.0])
    got = LengthTiming(512, 1, 1, {"dense": list(drift), "x": list(drift * 0.5)})
    assert got.ratio("x", "dense", 0) == (0.5, 0.5, 0.5)


def test_head_shape_is_the_models_where_it_is_larger():
    config = SimpleNamespace(n_heads=8, n_kv_heads=4, head_dim=8)
    assert cost.head_shape(config) == HeadShape(12, 12, 64)
    config = SimpleNamespace(n_heads=32, n_kv_heads=8, head_dim=128)
    assert cost.head_shape(config) == HeadShape(32, 8, 128)


def test_random_heads_are_the_seeds():
    shape = HeadShape(4, 2, 8)
    q, k, v = cost.random_heads(shape, 20, 3)
    assert q.shape == (1, 4, 20, 8) and k.shape == v.shape == (1, 2, 20, 8)
    assert q.dtype == np.float32 and abs(q.std() - 1) < 0.1
    np.testing.assert_array_equal(q, cost.random_heads(shape, 20, 3)[0])
    assert not np.array_equal(q, cost.random_heads(shape, 20, 4)[0])
