"""The contract of a variant, as checks that run: for those of the package and for your own.

``check_variant(spec)`` runs all of them, ``checks()`` says what they are. In your own tests::

    @pytest.mark.parametrize("name", [check.name for check in sparseattn.testing.checks()])
    def test_contract(name):
        sparseattn.testing.check_variant(MySpec(16), only=[name])

Inputs are random with fixed seeds, so a failure comes again. The short form takes about a tenth of
a second, ``long=True`` some seconds: larger shapes, all alignments of causality, more draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sparseattn import testing_arrays, testing_numbers, testing_plan, testing_spec
from sparseattn.errors import ArgumentError, SparseAttnError, UnknownArgument
from sparseattn.testing_subject import CHECKS, Check, Fault, MakeParams, Reference, Skip, Subject
from sparseattn.variants.base import Variant, coerce, nearest, parse

__all__ = ["Check", "ContractError", "Report", "check_variant", "checks"]

# What the checks look at, in the order in which they run; importing these has filled CHECKS.
ORDER = [m.__name__ for m in (testing_spec, testing_plan, testing_numbers, testing_arrays)]


class Report(NamedTuple):
    """What became of each check, by its name."""

    spec: str
    passed: tuple[str, ...]
    skipped: Mapping[str, str]  # and why the contract says nothing
    failed: Mapping[str, str]  # and what was seen, where, and what expected


class ContractError(SparseAttnError, AssertionError):
    """Some checks failed; ``report`` has the outcome of all."""

    def __init__(self, report: Report) -> None:
        self.report = report
        count = len(report.passed) + len(report.failed)
        lines = [f"{report.spec} fails {len(report.failed)} of {count} checks:"]
        super().__init__("\n  ".join(lines + [f"{n}: {why}" for n, why in report.failed.items()]))


def checks() -> tuple[Check, ...]:
    """All checks in order: ``name``, id of the ``promise``, and a ``line`` on what it states.

    >>> import sparseattn as sa
    >>> sa.testing.checks()[0].line
    'The spec is a frozen dataclass: its fields cannot be set.'
    """
    return tuple(sorted(CHECKS, key=lambda check: ORDER.index(check.run.__module__)))


def check_variant(
    spec: Any,
    *,
    params: MakeParams | None = None,
    reference: Reference | None = None,
    heads: tuple[int, int] | None = None,
    only: Iterable[str] | None = None,
    long: bool = False,
) -> Report:
    """Run the contract of a variant against one of its specs.

    Parameters
    ----------
    spec : spec or str
        An object such as ``MySpec(16)``, or the text of a registered one.
    params : callable (spec, shape) -> mapping
        The arrays that the spec takes, for ``shape = (batch, heads, kv_heads, n_q, n_k, dim,
        dim_v)``; needed where ``spec.arrays`` names some.
    reference : callable (q, k, v, see, causal, params) -> (out, lse)
        The definition of the whole variant in float64 NumPy; ``see`` is bool (batch, heads, n_q,
        n_k), the keys that causality and masks show, ``causal`` the alignment. None: softmax over
        the keys of the plan, which a spec that overrides ``apply`` does not have: its numbers are
        then not checked.
    heads : (int, int)
        Query heads and kv heads of all calls, where the spec asks for certain ones; else (6, 2).
    only : list of str
        Names of the checks to run.
    long : bool
        Larger shapes, every alignment, more draws.

    Returns
    -------
    Report
        Names that passed, and that were skipped with the reason.

    Raises
    ------
    ContractError
        An AssertionError that lists each failed check with the shape, what was seen and what was
        expected; its ``report`` has all outcomes.
    ArgumentError, UnknownArgument
        If ``spec`` is none, its arrays have no ``params``, or ``only`` has an unknown name.

    >>> import sparseattn as sa
    >>> report = sa.testing.check_variant("window:8:sinks=2")
    >>> len(report.failed), len(report.passed) > 40
    (0, True)
    """
    variant = parse(spec)
    wanted = read_names(only)
    if isinstance(variant, Variant) and variant.arrays and params is None:
        raise ArgumentError(
            f"{variant} takes {', '.join(variant.arrays)}: pass params=, a function of (spec, "
            "shape) that makes them"
        )
    if heads is not None:
        heads = coerce(tuple[int, int], heads, "heads")
    passed, skipped, failed = [], {}, {}
    for check in wanted:
        try:
            check.run(Subject(variant, params, reference, heads, bool(long)))
            passed.append(check.name)
        except Skip as reason:
            skipped[check.name] = str(reason)
        except Fault as fault:
            failed[check.name] = str(fault)
        except Exception as error:
            failed[check.name] = f"got {type(error).__name__}: {error}, expected no error"
    report = Report(name_of(variant), tuple(passed), skipped, failed)
    if failed:
        raise ContractError(report)
    return report


def name_of(variant: Variant) -> str:
    """The spec's text, or where that is what is broken, its class."""
    try:
        return str(variant)
    except Exception:
        return type(variant).__name__


def read_names(only: Iterable[str] | None) -> list[Check]:
    if only is None:
        return list(checks())
    names = [only] if isinstance(only, str) else list(only)
    known = {check.name: check for check in checks()}
    for name in names:
        if name not in known:
            near = ", ".join(nearest(str(name), known, count=2))
            raise UnknownArgument(f"only names {name!r:.80}, which is no check: nearest are {near}")
    return [check for check in checks() if check.name in names]
