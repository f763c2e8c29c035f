"""The contract checker: every built-in spec passes, every kind of broken variant is caught."""

from __future__ import annotations

import dataclasses
import doctest
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import make_params
from reference import attention as ref

import sparseattn as sa
from sparseattn import testing
from sparseattn.testing_subject import softmax_attention
from sparseattn.variants import BlockMask, Variant, base, variants

pytestmark = pytest.mark.promise("G1")

TEXTS = [text for cls in variants().values() for text in cls.examples]


def run(spec: Variant, **options: Any) -> testing.Report:
    return testing.check_variant(spec, params=make_params if spec.arrays else None, **options)


@pytest.mark.parametrize("text", TEXTS)
def test_every_built_in_spec_keeps_its_contract(text: str) -> None:
    spec = sa.parse(text)
    report = run(spec)
    assert not report.failed and report.spec == str(spec)
    assert len(report.passed) + len(report.skipped) == len(testing.checks())
    assert len(report.passed) >= (12 if isinstance(spec, sa.PerLayer) else 45)


@pytest.mark.nightly
@pytest.mark.parametrize("text", TEXTS)
def test_every_built_in_spec_in_the_long_form(text: str) -> None:
    assert not run(sa.parse(text), long=True).failed


def test_dense_skips_next_to_nothing() -> None:
    assert set(run(sa.Dense()).skipped) == {"keep_covers_rows"}
    assert not run(sa.Window(8, sinks=2)).skipped


# ---- variants of a user's own: one that is right, and one broken in each way ---------------------


@dataclass(frozen=True, slots=True)
class Parity(Variant):
    """Keys at an even distance from the row, a pattern written in Python.

    Parameters
    ----------
    step : int
        Distance between kept keys.
    """

    kind: ClassVar[str] = "parity"
    examples: ClassVar[tuple[str, ...]] = ("parity:3",)

    step: int = 2

    def build(self, q: Any, k: Any, problem: Any, params: Any) -> Any:
        return pattern(self.keep_of(q.shape[2], k.shape[2]), q, k, problem)

    def keep_of(self, n_q: int, n_k: int) -> np.ndarray:
        back = np.arange(n_q)[:, None] + n_k - n_q - np.arange(n_k)
        return np.asarray(back % self.step == 0)


def pattern(keep: np.ndarray, q: Any, k: Any, problem: Any) -> Any:
    """The plan of a mask (n_q, n_k), cut by what the call itself hides."""
    return BlockMask(1).build(q, k, problem, {"layout": keep[None]})


@dataclass(frozen=True, slots=True)
class Mixed(Variant):
    """Half of one spec's output and half of another's, as a compose rule.

    Parameters
    ----------
    near : int
        Window of the one; the other is dense.
    """

    kind: ClassVar[str] = "mixed"
    examples: ClassVar[tuple[str, ...]] = ("mixed:5",)

    near: int = 5

    def apply(self, ops: Any, q: Any, k: Any, v: Any, params: Any) -> Any:
        one, lse = ops.attend(q, k, v, sa.Window(window_size=(self.near, 0)), params)
        two, _ = ops.attend(q, k, v, sa.Dense(), params)
        return (one + two) / 2, lse


def mixed(q: Any, k: Any, v: Any, see: Any, causal: Any, params: Any) -> Any:
    offset = 0 if causal == "top_left" else k.shape[2] - q.shape[2]
    back = np.arange(q.shape[2])[:, None] + offset - np.arange(k.shape[2])
    near = see & (back >= 0) & (back <= 5)
    (one, lse), (two, _) = (ref.attention(q, k, v, kept) for kept in (near, see))
    return (one + two) / 2, lse


class Broken(Parity):
    """Base of the broken ones: what is not overridden is right.

    Parameters
    ----------
    step : int
        Distance between kept keys.
    """

    kind: ClassVar[str] = "broken"
    examples: ClassVar[tuple[str, ...]] = ("broken:3",)


class LeaksTheFuture(Broken):
    def build(self, q: Any, k: Any, problem: Any, params: Any) -> Any:
        return Parity.build(self, q, k, problem._replace(causal=0), params)


class LeaksByItsValues(Broken):
    def apply(self, ops: Any, q: Any, k: Any, v: Any, params: Any) -> Any:
        return ops.attend(q, k, v + np.nanmean(v, 2, keepdims=True), self, params)


class LeaksByItsQueries(Broken):
    def apply(self, ops: Any, q: Any, k: Any, v: Any, params: Any) -> Any:
        return ops.attend(q + q.mean(2, keepdims=True), k, v, self, params)


class IgnoresKeyMask(Broken):
    def build(self, q: Any, k: Any, problem: Any, params: Any) -> Any:
        return Parity.build(self, q, k, problem._replace(key_mask=None), params)


class IgnoresMask(Broken):
    def build(self, q: Any, k: Any, problem: Any, params: Any) -> Any:
        return Parity.build(self, q, k, problem._replace(mask=None), params)


class NotDeterministic(Broken):
    def build(self, q: Any, k: Any, problem: Any, params: Any) -> Any:
        keep = np.random.default_rng().random((q.shape[2], k.shape[2])) < 0.5
        return pattern(keep, q, k, problem)


class NotDeterministicOutput(Broken):
    def apply(self, ops: Any, q: Any, k: Any, v: Any, params: Any) -> Any:
        out, lse = ops.attend(q, k, v, self, params)
        return out + np.random.default_rng().random(out.shape).astype(out.dtype) * 1e-3, lse


class ModifiesInputs(Broken):
    def build(self, q: Any, k: Any, problem: Any, params: Any) -> Any:
        k *= 2
        return Parity.build(self, q, k, problem, params)


class WrongLse(Broken):
    def apply(self, ops: Any, q: Any, k: Any, v: Any, params: Any) -> Any:
        out, lse = ops.attend(q, k, v, self, params)
        return out, lse + lse.dtype.type(1e-3)


class WrongOutput(WrongLse):
    def apply(self, ops: Any, q: Any, k: Any, v: Any, params: Any) -> Any:
        out, lse = ops.attend(q, k, v, self, params)
        return out * out.dtype.type(1 + 1e-6), lse


class WrongShape(Broken):
    def apply(self, ops: Any, q: Any, k: Any, v: Any, params: Any) -> Any:
        out, lse = ops.attend(q, k, v, self, params)
        return out, lse[:, :1]


class WrongKeptShare(Broken):
    """Two pieces over the first head.

    Parameters
    ----------
    step : int
        Distance between kept keys.
    """

    def build(self, q: Any, k: Any, problem: Any, params: Any) -> Any:
        (whole,) = Parity.build(self, q, k, problem, params)
        return (whole, whole)


class WrongCount(Broken):
    def build(self, q: Any, k: Any, problem: Any, params: Any) -> Any:
        (piece,) = Parity.build(self, q, k, problem, params)
        return (piece._replace(core=Miscounted(piece.core)),)


class Miscounted:
    """A plan of the core that counts one pair too many."""

    def __init__(self, core: Any) -> None:
        self.core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def count(self, kv_heads: int) -> tuple[int, int, int]:
        kept, visible, rows = self.core.count(kv_heads)
        return kept + 1, visible, rows


class ReadsKeysUnsaid(Broken):
    def build(self, q: Any, k: Any, problem: Any, params: Any) -> Any:
        return pattern(self.keep_of(q.shape[2], k.shape[2]) | (k[0, 0, :, 0] > 0), q, k, problem)


class MixesBatches(Broken):
    def apply(self, ops: Any, q: Any, k: Any, v: Any, params: Any) -> Any:
        return ops.attend(q, k, v + v[-1:], self, params)


class MixesHeads(Broken):
    def apply(self, ops: Any, q: Any, k: Any, v: Any, params: Any) -> Any:
        return ops.attend(q, k, v + v[:, -1:], self, params)


class MultipliesNaN(Broken):
    """Masks by multiplication, as 0 * NaN.

    Parameters
    ----------
    step : int
        Distance between kept keys.
    """

    def apply(self, ops: Any, q: Any, k: Any, v: Any, params: Any) -> Any:
        out, lse = ops.attend(q, k, v, self, params)
        with np.errstate(invalid="ignore"):
            return out + 0 * v.sum((1, 2), keepdims=True), lse


class Overflows(Broken):
    def apply(self, ops: Any, q: Any, k: Any, v: Any, params: Any) -> Any:
        out, lse = ops.attend(q, k, v, self, params)
        with np.errstate(all="ignore"):
            return (out + 0 * np.exp(lse)[..., None] if lse.size else out), lse


class ForgetsKeys(Broken):
    def keep(self) -> tuple[int, int] | None:
        return 0, 3


class CountsFromTheCall(Broken):
    """Places keys from the first of the call, so that decode differs from prefill.

    Parameters
    ----------
    step : int
        Distance between kept keys.
    """

    def keep_of(self, n_q: int, n_k: int) -> np.ndarray:
        return np.asarray((np.arange(n_q)[:, None] + np.arange(n_k)) % 3 == 0)


class WrongRepr(Broken):
    def __repr__(self) -> str:
        return "<a variant>"


class ReprOfAnother(Broken):
    def __repr__(self) -> str:
        return "TopK(k=1)"


class Unpicklable(Broken):
    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle this variant")


class PicklesAsAnother(Broken):
    def __reduce__(self) -> Any:
        return sa.TopK, (1,)


class WrongText(Broken):
    def __str__(self) -> str:
        return f"broken:{self.step + 1}"


class TextWithComma(Broken):
    def __str__(self) -> str:
        return f"broken:step={self.step}, please"


class Unhashable(Broken):
    __hash__ = None  # type: ignore[assignment]


class EqualToAll(Broken):
    __hash__ = Variant.__hash__

    def __eq__(self, other: object) -> bool:
        return True


class Undocumented(Broken):
    pass


class BadExamples(Broken):
    examples: ClassVar[tuple[str, ...]] = ("topk:3",)


class OddKind(Broken):
    kind: ClassVar[str] = "Odd Kind"


class AnyParams(Broken):
    arrays: ClassVar[tuple[str, ...]] = ("table",)  # and never asks for it


class Warns(Broken):
    def build(self, q: Any, k: Any, problem: Any, params: Any) -> Any:
        _ = np.float32(1) / np.zeros(1, np.float32)
        return Parity.build(self, q, k, problem, params)


class TakesNothing(Broken):
    def build(self, q: Any, k: Any, problem: Any, params: Any) -> Any:
        raise sa.ArgumentError("causal is never right")


class Unchecked(Broken):
    def __post_init__(self) -> None:
        pass  # any step is taken


class Raises(Broken):
    def build(self, q: Any, k: Any, problem: Any, params: Any) -> Any:
        raise KeyError("a table")


@dataclass(slots=True)
class NotFrozen(Variant):
    """A spec that changes.

    Parameters
    ----------
    step : int
        Anything.
    """

    kind: ClassVar[str] = "notfrozen"
    examples: ClassVar[tuple[str, ...]] = ("notfrozen:3",)
    step: int = 2
    build = Parity.build
    keep_of = Parity.keep_of
    __hash__ = object.__hash__  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, eq=False)
class HoldsAnArray(Variant):
    """A spec with an array in it.

    Parameters
    ----------
    table : ndarray
        Should be a param.
    """

    kind: ClassVar[str] = "holds"
    examples: ClassVar[tuple[str, ...]] = ("holds:3",)
    table: Any = None
    build = Parity.build

    def keep_of(self, n_q: int, n_k: int) -> np.ndarray:
        return np.ones((n_q, n_k), bool)


def parity(q: Any, k: Any, v: Any, see: Any, causal: Any, params: Any) -> Any:
    return softmax_attention(q, k, v, kept := see & Parity(3).keep_of(*see.shape[2:]), kept)


def reads_layout(spec: Variant, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"table": np.zeros(3)}


TOYS: list[tuple[Variant, str, dict[str, Any]]] = [
    (LeaksTheFuture(3), "plan_sees_no_future", {}),
    (LeaksByItsValues(3), "later_keys_change_nothing", {}),
    (LeaksByItsQueries(3), "later_queries_change_nothing", {}),
    (IgnoresKeyMask(3), "plan_obeys_key_mask", {}),
    (IgnoresMask(3), "plan_obeys_mask", {}),
    (NotDeterministic(3), "plan_twice", {}),
    (NotDeterministicOutput(3), "same_bits_for_threads", {}),
    (ModifiesInputs(3), "inputs_stay_as_they_are", {}),
    (WrongLse(3), "forward_float64", {"reference": parity}),
    (WrongOutput(3), "forward_float64", {"reference": parity}),
    (WrongShape(3), "outputs_follow_inputs", {}),
    (WrongKeptShare(3), "plan_covers_heads", {}),
    (WrongKeptShare(3), "plan_counts", {}),
    (WrongCount(3), "plan_counts", {}),
    (ReadsKeysUnsaid(3), "pattern_reads_nothing", {}),
    (MixesBatches(3), "batches_are_apart", {}),
    (MixesHeads(3), "heads_are_apart", {}),
    (MultipliesNaN(3), "masked_nan_has_no_effect", {}),
    (MultipliesNaN(3), "unselected_nan_has_no_effect", {}),
    (Overflows(3), "extreme_scores_are_finite", {}),
    (ForgetsKeys(3), "keep_covers_rows", {}),
    (CountsFromTheCall(3), "decode_by_tokens", {}),
    (CountsFromTheCall(3), "decode_by_chunks", {}),
    (WrongRepr(3), "repr_round_trip", {}),
    (ReprOfAnother(3), "repr_round_trip", {}),
    (Unpicklable(3), "pickles_and_copies", {}),
    (PicklesAsAnother(3), "pickles_and_copies", {}),
    (WrongText(3), "text_round_trip", {}),
    (TextWithComma(3), "text_round_trip", {}),
    (Unhashable(3), "equal_and_hash", {}),
    (EqualToAll(3), "equal_and_hash", {}),
    (Undocumented(3), "documented", {}),
    (BadExamples(3), "examples_parse", {}),
    (OddKind(3), "kind_is_a_word", {}),
    (AnyParams(3), "unknown_params", {"params": reads_layout}),
    (Warns(3), "any_layout", {}),
    (TakesNothing(3), "takes_a_call", {}),
    (Raises(3), "takes_a_call", {}),
    (Unchecked(3), "fields_have_types", {}),
    (NotFrozen(3), "frozen_dataclass", {}),
    (HoldsAnArray(np.zeros(3)), "plain_fields", {}),
]
MINE = [Parity, Mixed, *{type(toy): None for toy, _, _ in TOYS}]


@pytest.fixture
def registry() -> Iterator[None]:
    """Variants registered by a test are forgotten after it."""
    kinds, names = dict(base._by_kind), dict(base._by_name)
    yield
    for have, before in ((base._by_kind, kinds), (base._by_name, names)):
        have.clear()
        have.update(before)  # type: ignore[arg-type]
    base.parse_text.cache_clear()


def known(spec: Variant) -> Variant:
    base.register(type(spec))
    return spec


def test_a_variant_in_python_keeps_the_contract(registry: None) -> None:
    """The recipe of CONTRIBUTING: a pattern through BlockMask(1), a compose rule with reference."""
    assert len(run(known(Parity(3))).passed) >= 50
    report = run(known(Mixed()), reference=mixed)
    assert len(report.passed) >= 35
    words = ("composes", "reference", "keeps all keys")
    assert all(any(word in why for word in words) for why in report.skipped.values())
    assert "forward_float64" not in report.skipped
    assert "forward_float64" in run(Mixed()).skipped


@pytest.mark.parametrize(
    ("toy", "name", "options"), TOYS, ids=[f"{type(t).__name__}-{n}" for t, n, _ in TOYS]
)
@pytest.mark.filterwarnings("ignore:divide by zero")  # one of them warns
def test_broken_variants_are_caught(
    toy: Variant, name: str, options: dict[str, Any], registry: None
) -> None:
    known(toy)
    with pytest.raises(testing.ContractError) as caught:
        testing.check_variant(toy, only=[name], **options)
    report = caught.value.report
    assert set(report.failed) == {name}
    message = report.failed[name]
    assert "got " in message and "expected " in message, message
    assert f"{name}: {message}" in str(caught.value) and str(report.spec) in str(caught.value)


def test_a_variant_that_nobody_registered_is_caught() -> None:
    with pytest.raises(testing.ContractError) as caught:
        run(Parity(3))
    assert set(caught.value.report.failed) == {"registered"}
    assert "@register" in str(caught.value)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_every_check_can_fail(registry: None) -> None:
    """Over all toys and all checks, each check finds a fault, not only an exception."""
    failed: set[str] = set()
    for toy, _, options in {
        type(toy): case for toy, *_ in TOYS for case in TOYS if case[0] is toy
    }.values():
        try:
            testing.check_variant(known(toy), **options)
        except testing.ContractError as error:
            found = error.report.failed.items()
            failed |= {name for name, why in found if "expected no error" not in why}
    tested_above = {"registered"}
    ours_alone = {"plan_rows", "weights_are_the_outputs"}  # what a spec cannot break by itself
    never = {check.name for check in testing.checks()} - failed
    assert never == tested_above | ours_alone, never


def test_failures_say_where(registry: None) -> None:
    with pytest.raises(testing.ContractError) as caught:
        run(known(LeaksTheFuture(3)), only="plan_sees_no_future")
    assert str(caught.value) == (
        "broken:3 fails 1 of 1 checks:\n  plan_sees_no_future: batch 2, heads 6, kv_heads 2, n_q "
        "1, n_k 40, dim 8, dim_v 5, causal='top_left': got key 3 kept by row 0 of batch 0, head 0, "
        "expected no key after the row's own"
    )
    assert isinstance(caught.value, AssertionError) and isinstance(caught.value, sa.SparseAttnError)


# ---- the checker itself --------------------------------------------------------------------------


def test_checks_have_names_promises_and_lines() -> None:
    checks = testing.checks()
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) >= 40
    assert {check.promise for check in checks} >= {"A1", "A2", "A4", "A5", "A6", "B1", "B2", "C5"}
    for check in checks:
        assert check.line.endswith(".") and 20 < len(check.line) < 100, check


def test_the_definition_is_that_of_the_references() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, heads, 9, 8)) for heads in (6, 2, 2))
    full = rng.random((2, 6, 9, 9)) < 0.6
    full[0, 0, 3] = False
    kept = full & (rng.random(full.shape) < 0.7)
    terms = {"scale": 0.3, "softcap": 2.0, "bias": rng.standard_normal((9, 9))}
    for got, want in zip(
        softmax_attention(q, k, v, kept, full, **terms),
        ref.attention(q, k, v, kept, full=full, **terms),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_wrong_calls_of_the_checker() -> None:
    with pytest.raises(sa.ArgumentError, match=r"layout.*params="):
        testing.check_variant("blockmask:16")
    with pytest.raises(sa.UnknownArgument, match=r"'decode'.*decode_"):
        testing.check_variant("dense", only=["decode"])
    with pytest.raises(sa.ArgumentError, match="a spec is an object"):
        testing.check_variant(3)
    with pytest.raises(sa.ArgumentError, match="heads"):
        testing.check_variant("dense", heads=(3, "one"))


def test_heads_may_be_asked_for() -> None:
    report = testing.check_variant("dense", heads=(3, 1), only=["heads_are_apart", "any_layout"])
    assert report.passed == ("any_layout",) and set(report.skipped) == {"heads_are_apart"}


def test_documentation_runs() -> None:
    result = doctest.testmod(testing)
    assert result.attempted >= 3 and result.failed == 0
    assert sa.testing is testing and "testing" in dir(sa)


def test_threads_and_errors_are_put_back(registry: None) -> None:
    before = sa.get_num_threads(), np.geterr()
    with pytest.raises(testing.ContractError):
        run(known(NotDeterministicOutput(3)))
    assert (sa.get_num_threads(), np.geterr()) == before


def test_toys_are_what_they_say() -> None:
    assert all(dataclasses.is_dataclass(cls) for cls in MINE)
    assert not {cls.kind for cls in MINE} & set(variants())
