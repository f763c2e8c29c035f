"""The cache by itself: what it holds, forgets, refuses, and how it grows. tests/test_decode.py has
what attention makes of it."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import CAUSAL_SPECS, fit, make_params, make_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

import sparseattn as sa
from sparseattn.variants import Variant

Array = np.ndarray
SPECS = [spec for spec, causal in CAUSAL_SPECS if causal is True]


def new(n: int, *, batch: int = 2, dtype: Any = np.float32, seed: int = 0) -> tuple[Array, Array]:
    """k and v of n tokens, three kv heads."""
    rng = np.random.default_rng([seed, n])
    k, v = rng.standard_normal((batch, 3, n, 4)), rng.standard_normal((batch, 3, n, 5))
    return k.astype(dtype), v.astype(dtype)


def filled(spec: Any = None, tokens: int = 20, **options: Any) -> sa.Cache:
    cache = sa.Cache(spec, **options)
    cache.append(*new(tokens))
    return cache


def state(cache: sa.Cache) -> Any:
    """All that can be seen of a cache."""
    held = cache.snapshot().held
    arrays = () if held is None else (held.k, held.v, held.there)
    bytes_of = tuple(None if x is None else x.tobytes() for x in arrays)
    return cache.get_seq_length(), cache.nbytes, repr(cache), bytes_of


# ---- what a spec lets it forget -----------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_keep_tells_what_rows_see(spec: Variant) -> None:
    """No row's plan holds a key that keep() gives up: from the plan, for every variant."""
    shape = fit(spec, (1, 2, 2, 150, 150, 4, 4))
    q, k, _ = make_qkv(shape)
    keep = spec.keep()
    if keep is None:
        return
    kept = sa.plan(q, k, spec, causal=True, params=make_params(spec, shape)).to_mask()
    row, key = np.arange(150)[:, None], np.arange(150)
    assert not kept[..., (key >= keep[0]) & (key < row - keep[1])].any()
    assert kept[..., np.clip(row - keep[1], 0, None) == key].any(), "no more than is needed"


@pytest.mark.parametrize(
    ("spec", "keep"),
    [
        ("dense", None),
        ("topk:4", None),
        ("window:1", (0, 0)),
        ("window:64:sinks=4", (4, 63)),
        ("window:8:sinks=2:globals=5/40/41", (42, 7)),
        ("window:window_size=5/3", (0, 5)),
        ("window:window_size=-1/0", None),
        ("window:8+window:window_size=20/0:sinks=3", (3, 20)),
        ("window:8:sinks=3&window:20", (3, 19)),
        ("window:8&topk:4", None),
        ("window:8+dense", None),
        ("perhead(window:8|window:4:sinks=1)", (1, 7)),
        ("perhead(window:8|dense)", None),
    ],
)
def test_keep(spec: str, keep: tuple[int, int] | None) -> None:
    assert sa.parse(spec).keep() == keep


@pytest.mark.parametrize("rollback", [0, 9, 200])
@pytest.mark.parametrize(
    "spec", ["window:1", "window:16", "window:100:sinks=4", "window:8:globals=3/30"]
)
def test_window_is_bounded(spec: str, rollback: int) -> None:
    """Two windows, the pinned keys and the rollback, in whole 64 rows, whatever comes in."""
    pinned, left = sa.parse(spec).keep()  # type: ignore[misc]
    rows = -(-(pinned + 2 * (left + 1) + rollback) // 64) * 64
    row_bytes = 2 * 3 * (4 + 5) * 4
    cache = sa.Cache(spec, rollback=rollback)
    for n in (1, 700, *[1] * 300, 64, 64, 5, 1000, 1):
        k, _ = cache.append(*new(n))
        assert cache.nbytes <= rows * row_bytes
        total = cache.get_seq_length()
        assert k.shape[2] >= min(total, pinned + left + n)
    assert cache.get_seq_length() == 2135
    cache.crop(2135 - rollback)
    assert cache.get_seq_length() == 2135 - rollback


# ---- growth -------------------------------------------------------------------------------------


def test_growth_is_amortised() -> None:
    """Buffers double: appending tokens one by one moves the cache a logarithm of times."""
    cache = sa.Cache()
    buffers = set()
    for _ in range(3000):
        k, _ = cache.append(*new(1))
        buffers.add(k.ctypes.data)
        assert cache.nbytes % (64 * 2 * 3 * 9 * 4) == 0
    assert k.shape[2] == 3000 and len(buffers) <= 7  # 64, 128, ... 4096
    assert cache.nbytes == 4096 * 2 * 3 * 9 * 4


def test_append_writes_the_new_rows_alone() -> None:
    cache = filled(tokens=20)
    first, _ = cache.append(*new(1))
    first[:] = 7  # were the rows copied, the next append would not see this
    second, _ = cache.append(*new(1))
    assert np.shares_memory(first, second)
    assert (second[:, :, :21] == 7).all() and second.shape[2] == 22


@pytest.mark.parametrize("spec", ["window:1", "window:16", "window:40:sinks=5"])
def test_window_moves_once_a_window(spec: str) -> None:
    """A full buffer is moved down for at least as many tokens as the window has."""
    cache = filled(spec, tokens=400)
    window = sa.parse(spec).keep()[1] + 1  # type: ignore[index]
    last, moves = cache.append(*new(1))[0], 0
    for _ in range(500):
        now = cache.append(*new(1))[0]
        assert np.shares_memory(now, cache._held.k), "a token passes through no copy"
        moves += not np.shares_memory(last, now)
        last = now
    assert moves <= 500 // (window + 1) + 1


def test_long_chunk_passes_through() -> None:
    """A prefill longer than a window's buffer is attended to as it is, and its end is kept."""
    k, v = new(5000)
    cache = sa.Cache("window:16")
    got = cache.append(k, v)
    assert got[0] is k or np.shares_memory(got[0], k)
    assert cache.nbytes < k.nbytes / 30


# ---- a model of it ------------------------------------------------------------------------------


class Naive:
    """All tokens ever, in lists."""

    def __init__(self, pinned: int, left: int | None) -> None:
        self.k, self.v = new(0)
        self.there = np.ones((2, 0), bool)
        self.pinned, self.left = pinned, left

    def check(self, cache: sa.Cache) -> None:
        held = cache.snapshot().held
        total = self.k.shape[2]
        assert cache.get_seq_length() == total
        if held is None:
            return
        needed = np.arange(total)
        if self.left is not None:
            needed = needed[(needed < self.pinned) | (needed >= total - self.left)]
        place = np.where(needed < self.pinned, needed, needed - total + held.kept)
        np.testing.assert_array_equal(held.k[:, :, place], self.k[:, :, needed])
        np.testing.assert_array_equal(held.v[:, :, place], self.v[:, :, needed])
        there = np.ones((len(held.k), held.kept), bool) if held.there is None else held.there
        np.testing.assert_array_equal(there[:, place], self.there[:, needed])
        assert cache.key_mask is None or not cache.key_mask.all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_order_of_calls(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(["dense", "window:7", "window:5:sinks=3", "window:1"]))
    rollback = data.draw(st.integers(0, 6))
    cache, keep = sa.Cache(text, rollback=rollback), sa.parse(text).keep()
    naive = Naive(*(keep or (0, None)))
    deep = 0  # tokens that may go for certain: rollback, as long as they came after the last crop
    saved: list[tuple[Any, Naive, int]] = []
    for step in range(data.draw(st.integers(1, 25))):
        do = data.draw(st.sampled_from(["append"] * 4 + ["crop", "select", "save", "restore"]))
        if do == "append":
            n = data.draw(st.sampled_from([0, 1, 1, 1, 2, 30, 64, 150]))
            k, v = new(n, batch=len(naive.k), seed=step)
            there = np.random.default_rng([step, n]).random((len(k), n)) < 0.8
            given_mask = data.draw(st.sampled_from([None, "new", "all"]))
            there = np.ones_like(there) if given_mask is None else there
            naive.k = np.concatenate([naive.k, k], 2)
            naive.v = np.concatenate([naive.v, v], 2)
            naive.there = np.concatenate([naive.there, there], 1)
            masks = {None: None, "new": there, "all": naive.there}
            cache.append(k, v, masks[given_mask])
            deep = min(deep + n, rollback)
        elif do == "crop":
            n = data.draw(st.integers(0, min(deep, naive.k.shape[2])))
            cache.crop(-n) if n else cache.crop(naive.k.shape[2] + 3)
            deep -= n
            end = naive.k.shape[2] - n
            naive.k, naive.v = naive.k[:, :, :end], naive.v[:, :, :end]
            naive.there = naive.there[:, :end]
        elif do == "select" and cache.dtype is not None:
            batch = len(naive.k)
            index = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
            cache.batch_select_indices(index)
            order = data.draw(st.permutations(range(len(index))))
            cache.reorder_cache(np.array(order))
            index = np.array(index)[order]
            naive.k, naive.v, naive.there = (x[index] for x in (naive.k, naive.v, naive.there))
        elif do == "save":
            saved.append((cache.snapshot(), copy.copy(naive), deep))
        elif do == "restore" and saved:
            snapshot, was, deep = saved[data.draw(st.integers(0, len(saved) - 1))]
            cache.restore(snapshot)
            naive = copy.copy(was)
        naive.check(cache)


def test_snapshot_is_a_copy() -> None:
    cache = filled(tokens=20)
    saved = cache.snapshot()
    want = saved.held.k.copy()
    assert saved.nbytes == 20 * 2 * 3 * 9 * 4
    cache.crop(3)
    cache.append(*new(10, seed=1))
    cache.restore(saved)
    cache.crop(3)
    cache.append(*new(10, seed=2))
    np.testing.assert_array_equal(saved.held.k, want)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_go_their_own_way(way: Callable[[sa.Cache], sa.Cache]) -> None:
    cache = filled("window:8", rollback=2)
    other = way(cache)
    assert state(other)[-1] == state(cache)[-1] and other.spec == cache.spec
    mine, theirs = cache.append(*new(1, seed=1))[0], other.append(*new(1, seed=2))[0]
    assert not np.shares_memory(mine, theirs)
    cache.crop(19)
    assert (cache.get_seq_length(), other.get_seq_length()) == (19, 21)


def test_crop_as_in_transformers() -> None:
    cache = filled(tokens=20)
    for n, left in ((20, 20), (99, 20), (-3, 17), (5, 5), (0, 0), (-0, 0), (4, 0)):
        cache.crop(n)
        assert cache.get_seq_length() == left
    sa.Cache().crop(3)
    window = sa.Cache("window:4:sinks=2")
    window.append(*new(500))
    window.crop(2)  # all of the first two are there
    window.crop(0)
    assert window.append(*new(3))[0].shape[2] == 3


@pytest.mark.parametrize("spec", ["window:7", "window:20:sinks=3"])
def test_crop_to_the_last_possible_token(spec: str) -> None:
    """The length that the error offers is the least that the next token can go on from."""
    k, v = new(300)
    q = np.repeat(k, 2, 1)
    cache = sa.Cache(spec)
    for t in range(300):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    with pytest.raises(sa.ArgumentError) as caught:
        cache.crop(50)
    least = int(re.search(r"crop to (\d+) or more", str(caught.value)).group(1))  # type: ignore[union-attr]
    with pytest.raises(sa.ArgumentError, match="forgotten keys"):
        cache.crop(least - 1)
    cache.crop(least)
    now = slice(least, least + 1)
    got = sa.attention(q[:, :, now], k[:, :, now], v[:, :, now], causal=True, cache=cache)
    want = sa.attention(*(x[:, :, : least + 1] for x in (q, k, v)), spec, causal=True)[:, :, now]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_dtypes_by_any_name() -> None:
    for given_as, name in [
        (np.float16, "float16"),
        ("f2", "float16"),
        (np.dtype(np.float64), "float64"),
        ("bfloat16", "bfloat16"),
        (None, "float32"),
        (float, "float64"),
    ]:
        cache = sa.Cache(dtype=given_as)
        k, _ = cache.append(*new(3, dtype="f8" if name == "float64" else "f4"))
        assert cache.dtype == name
        assert k.dtype == ("uint16" if name == "bfloat16" else name)


def test_half_is_half_the_memory() -> None:
    assert (
        2 * filled(dtype="float16").nbytes == filled().nbytes == 2 * filled(dtype="bfloat16").nbytes
    )


def test_rounding_goes_to_even() -> None:
    """Into both half types, special values included, and from one into the other."""
    edge = [0.0, -0.0, 1.00390625, 1.01171875, 65519.0, 65520.0, 3.4e38, 1e-8, np.inf, np.nan]
    x = np.array(edge, np.float32).reshape(1, 1, -1, 1)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    got, _ = sa.Cache(dtype="float16").append(x, x)
    np.testing.assert_array_equal(got, want)
    bits, _ = sa.Cache(dtype="bfloat16").append(x, x)
    back = (bits.astype(np.uint32) << 16).view(np.float32).ravel()
    np.testing.assert_array_equal(back[:4], [0.0, -0.0, 1.0, 1.015625])
    assert np.isinf(back[[6, 8]]).all() and np.isnan(back[9])
    half, _ = sa.Cache(dtype="bfloat16").append(want, want)
    np.testing.assert_array_equal(half.ravel()[:4], bits.ravel()[:4])


# ---- what it refuses, unchanged -----------------------------------------------------------------

X = np.zeros((2, 6, 1, 4), np.float32)  # a query for new(1)


def attend(cache: sa.Cache, n: int = 1, spec: Any = None, q: Any = X, **call: Any) -> Any:
    k, v = new(n)
    return sa.attention(q, k, v, spec, **{"causal": True, "cache": cache, **call})


WRONG: dict[str, tuple[Any, Callable[[sa.Cache], Any], type[Exception], str]] = {
    "spec": (
        "window:8",
        lambda c: attend(c, spec="topk:4"),
        ValueError,
        r"made for window:8 and spec is topk:4: make one for that, sa.Cache\('topk:4'\)",
    ),
    "plan": (None, lambda c: attend(c, spec=sa.plan(X, X)), ValueError, "a plan is of one call"),
    "layers": (
        None,
        lambda c: attend(c, spec="perlayer(0=dense)"),
        ValueError,
        r"one spec a layer.*pass spec.layer\(i\)",
    ),
    "top left": (None, lambda c: attend(c, causal="top_left"), ValueError, "pass causal=True"),
    "not causal": (
        "window:window_size=4/4",
        lambda c: attend(c, causal=False),
        ValueError,
        "causal=False may show any key.*pass causal=True",
    ),
    "batch": (
        None,
        lambda c: c.append(*new(1, batch=3)),
        ValueError,
        r"k has \(batch, heads, dim\) = \(3, 3, 4\) and the cache holds \(2, 3, 4\)",
    ),
    "heads": (None, lambda c: c.append(*(x[:, :2] for x in new(1))), ValueError, r"\(2, 2, 4\)"),
    "dim": (
        None,
        lambda c: c.append(*(x[..., :4] for x in new(1))),
        ValueError,
        r"v has \(batch, heads, dim\) = \(2, 3, 4\) and the cache holds \(2, 3, 5\)",
    ),
    "lengths": (
        None,
        lambda c: c.append(new(2)[0], new(1)[1]),
        ValueError,
        "k has 2 tokens and v has 1",
    ),
    "leads": (None, lambda c: c.append(new(1)[0], new(1)[1][0]), ValueError, "one batch"),
    "dtype": (
        None,
        lambda c: c.append(*new(1, dtype="f8")),
        TypeError,
        r"k and v are float64 and the cache is float32: convert them, or .*dtype='float64'",
    ),
    "half dtype": (None, lambda c: c.append(*new(1, dtype="f2")), TypeError, "are float16"),
    "int dtype": (None, lambda c: c.append(*new(1, dtype="i4")), TypeError, "k has dtype int32"),
    "key mask": (
        None,
        lambda c: attend(c, key_mask=np.ones((2, 20), bool)),
        ValueError,
        r"key_mask must have shape \(2, 1\) for the new tokens or \(2, 21\) for all, got \(2, 20\)",
    ),
    "float key mask": (None, lambda c: attend(c, key_mask=np.ones((2, 1))), TypeError, "key_mask"),
    "mask": (
        "window:8",
        lambda c: attend(c, mask=np.ones((1, 20), bool)),
        ValueError,
        r"mask must have one column or 21, one a token so far, got shape \(1, 20\)",
    ),
    "bias": (None, lambda c: attend(c, bias=np.ones((2, 7))), ValueError, "bias must have one"),
    "too many queries": (
        "window:8",
        lambda c: [attend(c, 300, q=X), attend(c, q=X.repeat(99, 2))],
        ValueError,
        "q has 99 rows, and the cache of window:8 has forgotten keys",
    ),
    "scale": (None, lambda c: attend(c, scale=np.nan), ValueError, "scale"),
    "params": (None, lambda c: attend(c, params={"layout": X}), ValueError, "layout"),
    "past": ("blockmask", lambda c: attend(c, params={"past": 3}), ValueError, "past"),
    "no layout": (
        "blockmask:8",
        lambda c: attend(c),
        ValueError,
        r"needs params=.*shape \(heads or 1, 3, 3\).*got params=None",
    ),
    "small layout": (
        "blockmask:8",
        lambda c: attend(c, params={"layout": np.ones((1, 2, 9), bool)}),
        ValueError,
        r"layout must reach rows 20 to 21 and 21 keys .* at least \(heads or 1, 3, 3\), got",
    ),
    "one spec a head": (
        "perhead(2*window:4)",
        lambda c: attend(c),
        ValueError,
        "2 specs and q has 6 heads",
    ),
    "heads of q": (None, lambda c: attend(c, q=X[:, :4]), ValueError, "heads"),
    "out": (None, lambda c: attend(c, out=np.empty(3, "f4")), ValueError, "out must have shape"),
    "dropout": (None, lambda c: attend(c, dropout_p=0.1), ValueError, "dropout_p is for training"),
    "packed": (None, lambda c: attend(c, cu_seqlens=[0, 1]), ValueError, "cu_seqlens"),
    "weights": (
        None,
        lambda c: attend(c, return_weights=True),
        NotImplementedError,
        "return_weights .* with a cache",
    ),
    "crop": (
        "window:8",
        lambda c: [c.append(*new(480)), c.crop(20)],
        ValueError,
        r"crop\(20\) goes back to 20 of 500 tokens.*crop to 4\d\d or more, or .*rollback=480",
    ),
    "crop of more": (None, lambda c: c.crop(-21), ValueError, r"drops 21 tokens and the cache has"),
    "crop by half": (None, lambda c: c.crop(1.5), ValueError, "integer"),
    "reorder": (
        None,
        lambda c: c.reorder_cache([0, 2]),
        ValueError,
        "reorder_cache: index must name batch entries 0 to 1, got 2",
    ),
    "reorder below": (None, lambda c: c.reorder_cache([0, -1]), ValueError, "0 to 1, got -1"),
    "reorder short": (None, lambda c: c.reorder_cache([0]), ValueError, "each of the 2"),
    "reorder floats": (None, lambda c: c.reorder_cache([0.0, 1]), ValueError, "float64"),
    "select bools": (None, lambda c: c.batch_select_indices([True, True]), ValueError, "bool"),
    "select": (None, lambda c: c.batch_select_indices([5]), ValueError, "0 to 1, got 5"),
    "restore": (None, lambda c: c.restore(c), ValueError, "takes what snapshot"),
    "restore spec": (
        "window:8",
        lambda c: c.restore(sa.Cache("window:9").snapshot()),
        ValueError,
        "of a cache of window:9 with rollback=0 and this is one of window:8",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_change_nothing(case: str) -> None:
    spec, call, error, words = WRONG[case]
    cache, twin = filled(spec), filled(spec)
    if case in ("too many queries", "crop"):  # what goes well before
        (attend(twin, 300) if case == "too many queries" else twin.append(*new(480)))
    with pytest.raises(error, match=words) as caught:
        call(cache)
    assert isinstance(caught.value, sa.SparseAttnError)
    assert "\n" not in str(caught.value)
    assert state(cache) == state(twin)


@pytest.mark.parametrize("case", ["batch", "heads", "no layout", "one spec a head", "heads of q"])
def test_a_first_call_that_fails_fixes_nothing(case: str) -> None:
    spec, call, error, _ = WRONG[case]
    cache = sa.Cache(spec)
    if case in ("batch", "heads"):
        cache.restore(cache.snapshot())
        with pytest.raises(ValueError, match="must have one batch"):
            cache.append(new(1)[0], new(1, batch=3)[1])
    else:
        with pytest.raises(error):
            call(cache)
    assert cache.get_seq_length() == 0 and cache.dtype is None and cache.nbytes == 0
    cache.append(*new(4, batch=3, dtype="f8"))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: sa.Cache("windw:4"), ValueError, "did you mean window"),
        (lambda: sa.Cache(sa.PerLayer({0: "dense"})), ValueError, r"pass spec.layer\(i\)"),
        (lambda: sa.Cache(7), ValueError, "a spec is an object"),
        (lambda: sa.Cache(dtype="int8"), TypeError, "dtype must be one of float32, .*'int8'"),
        (lambda: sa.Cache(dtype=[3]), TypeError, "dtype must be one of"),
        (lambda: sa.Cache(rollback=-1), ValueError, "rollback must be .* got -1"),
        (lambda: sa.Cache(rollback=0.5), ValueError, "rollback must be an integer"),
        (lambda: sa.Cache().reorder_cache([0]), ValueError, "the cache is empty"),
        (
            lambda: sa.Cache(dtype="float16").restore(filled().snapshot()),
            TypeError,
            "float32 cache and this is a float16 one",
        ),
        (lambda: attend([]), ValueError, "cache must be a sa.Cache, got list"),  # type: ignore[arg-type]
    ],
)
def test_wrong_makes(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_same_spec_in_other_words() -> None:
    cache = filled("window:8")
    for spec in (None, "window:8", sa.Window(8), "Window:size=8", "window:8"):
        attend(cache, spec=spec)
    assert cache.get_seq_length() == 25


def test_repr() -> None:
    assert repr(sa.Cache("topk:4")) == "<Cache of topk:4: empty>"
    assert repr(filled(dtype="bfloat16")) == (
        "<Cache of dense: batch 2, kv_heads 3, dim 4, 20 tokens, 20 kept as bfloat16, 6,912 bytes>"
    )


# ---- threads, interrupts ------------------------------------------------------------------------


class Held(sa.Dense):
    """Dense, but a call does ``during`` while it makes its plan."""

    during: Callable[[], None]

    def build(self, *args: Any) -> Any:
        type(self).during()
        return sa.Dense().build(*args)


@pytest.fixture
def during() -> Iterator[Callable[[Callable[[], None]], None]]:
    def set_it(action: Callable[[], None]) -> None:
        Held.during = staticmethod(action)  # type: ignore[assignment]

    yield set_it
    del Held.during


@pytest.mark.promise("C1")
def test_second_thread_is_refused(during: Any) -> None:
    inside, go_on = threading.Event(), threading.Event()
    during(lambda: (inside.set(), go_on.wait(30)))
    cache = filled(Held())
    runner = threading.Thread(target=attend, args=(cache,))
    runner.start()
    try:
        assert inside.wait(30)
        for call in (
            lambda: attend(cache),
            lambda: cache.append(*new(1)),
            lambda: cache.crop(1),
            lambda: cache.reorder_cache([1, 0]),
            lambda: cache.snapshot(),
            lambda: cache.restore(sa.Cache(Held()).snapshot()),
        ):
            with pytest.raises(RuntimeError, match="in use by another thread") as caught:
                call()
            assert isinstance(caught.value, sa.CacheInUse)
        assert cache.get_seq_length() == 20
    finally:
        go_on.set()
        runner.join()
    assert cache.get_seq_length() == 21
    cache.crop(20)


def test_interrupt_leaves_the_cache_as_it_was(during: Any) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    during(stop)
    cache, twin = filled(Held(), tokens=64), filled(Held(), tokens=64)
    for n in (1, 64, 1000):
        with pytest.raises(KeyboardInterrupt):
            attend(cache, n)
    assert state(cache) == state(twin)
    during(lambda: None)
    assert attend(cache).tobytes() == attend(twin).tobytes()
