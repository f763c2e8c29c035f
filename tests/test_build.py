"""What was built: fused multiply-adds in the AVX2 kernels, nothing linked, a quiet import."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sparseattn
from sparseattn import _core

MODULE = Path(_core.__file__)
PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="looks at x86-64 instructions")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and ELF files")


def tool(*command: str) -> str:
    if not shutil.which(command[0]):
        pytest.skip(f"needs {command[0]} of binutils")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@linux
@x86_64
def test_multiply_adds_are_fused() -> None:
    """gcc -std=c11 emits none without -ffp-contract=fast, at half the speed and no other sign."""
    text = tool("objdump", "-d", "--no-show-raw-insn", str(MODULE))
    fused = re.findall(r"\bvfmadd\d+(ps|pd)\s+.*%(ymm|zmm)", text)
    for kind in [("ps", "ymm"), ("pd", "ymm"), ("ps", "zmm"), ("pd", "zmm")]:
        assert fused.count(kind) > 100, kind


@linux
def test_only_system_libraries_are_linked() -> None:
    dynamic = tool("readelf", "-d", str(MODULE))
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert set(needed) <= {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0"} | {
        name for name in needed if name.startswith("ld-linux")
    }
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def fresh_python(program: str, *options: str) -> tuple[int, str, str]:
    run = subprocess.run(
        [sys.executable, *options, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(sparseattn.__path__[0]).parent)},
    )
    return run.returncode, run.stdout, run.stderr


QUIET = """
import os, socket, sys
import numpy
tasks = len(os.listdir("/proc/self/task"))
def refuse(*_): raise AssertionError("network")
socket.socket.connect = refuse
opened = []
sys.addaudithook(lambda name, args: opened.append(args)
                 if name == "open" and isinstance(args[2], int) and args[2] & 3 else None)
import sparseattn
assert not opened, f"import opened for writing: {opened}"
assert len(os.listdir("/proc/self/task")) == tasks, "import started a thread"
with open("/proc/self/maps") as file:
    maps = file.read()
assert os.path.dirname(sparseattn.__file__) + "/_libs" not in maps, "import loaded OpenBLAS"
heavy = {"torch", "transformers", "matplotlib", "pandas", "tokenizers", "tqdm"} & set(sys.modules)
assert not heavy, heavy
"""


@linux
def test_import_is_quiet() -> None:
    """No thread, no file written, no network, no OpenBLAS, nothing optional, no word."""
    assert fresh_python(QUIET, "-W", "error", "-B") == (0, "", "")


SECONDS = """
import time
import numpy
start = time.perf_counter()
import sparseattn
print(time.perf_counter() - start)
"""


def test_import_is_fast() -> None:
    """At most 0.1 s more than import numpy; the best of some, as others share the CPU."""
    fresh_python(SECONDS)  # byte code is written once
    seconds = [float(fresh_python(SECONDS)[1]) for _ in range(5)]
    assert min(seconds) <= 0.1, seconds


def test_openblas_travels_with_its_licence() -> None:
    if _core.blas_config() == "tiles":
        pytest.skip("built with SPARSEATTN_BLAS=none")
    folder = MODULE.with_name("_libs")
    assert list(folder.glob("libscipy_openblas*"))
    licence = (folder / "OpenBLAS-LICENSE.txt").read_text()
    assert "OpenBLAS" in licence and "GCC RUNTIME LIBRARY EXCEPTION" in licence.upper()


def test_version_is_the_one_of_the_metadata() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    assert _core.__version__ == sparseattn.__version__ == project["version"]
    names = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    assert names == {"numpy", "safetensors", "tokenizers", "tqdm"}
    try:
        installed = importlib.metadata.version("sparseattn")
    except importlib.metadata.PackageNotFoundError:
        return  # built in place
    assert installed == project["version"]
