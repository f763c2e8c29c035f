"""Choosing a token from logits: what may be drawn first, then where each random number points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import requires
from reference import sample as reference

import sparseattn as sa
from sparseattn import _core

Array = np.ndarray
HOW = [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.9), (1.3, 0, 0.2), (1.0, 40, 0.6),
    (0.8, 1, 1.0), (1.0, 0, 1e-9), (1.0, 10_000, 0.999), (1e-3, 3, 0.5),
]  # fmt: skip
NEAR = 1e-6  # float32 logits over a temperature: nearer to a border, either side is right


def logits(rows: int, vocab: int, spread: float = 2.0, seed: int = 0) -> Array:
    rng = np.random.default_rng([seed, rows, vocab])
    return (spread * rng.standard_normal((rows, vocab))).astype(np.float32)


def sample(x: Array, u: Any, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Array:
    return _core.sample(x, np.full(len(x), u, np.float64), temperature, top_k, top_p)


def sweep(row: Array, count: int, *how: Any) -> Array:
    """The tokens of evenly spaced numbers."""
    u = (np.arange(count) + 0.5) / count
    return _core.sample(np.repeat(row[None], count, 0), u, *how)


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 300, 5000])
def test_every_number_points_where_the_definition_says(vocab: int, how: Any, isa: str) -> None:
    for row in logits(3, vocab):
        p = reference.probabilities(row, *how)
        u = np.random.default_rng(vocab).random(200)
        got = _core.sample(np.repeat(row[None], 200, 0), u, *how)
        cut = 0 < how[1] < vocab or how[2] < 1
        for number, token in zip(u, got, strict=True):
            want, distance = reference.draw(p, number, in_order=not cut)
            assert token == want or distance < NEAR
        assert (p[got] > 0).all()


def test_frequencies_are_the_probabilities() -> None:
    row = logits(1, 40)[0]
    for how in ((1.0, 0, 1.0), (0.8, 12, 0.9)):
        p = reference.probabilities(row, *how)
        share = np.bincount(sweep(row, 20_000, *how), minlength=40) / 20_000
        assert np.abs(share - p).max() <= 1 / 20_000 + NEAR


def test_greedy_takes_the_lower_of_equals(isa: str) -> None:
    x = np.zeros((3, 50), np.float32)
    x[0, [17, 4, 30]] = 2
    x[1] = -np.inf
    x[1, 33] = -5
    assert sample(x, 0.999, 0.0).tolist() == [4, 33, 0]
    assert sample(x, 0.999, 0.0, 3, 0.5).tolist() == [4, 33, 0]


def test_equals_of_the_last_of_top_k_stay() -> None:
    """As in transformers: 2 of 4 equal logits cannot be the 2 largest."""
    row = np.array([0, 3, 1, 3, 3, 3, 0], np.float32)
    assert set(sweep(row, 100, 1.0, 2, 1.0)) == {1, 3, 4, 5}
    assert set(sweep(row, 100, 1.0, 2, 0.4)) == {1, 3}


def test_what_is_ruled_out_never_comes(isa: str) -> None:
    row = logits(1, 600)[0]
    row[::2] = -np.inf
    for how in HOW:
        assert (sweep(row, 500, *how) % 2 == 1).all()
    ends = sample(np.repeat(row[None], 2, 0), 0.0, 1.0)[0], sample(row[None], 1 - 1e-16, 1.0)[0]
    assert ends == (1, 599)


def test_large_and_small_numbers() -> None:
    row = np.array([3e38, -3e38, 2.9e38], np.float32)
    for how in ((1.0, 0, 1.0), (1e-300, 0, 1.0), (1e6, 2, 0.9), (1e300, 0, 1.0)):
        tokens = sweep(row, 50, *how)
        assert tokens[0] == 0 and (how[0] == 1e300 or set(tokens) == {0})


def test_threads_and_rows_change_nothing(with_threads: Any) -> None:
    x, u = logits(40, 3000), np.random.default_rng(0).random(40)
    want = None
    for count in (1, 3, 5):
        with_threads(count)
        got = _core.sample(x, u, 0.9, 0, 0.95)
        want = got if want is None else want
        assert np.array_equal(got, want)
    alone = [_core.sample(x[i : i + 1], u[i : i + 1], 0.9, 0, 0.95)[0] for i in range(40)]
    assert np.array_equal(alone, want)


@pytest.mark.parametrize("how", HOW, ids=str)
def test_keeps_what_transformers_keeps(how: Any) -> None:
    torch, transformers = requires("torch"), requires("transformers")
    temperature, top_k, top_p = how
    processors = transformers.LogitsProcessorList(
        [
            transformers.TemperatureLogitsWarper(temperature),
            *([transformers.TopKLogitsWarper(top_k)] if top_k else []),
            *([transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []),
        ]
    )
    for row in logits(3, 300):
        theirs = processors(None, torch.from_numpy(row.copy())[None])[0].softmax(0).numpy()
        np.testing.assert_allclose(reference.probabilities(row, *how), theirs, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers(bad: float) -> None:
    x = logits(2, 30)
    x[1, 7] = bad
    for how in ((0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 5, 0.5)):
        with pytest.raises(sa.ArgumentError, match=r"row 1 is -?(nan|inf), so no token can be"):
            sample(x, 0.5, *how)
    with pytest.raises(sa.ArgumentError, match="row 0 is -inf"):
        sample(np.full((1, 4), -np.inf, np.float32), 0.5, 1.0)


def errors() -> dict[str, tuple[tuple[Any, ...], type[Exception], str]]:
    x, u = np.zeros((2, 5), np.float32), np.zeros(2)
    value, kind = sa.ArgumentError, sa.DtypeError
    return {
        "double": ((x.astype("f8"), u, 1.0, 0, 1.0), kind, "logits must be float32"),
        "axes": ((x[0], u, 1.0, 0, 1.0), value, "logits must have 2 axes"),
        "strides": ((x[:, ::2], u, 1.0, 0, 1.0), value, "logits must be C-contiguous"),
        "empty": ((x[:, :0], u, 1.0, 0, 1.0), value, "logits must have between 1 and"),
        "numbers": ((x, u[:1], 1.0, 0, 1.0), value, "u must have 2"),
        "single numbers": ((x, u.astype("f4"), 1.0, 0, 1.0), kind, "u must be float64"),
        "cold": ((x, u, -1.0, 0, 1.0), value, "temperature must be"),
        "top_k": ((x, u, 1.0, -1, 1.0), value, "top_k must be"),
        "top_p": ((x, u, 1.0, 0, 1.5), value, "top_p must be"),
    }


@pytest.mark.parametrize("case", errors())
def test_errors(case: str) -> None:
    args, kind, words = errors()[case]
    with pytest.raises(kind, match=words):
        _core.sample(*args)


def test_no_memory_is_said() -> None:
    x = logits(2, 5000)
    _core.trim()
    try:
        for nth in range(1, 10):
            _core.fail_set(nth)
            try:
                sample(x, 0.5, 1.0, 50, 0.9)
            except sa.OutOfMemory:
                _core.trim()
            else:
                break
        assert nth > 1
    finally:
        _core.fail_set(0)
