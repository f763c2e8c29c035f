"""Gradients against central differences in float64: every spec, alignment, layout and option.

What a selector keeps is held fixed, as the gradient holds it: the plan is made once, so near-ties
and the jumps at them do not enter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import CAUSAL_SPECS, EVERY_SPEC, fit, make_params, make_qkv, random_masks

import sparseattn as sa
from sparseattn.variants import Variant

EPS, ATOL, RTOL = 1e-6, 1e-5, 1e-3
WHOLE = 60  # elements of an input up to which every one of them is moved
DIRECTIONS = 10  # beyond that

# batch, heads, kv_heads, n_q, n_k, dim, dim_v
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (1, 1, 1, 3, 3, 2, 2),
    (1, 2, 1, 3, 4, 2, 3),
    (2, 2, 2, 1, 7, 3, 1),
    (1, 4, 2, 5, 2, 2, 2),
    (2, 3, 1, 4, 4, 1, 5),
    (1, 1, 1, 9, 1, 4, 4),
    (3, 2, 1, 2, 9, 5, 2),
    (1, 2, 2, 17, 17, 8, 8),
    (1, 2, 1, 23, 40, 3, 5),
    (2, 4, 2, 33, 33, 4, 4),
    (1, 3, 3, 7, 70, 5, 3),
    (1, 2, 1, 70, 20, 3, 3),
    (2, 2, 1, 18, 67, 7, 4),
    (1, 6, 3, 20, 21, 2, 9),
    (1, 1, 1, 65, 66, 4, 2),
    (1, 2, 2, 5, 130, 3, 3),
    (2, 1, 1, 12, 12, 16, 24),
    (1, 8, 2, 3, 19, 2, 2),
    (1, 2, 2, 41, 37, 17, 3),
]
# A straight-through gradient is no slope: tests/test_gradients.py has it.
SLOPES = [spec for spec in EVERY_SPEC if "straight_through" not in str(spec)]


def rng_of(*what: object) -> np.random.Generator:
    return np.random.default_rng(list(repr(what).encode()))


def make_option(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Arguments of a call, by name; ``sink`` goes into params."""
    batch, heads, _, n_q, n_k, *_ = shape
    rng = rng_of(name, shape)
    sizes = {
        "bias": (n_q, n_k),
        "bias of heads and keys": (heads, 1, n_k),
        "bias of rows": (batch, 1, n_q, 1),
        "bias of one": (1, 1, 1, 1),
        "bias of all": (batch, heads, n_q, n_k),
    }
    masks = random_masks(shape)
    if name in sizes:
        return {"bias": rng.standard_normal(sizes[name])}
    if name == "everything":
        return {
            **make_option("bias of heads and keys", shape),
            **masks,
            "softcap": 1.5,
            "scale": 0.7,
            "dropout_p": 0.3,
            "seed": 11,
            "sink": rng.standard_normal(heads),
        }
    return {
        "plain": {},
        "softcap": {"softcap": 0.8, "scale": 1.3},
        "mask": {"mask": masks["mask"]},
        "key_mask": {"key_mask": masks["key_mask"]},
        "sink": {"sink": rng.standard_normal(heads)},
        "dropout": {"dropout_p": 0.4, "seed": 5},
    }[name]


OPTIONS = [
    *("plain", "softcap", "bias", "bias of heads and keys", "bias of rows", "bias of one"),
    *("bias of all", "mask", "key_mask", "sink", "dropout", "everything"),
]


class Case:
    """One call as a function of its arrays, under a plan held fixed."""

    def __init__(self, spec: Variant, causal: Any, shape: tuple[int, ...], option: str) -> None:
        terms = make_option(option, shape)
        q, k, v = make_qkv(shape, np.float64, seed=3)
        call = {n: terms.pop(n) for n in ("mask", "key_mask") if n in terms}
        self.arrays = {"q": q, "k": k, "v": v}
        self.arrays |= {n: terms.pop(n) for n in ("bias", "sink") if n in terms}
        self.terms = terms
        scoring = {n: terms[n] for n in ("scale", "softcap") if n in terms}
        scoring["bias"] = self.arrays.get("bias")
        params = make_params(spec, shape)
        self.plan = sa.plan(q, k, spec, causal=causal, params=params, **call, **scoring)
        rng = rng_of(spec, causal, shape, option)
        out, lse = self(self.arrays)
        self.dout = rng.standard_normal(out.shape)
        self.dlse = np.where(np.isneginf(lse), 0, rng.standard_normal(lse.shape))
        self.rng = rng

    def arguments(self, arrays: dict[str, np.ndarray]) -> tuple[list[Any], dict[str, Any]]:
        rest = dict(arrays)
        args = [rest.pop(name) for name in "qkv"]
        sink = rest.pop("sink", None)
        return args, {**self.terms, **rest, "params": None if sink is None else {"sink": sink}}

    def __call__(self, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        args, terms = self.arguments(arrays)
        return sa.attention(*args, self.plan, return_lse=True, **terms)

    def vjp(self) -> Callable[..., dict[str, np.ndarray]]:
        args, terms = self.arguments(self.arrays)
        vjp = sa.attention_vjp(*args, self.plan, **terms)
        out, lse = self(self.arrays)
        assert vjp.out.tobytes() == out.tobytes() and vjp.lse.tobytes() == lse.tobytes()

        def pull(dout: Any, dlse: Any) -> dict[str, np.ndarray]:
            dq, dk, dv, dbias, dparams = vjp.pullback(dout, dlse)
            found = {"q": dq, "k": dk, "v": dv}
            found |= {} if dbias is None else {"bias": dbias}
            return found | (dparams or {})

        return pull

    def slope(self, name: str, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Central differences of out and lse along a direction of one array."""
        x = self.arrays[name]
        (o1, l1), (o0, l0) = (
            self({**self.arrays, name: x + step * direction}) for step in (EPS, -EPS)
        )
        with np.errstate(invalid="ignore"):
            return (o1 - o0) / (2 * EPS), np.where(np.isneginf(l1), 0, (l1 - l0) / (2 * EPS))

    def check(self) -> None:
        pull = self.vjp()
        grads = pull(self.dout, self.dlse)
        again = pull(self.dout, self.dlse)
        for name, x in self.arrays.items():
            assert grads[name].tobytes() == again[name].tobytes(), name
            assert (grads[name].shape, grads[name].dtype) == (x.shape, x.dtype)
            if x.size <= WHOLE:
                steps = np.eye(x.size).reshape(x.size, *x.shape)
            else:
                steps = self.rng.standard_normal((DIRECTIONS, *x.shape))
            for step in steps:
                dout, dlse = self.slope(name, step)
                want = (dout * self.dout).sum() + (dlse * self.dlse).sum()
                got = (grads[name] * step).sum()
                assert abs(got - want) <= ATOL + RTOL * abs(want), (name, got, want)


@pytest.mark.promise("A2")
@pytest.mark.parametrize("spec", SLOPES, ids=str)
def test_gradients_are_slopes(spec: Variant) -> None:
    """Twenty shapes; alignments and options turn, so that over the specs each meets each."""
    turn = SLOPES.index(spec)
    alignments = [causal for other, causal in CAUSAL_SPECS if other == spec]
    for at, shape in enumerate(SHAPES):
        shape = fit(spec, shape)
        option = OPTIONS[(turn + 5 * at) % len(OPTIONS)]
        causal = alignments[(turn + at) % len(alignments)]
        try:
            Case(spec, causal, shape, option).check()
        except AssertionError as error:
            raise AssertionError(f"{spec}, causal={causal}, {shape}, {option}: {error}") from None


@pytest.mark.promise("A2")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("spec", ["dense", "window:3:sinks=1", "topk:3", "topk:3:placement=post"])
def test_whole_jacobians(spec: str, option: str) -> None:
    """Every element of the output against every element of every input."""
    case = Case(sa.parse(spec), True, (1, 2, 1, 4, 5, 2, 2), option)
    pull = case.vjp()
    out, lse = case.dout, case.dlse
    ours: dict[str, list[np.ndarray]] = {name: [] for name in case.arrays}
    for at in range(out.size + lse.size):
        dout, dlse = np.zeros(out.shape), np.zeros(lse.shape)
        (dout if at < out.size else dlse).reshape(-1)[at if at < out.size else at - out.size] = 1
        for name, grad in pull(dout, dlse).items():
            ours[name].append(grad.reshape(-1))
    for name, x in case.arrays.items():
        slopes = [
            np.concatenate([y.reshape(-1) for y in case.slope(name, step.reshape(x.shape))])
            for step in np.eye(x.size)
        ]
        np.testing.assert_allclose(
            np.array(ours[name]), np.transpose(slopes), rtol=RTOL, atol=ATOL, err_msg=name
        )


def test_a_wrong_gradient_is_found() -> None:
    """The check itself: a gradient that is off by one part in a hundred does not pass."""
    case = Case(sa.Dense(), False, (1, 2, 1, 4, 5, 2, 2), "plain")
    true = case.vjp()
    for name in case.arrays:
        case.vjp = lambda name=name: (
            lambda *d: {  # type: ignore[method-assign]
                n: g * (1.01 if n == name else 1) for n, g in true(*d).items()
            }
        )
        with pytest.raises(AssertionError):
            case.check()
