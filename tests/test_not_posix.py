"""Where the modules of POSIX are absent, as on Windows: import, a call, the folder of a run.

And what the checker of wheels reads in a library of Windows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_build import tool, wheel_checker

import sparseattn as sa
from sparseattn.errors import FileError
from sparseattn.evaluation import results

WITHOUT = """
import os, sys
for name in ("fcntl", "grp", "pty", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("fork", "register_at_fork", "sched_getaffinity", "O_NONBLOCK", "O_CLOEXEC"):
    delattr(os, name)
import numpy as np
import sparseattn as sa
import sparseattn.cli, sparseattn.evaluation.compare, sparseattn.models
from sparseattn.evaluation.results import Records
q = np.ones((1, 2, 5, 8), np.float32)
assert np.allclose(sa.attention(q, q, q), 1)
with Records(__import__("pathlib").Path(sys.argv[1]), "compare", {}) as records:
    records.add("one", {"value": 1})
assert open(sys.argv[1] + "/compare.jsonl", "rb").read().count(b"\\n") == 3
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has them to take away")
def test_modules_of_posix_are_not_needed(tmp_path: Path) -> None:
    path = str(Path(sa.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert (done.returncode, done.stderr) == (0, "")


class Locks:
    """The one function of msvcrt that a run calls: it locks bytes from where the file stands."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.places: list[tuple[int, int]] = []
        self.held = False

    def locking(self, file: int, mode: int, count: int) -> None:
        assert mode == self.LK_NBLCK
        self.places.append((os.lseek(file, 0, os.SEEK_CUR), count))
        if self.held:
            raise PermissionError(13, "Permission denied")
        self.held = True


def test_a_folder_has_one_run_without_fcntl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = Locks()
    monkeypatch.setattr(results, "fcntl", None)
    monkeypatch.setattr(results, "msvcrt", locks)
    with results.Records(tmp_path, "compare", {"a": 1}) as first:
        first.add("one", {"value": 1})
        with pytest.raises(FileError, match=f"in use by process {os.getpid()} on "):
            results.Records(tmp_path, "compare", {"a": 1})
        first.add("two", {"value": 2})
    locks.held = False
    with results.Records(tmp_path, "compare", {"a": 1}) as again:
        assert again.found == {k: {"id": k, "value": n} for k, n in [("one", 1), ("two", 2)]}
    size = (tmp_path / "compare.jsonl").stat().st_size
    assert len(locks.places) == 3 and {count for _, count in locks.places} == {1}
    assert all(at > size for at, _ in locks.places), "a locked byte of the text cannot be read"


def test_a_folder_without_any_locks_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "fcntl", None)
    monkeypatch.setattr(results, "msvcrt", None)
    with results.Records(tmp_path, "compare", {}) as records:
        records.add("one", {"value": 1})
    assert results.Records(tmp_path, "compare", {}).get("one") == {"id": "one", "value": 1}


@pytest.mark.promise("G7")
@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["-lsynchronization"], None),
        (["-luser32"], "needs USER32.dll"),
        (["-Wl,--no-as-needed", "-lwinpthread"], "needs libwinpthread-1.dll"),
    ],
)
def test_wheel_checker_reads_libraries_of_windows(
    options: list[str], fault: str | None, tmp_path: Path
) -> None:
    """A library of the compiler's would have to stand beside the module, and does not."""
    source, library = tmp_path / "one.c", tmp_path / "one.pyd"
    source.write_text(
        "#include <windows.h>\n#include <pthread.h>\n"
        "__declspec(dllexport) int one(int *word) {\n"
        "    WakeByAddressSingle(word);\n"
        "#ifdef SCREEN\n    return GetSystemMetrics(0);\n"
        "#elif defined(THREADS)\n    return pthread_self() != 0;\n"
        "#endif\n    return 0;\n}\n"
    )
    define = {"-luser32": ["-DSCREEN"], "-lwinpthread": ["-DTHREADS"]}.get(options[-1], [])
    compiler = "x86_64-w64-mingw32-gcc-posix"
    tool(
        compiler, "-shared", *define, str(source), "-o", str(library), *options, "-lsynchronization"
    )
    faults = wheel_checker().windows_faults(library)
    assert len(faults) == (fault is not None), faults
    assert fault is None or fault in faults[0]


def test_wheel_checker_refuses_what_is_no_library_of_windows(tmp_path: Path) -> None:
    checker = wheel_checker()
    for data in [b"", b"MZ", b"\x7fELF" + bytes(200), b"MZ".ljust(0x3C, b"\0") + bytes(8)]:
        path = tmp_path / "one.pyd"
        path.write_bytes(data)
        (fault,) = checker.windows_faults(path)
        assert fault.startswith("one.pyd is no library of Windows"), data
