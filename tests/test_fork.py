"""Forked children compute: after parallel work, while another thread is inside a kernel, under each
start method of multiprocessing, in a DataLoader's workers. (C only: tests/c/test_fork.c.)"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fork_child
import pytest
from conftest import requires

import sparseattn as sa

pytestmark = [
    pytest.mark.promise("C3"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
LONG = [pytest.mark.nightly, pytest.mark.timeout(1500)]
HERE = [str(Path(__file__).parent), str(Path(sa.__path__[0]).parent)]


def right(mode: str, count: int) -> int:
    done = subprocess.run(
        [sys.executable, fork_child.__file__, mode, str(count)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(HERE)},
        timeout=60 + 12 * count,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=LONG)])
@pytest.mark.parametrize("mode", ["fork", "inside"])
def test_a_forked_child_computes(mode: str, count: int) -> None:
    assert right(mode, count) == count


@pytest.mark.parametrize("count", [2, pytest.param(100, marks=LONG)])
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_processes_of_multiprocessing_compute(method: str, count: int) -> None:
    assert right(f"pool:{method}", count) == count


@pytest.mark.parametrize("count", [2, pytest.param(100, marks=LONG)])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_compute(method: str, count: int) -> None:
    requires("torch")
    assert right(f"loader:{method}", count) == count
