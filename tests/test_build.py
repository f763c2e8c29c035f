"""What was built: fused multiply-adds in the AVX2 kernels, nothing linked, a quiet import."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

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


def wheel_checker() -> ModuleType:
    path = PYPROJECT.parent / ".ci" / "check_wheel.py"
    spec = importlib.util.spec_from_file_location("check_wheel", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@linux
@pytest.mark.promise("G7")
@pytest.mark.parametrize(
    ("options", "platform", "fault"),
    [
        ([], "linux", None),
        (["-Wl,-rpath,$ORIGIN/_libs"], "linux", None),
        (["-Wl,-rpath,/opt/libs"], "linux", "searches /opt/libs"),
        (["-Wl,-rpath,libs"], "linux", "searches libs"),
        (["-Wl,--no-as-needed", "-lresolv"], "linux", "needs libresolv.so.2"),
        ([], "manylinux_2_1", "needs glibc 2."),
        ([], "other", "is not for"),
    ],
)
def test_wheel_checker_reads_libraries(
    options: list[str], platform: str, fault: str | None, tmp_path: Path
) -> None:
    """A folder of this machine, a library that stays behind, a newer libc, another CPU."""
    checker = wheel_checker()
    machine = os.uname().machine
    if machine not in checker.MACHINES:
        pytest.skip(f"no wheels for {machine}")
    source = tmp_path / "one.c"
    source.write_text("#include <stdlib.h>\nvoid *one(void) { return malloc(1); }\n")
    library = tmp_path / "one.so"
    tool("gcc", "-shared", "-fPIC", str(source), "-o", str(library), *options)
    other = next(m for m in checker.MACHINES if m != machine)
    tag = f"linux_{other}" if platform == "other" else f"{platform}_{machine}"
    faults = checker.library_faults(library, set(), tag)
    assert len(faults) == (fault is not None), faults
    assert fault is None or fault in faults[0]
    carried = checker.library_faults(library, {"libresolv.so.2"}, tag)
    assert carried == [f for f in faults if "resolv" not in f]


@pytest.mark.promise("G7")
def test_wheel_checker_reads_names(tmp_path: Path) -> None:
    """What is absent, what should be, and a RECORD that another file was put beside."""
    checker = wheel_checker()
    absent = checker.names_faults(["sparseattn/_core.pyi"])
    assert len(absent) == len(checker.WANTED) - 1 and all(f.startswith("no ") for f in absent)
    for name in ["tests/a.py", "csrc/a.c", "sparseattn/tests/b.py", "sparseattn/test_a.py"]:
        assert f"holds {name}" in checker.names_faults([name])
    for name in ["sparseattn/a.py", "sparseattn/testing.py", "sparseattn-1.0.dist-info/RECORD"]:
        assert f"holds {name}" not in checker.names_faults([name])
    record = "a.py,sha256=ypeBEsobvcr6wjGzmiPcTaeG7_gUfE5yuYB3ha_uSLs,1\nx.dist-info/RECORD,,\n"
    for text, extra, count in [("a", False, 0), ("b", False, 1), ("a", True, 1)]:
        with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
            archive.writestr("a.py", text)
            archive.writestr("x.dist-info/RECORD", record)
            if extra:
                archive.writestr("b.py", "b")
        with zipfile.ZipFile(tmp_path / "x.whl") as archive:
            assert len(checker.record_faults(archive)) == count
