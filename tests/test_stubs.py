"""The hand-written stub of the C core says what the module is."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from sparseattn import _core

STUB = Path(_core.__file__).with_name("_core.pyi")
TREE = ast.parse(STUB.read_text())
FUNCTIONS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef)}
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}


def stub_signature(node: ast.FunctionDef) -> list[tuple[str, object]]:
    args = node.args
    assert not (args.kwonlyargs or args.vararg or args.kwarg or args.defaults), node.name
    assert not args.args or [a.arg for a in args.args] == ["self"], f"{node.name}: needs a /"
    return [(a.arg, inspect.Parameter.POSITIONAL_ONLY) for a in [*args.posonlyargs, *args.args]]


def module_signature(function: object) -> list[tuple[str, object]]:
    signature = inspect.signature(function)  # type: ignore[arg-type]  # reads __text_signature__
    return [(p.name, p.kind) for p in signature.parameters.values()]


def test_names_agree() -> None:
    public = {name for name in vars(_core) if not name.startswith("_")}
    assert public == set(FUNCTIONS) | set(CLASSES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_agrees(name: str) -> None:
    function = getattr(_core, name)
    assert module_signature(function) == stub_signature(FUNCTIONS[name])
    assert function.__doc__, "a docstring follows the signature"


def test_plan_agrees() -> None:
    members = [node for node in CLASSES["Plan"].body if isinstance(node, ast.FunctionDef)]
    public = {name for name in vars(_core.Plan) if not name.startswith("_")}
    assert public == {node.name for node in members}
    for node in members:
        found = getattr(_core.Plan, node.name)
        if node.decorator_list:
            assert inspect.isgetsetdescriptor(found), node.name
        else:
            assert module_signature(found) == stub_signature(node), node.name


def test_errors_agree() -> None:
    for name, node in CLASSES.items():
        if name != "Plan":
            bases = [base.__name__ for base in getattr(_core, name).__bases__]
            assert bases == [base.id for base in node.bases if isinstance(base, ast.Name)], name


def test_package_is_typed() -> None:
    assert STUB.with_name("py.typed").exists()
