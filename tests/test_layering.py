"""The rooms: who may include or import whom, and what importing the package does."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

import sparseattn

PACKAGE = Path(sparseattn.__file__).parent
CSRC = ROOT / "csrc"

C_ROOMS = ["base", "tile", "engine", "variants", "grad", "python"]

# From left to right; a module imports its own room and what is left of it.
ROOMS = [
    ["_core"],
    ["errors", "progress", "assets", "integrations.torch"],
    ["variants.base"],
    [
        *("half", "inputs", "weights", "plan", "config", "attention", "tensor", "positions"),
        *("sdpa", "merge", "gradients", "cache", "kept", "decode", "packed"),
    ],
    ["variants"],
    ["integrations"],
    [
        *("use", "testing", "testing_subject"),
        *("testing_spec", "testing_plan", "testing_numbers", "testing_arrays"),
    ],
    ["models"],
    ["training", "evaluation", "plots"],
    ["experiments"],
    ["cli", "__main__", ""],  # "" is the package itself, which names what is public
]
OPTIONAL = {
    "torch",
    "transformers",
    "matplotlib",
    "pandas",
    "huggingface_hub",
    "ml_dtypes",
    "scipy",
}


def c_files() -> list[Path]:
    return sorted(p for p in CSRC.rglob("*") if p.suffix in (".c", ".h"))


def python_files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name != "train_tiny.py")


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


def test_there_is_something_to_check() -> None:
    assert len(c_files()) > 20 and len(python_files()) > 15


@pytest.mark.parametrize("path", c_files(), ids=lambda p: p.relative_to(CSRC).as_posix())
def test_c_includes_point_left(path: Path) -> None:
    room = path.relative_to(CSRC).parts[0]
    for name in includes(path):
        other = name.split("/")[0]
        if other in C_ROOMS:
            assert C_ROOMS.index(other) <= C_ROOMS.index(room), f"{room} includes {name}"
            if room == other == "variants":
                assert name == "variants/variant.h", "variants never include one another"
        if name == "Python.h" or name.startswith("numpy/"):
            assert room == "python", name
        if "cblas" in name:
            assert path.name == "gemm.c", name
        if "intrin" in name:
            assert room in ("tile", "base"), name


@pytest.mark.parametrize("path", c_files(), ids=lambda p: p.relative_to(CSRC).as_posix())
def test_c_file_keeps_to_its_room(path: Path) -> None:
    text = path.read_text()
    room = path.relative_to(CSRC).parts[0]
    if room != "tile":
        for word in ("vector_size", "ext_vector_type", "pragma GCC target", "attribute push"):
            assert word not in text, f"{word} is for tile/"
    for word in ("exit(", "abort(", "printf("):
        for line in re.findall(rf"^.*(?<![a-zA-Z_]){re.escape(word)}.*$", text, re.M):
            pytest.fail(f"{path.name}: {line.strip()}")
    assert text.count("\n") < 600


def module_of(path: Path) -> str:
    name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix("__init__").rstrip(".")


def room_of(module: str) -> int:
    """The room with the longest matching name."""
    best = (-1, -1)
    for at, names in enumerate(ROOMS):
        for name in names:
            if module == name or (name and module.startswith(name + ".")):
                best = max(best, (len(name), at))
    assert best[1] >= 0, f"sparseattn.{module} belongs to no room: add it to ROOMS"
    return best[1]


def is_module(name: str) -> bool:
    path = PACKAGE.parent / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file() or name == "sparseattn._core"


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules that a file imports at run time, and whether inside a function."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0 and child.module, "absolute imports only"
                for alias in child.names:
                    name = f"{child.module}.{alias.name}"
                    if name != "sparseattn.__version__":
                        yield (name if is_module(name) else child.module), inside
            yield from walk(child, inside or isinstance(child, ast.FunctionDef))

    yield from walk(ast.parse(path.read_text()), False)


@pytest.mark.parametrize("path", python_files(), ids=module_of)
def test_python_imports_point_left(path: Path) -> None:
    module = module_of(path)
    room = room_of(module)
    for name, inside in imports(path):
        top, _, rest = name.partition(".")
        if top == "sparseattn":
            assert room_of(rest) <= room, f"{module} imports {name}"
        if top in OPTIONAL:
            bridge = module == f"integrations.{top}"
            assert inside or bridge, f"{module} imports {top} at its top: do it where it is needed"
    assert path.read_text().count("\n") < 600


def test_variants_see_no_models_and_models_no_evaluation() -> None:
    for path in python_files():
        names = {name for name, _ in imports(path) if name.startswith("sparseattn.")}
        folder = module_of(path).split(".")[0]
        if folder == "variants":
            assert not any(".models" in name or ".evaluation" in name for name in names), path
        if folder == "models":
            assert not any(".evaluation" in n or ".training" in n for n in names), path
        if folder == "plots":
            assert not any(".models" in name or ".attention" in name for name in names), path


def test_references_import_nothing_of_ours() -> None:
    files = list((ROOT / "tests/reference").glob("*.py"))
    assert files
    for path in files:
        assert "sparseattn" not in path.read_text(), path


def test_file_names_are_unique() -> None:
    files = [*python_files(), *CSRC.rglob("*.c")]
    names = [p.name for p in files if not p.name.startswith("__")]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice


# ---- what importing does -------------------------------------------------------------------------

CHILD = """
import json, os, sys, time, threading
import numpy
def tasks():
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()
events = []
def hook(event, args):
    if event == "open" or event.startswith(("socket.", "subprocess.", "os.", "ctypes.")):
        events.append((event, str(args[0]) if args else ""))
before, env, modules = tasks(), dict(os.environ), set(sys.modules)
sys.addaudithook(hook)
start = time.perf_counter()
import sparseattn
seconds = time.perf_counter() - start
seen = list(events)
json.dump({"seconds": seconds, "threads": tasks() - before, "events": seen,
           "env": dict(os.environ) == env, "modules": sorted(set(sys.modules) - modules)},
          sys.stdout)
"""


def child(**env: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=60,
        check=True,
    )
    assert not done.stderr
    result: dict = json.loads(done.stdout)  # nothing else was printed
    return result


@pytest.mark.promise("G3")
def test_import_is_fast() -> None:
    """At most 0.1 s beyond NumPy: the best of five, since other work may run beside the tests."""
    assert min(child()["seconds"] for _ in range(5)) <= 0.1


@pytest.mark.promise("G3")
def test_import_starts_nothing_and_opens_modules_only(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    result = child(HOME=str(home))
    assert result["threads"] == 0 and result["env"]
    for event, path in result["events"]:
        assert event in ("open", "os.listdir"), (event, path)
        if event == "open":
            assert path.endswith((".py", ".pyc", ".so")) or ".pyc." in path, path


def test_import_leaves_the_heavy_half_alone() -> None:
    loaded = set(child()["modules"])
    tops = {name.split(".")[0] for name in loaded}
    assert not tops & (OPTIONAL | {"tokenizers", "safetensors", "tqdm", "multiprocessing"})
    assert not {n for n in loaded if n.startswith(("sparseattn.models", "sparseattn.evaluation"))}
    assert "sparseattn.variants.topk" in loaded


def test_unknown_isa_is_said_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sparseattn; print(sparseattn.show_config('dicts')['isa'])"],
        capture_output=True,
        text=True,
        env={**os.environ, "SPARSEATTN_ISA": "avx9"},
        timeout=60,
        check=True,
    )
    assert done.stderr.count("SPARSEATTN_ISA=avx9") == 1 and "baseline" in done.stderr
