"""What every variant brings: a record, a spec, a definition, a benchmark line, documentation."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from conftest import PARAMS, ROOT, causals, make_qkv

import sparseattn as sa
from sparseattn import _core
from sparseattn.variants import Variant, variants

CLASSES = list(variants().values())
PLAIN = [cls for cls in CLASSES if cls.kind in _core.variants()]
JOINS = [cls for cls in CLASSES if cls not in PLAIN]
by_kind = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.kind)
plain_by_kind = pytest.mark.parametrize("cls", PLAIN, ids=lambda cls: cls.kind)

PUBLIC = [getattr(sa, name) for name in sa.__all__ if name not in ("Model", "compare")]
CALLABLES = [x for x in PUBLIC if callable(x)]
FUNCTIONS = [x for x in CALLABLES if not inspect.isclass(x)]


def file_of(cls: type[Variant]) -> str:
    """The name that a variant's files share."""
    return cls.__module__.rsplit(".", 1)[-1]


def test_every_record_of_the_core_has_a_spec() -> None:
    assert set(_core.variants()) == {cls.kind for cls in PLAIN}, "add sparseattn/variants/<name>.py"
    for cls in JOINS:
        assert hasattr(cls, "children"), f"{cls.kind}: add csrc/variants/{cls.kind}.c"


@plain_by_kind
def test_files_carry_one_name(cls: type[Variant]) -> None:
    assert file_of(cls) == cls.kind
    for path in ("csrc/variants/{}.c", "sparseattn/variants/{}.py", "tests/reference/{}.py"):
        name = path.format(cls.kind)
        assert (ROOT / name).is_file(), f"write {name}"


@plain_by_kind
def test_reference_checks_what_is_kept(cls: type[Variant]) -> None:
    module = importlib.import_module(f"reference.{cls.kind}")
    parameters = inspect.signature(module.check).parameters
    assert list(parameters)[:3] == ["kept", "visible", "scores"]
    names = {f.name for f in dataclasses.fields(cls)}
    assert set(parameters) <= names | {"kept", "visible", "scores", "eps", "params", "causal", "_"}


@plain_by_kind
def test_benchmark_has_a_line(cls: type[Variant]) -> None:
    tree = ast.parse((ROOT / "benchmarks/cases.py").read_text())
    words = {str(n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    names |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    specs = {word.split(":")[0].lower() for word in words}
    assert cls.kind in specs or cls.__name__ in names, (
        f"add a case to benchmarks/cases.py: {cls.kind}"
    )


@plain_by_kind
def test_fields_agree_with_the_core(cls: type[Variant]) -> None:
    """Every field of the record is a field, a property or a params array of the spec, in range."""
    table = {name: entry for name, *entry in _core.describe(cls.kind)}
    arrays = {name for name, (kind, *_) in table.items() if kind == "array"}
    assert arrays == set(cls.arrays)
    fields = {f.name for f in dataclasses.fields(cls)}
    for spec in map(sa.parse, cls.examples):
        for name, (kind, low, high, words) in table.items():
            if kind == "array":
                continue
            value = getattr(spec, name)
            if words is not None:
                assert value in words
            for item in value if isinstance(value, tuple) else (value,):
                assert low is None or low <= item <= high, (name, item)
    for name in set(table) & fields:
        kind, low, _, words = table[name]
        if words is not None:
            hint = str(inspect.get_annotations(cls)[name])
            assert all(repr(w) in hint or f'"{w}"' in hint for w in words), hint
        if kind == "int":
            example = sa.parse(cls.examples[0])
            with pytest.raises(sa.ArgumentError, match=rf"{cls.__name__}\.{name}"):
                dataclasses.replace(example, **{name: int(low) - 1})


@by_kind
def test_spec_is_a_frozen_hashable_dataclass(cls: type[Variant]) -> None:
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert not hasattr(sa.parse(cls.examples[0]), "__dict__"), "slots=True"
    assert getattr(sa, cls.__name__) is cls and cls.__name__ in sa.__all__
    assert cls.examples and all(sa.parse(text).kind == cls.kind for text in cls.examples)


@by_kind
def test_variant_is_documented(cls: type[Variant]) -> None:
    doc = inspect.getdoc(cls) or ""
    summary = doc.splitlines()[0]
    assert summary.endswith((".", "floor.", "heads.")) and len(summary) <= 90, summary
    if dataclasses.fields(cls) and cls in PLAIN:
        assert "Parameters\n----------" in doc
        for f in dataclasses.fields(cls):
            assert f"\n{f.name} : " in doc, f"{f.name} is not described"
    for name in cls.arrays if cls in PLAIN else ():
        assert f"\n{name} : ndarray" in doc
        assert name in PARAMS, f"tests/conftest.py: say how to make {name!r} for tests"
    if cls in PLAIN:
        assert "References\n----------" in doc and "arXiv:" in doc


@by_kind
def test_selectors_are_said_to_read_keys(cls: type[Variant]) -> None:
    """What a plan may depend on: a pattern gives one plan whatever q and k hold."""
    for spec in map(sa.parse, cls.examples):
        if spec.arrays or isinstance(spec, sa.PerLayer):
            continue
        heads = len(spec.specs) if isinstance(spec, sa.PerHead) else 2
        one, two = (make_qkv((1, heads, heads, 40, 200, 16, 16), seed=s)[:2] for s in (0, 1))
        causal = causals(spec)[-1]
        kept = [sa.plan(*x, spec, causal=causal).to_mask() for x in (one, two)]
        same = (kept[0] == kept[1]).all()
        assert same or spec.reads_keys, spec


# ---- documentation that runs ---------------------------------------------------------------------


class Finder(doctest.DocTestFinder):
    """Looks through decorators, which are of another module."""

    def _from_module(self, module: Any, object: Any) -> bool:
        found: bool = super()._from_module(module, inspect.unwrap(object))  # type: ignore[misc]
        return found


def examples_of(thing: Any) -> list[doctest.DocTest]:
    finder = Finder(recurse=inspect.isclass(thing))
    module = importlib.import_module(thing.__module__)
    found = finder.find(thing, globs=dict(vars(module)), module=module)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("thing", [*CALLABLES, sa.Model, sa.compare], ids=lambda x: x.__name__)
def test_examples_run(thing: Any) -> None:
    for test in examples_of(thing):
        assert len(test.examples) <= 4, f"{test.name}: at most four lines"
        runner = doctest.DocTestRunner(verbose=False)
        output: list[str] = []
        runner.run(test, out=output.append)
        assert runner.failures == 0, "".join(output)


def test_the_packages_own_example_runs() -> None:
    assert doctest.testmod(sa).failed == 0


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda x: x.__name__)
def test_public_functions_are_documented(function: Any) -> None:
    doc = inspect.getdoc(function) or ""
    assert examples_of(function), "a runnable example"
    for name in inspect.signature(function).parameters:
        if name != "wrong":  # collects misspelt keywords
            assert f"{name}" in doc, f"{name} is not described"
    if inspect.signature(function).parameters and function.__name__ != "plan":
        assert "Raises\n------" in doc


def test_all_is_there_and_nothing_else() -> None:
    for name in sa.__all__:
        if name not in ("Model", "compare"):  # loaded at first use, tested with what they are
            assert getattr(sa, name) is not None
    assert len(sa.__all__) == len(set(sa.__all__))


def test_package_is_typed() -> None:
    assert (Path(sa.__file__).parent / "py.typed").is_file()
