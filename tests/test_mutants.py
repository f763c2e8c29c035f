"""Damaged model folders by the thousand: each loads, or is refused by an error of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutants import mutate

CHILD = Path(__file__).with_name("mutant_child.py")


def run(folder: Path, first: int, count: int, seed: int) -> Counter[str]:
    """How many ended how; fails where one ended otherwise, or took its process along."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(CHILD), str(folder), *map(str, (first, count, seed))],
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"mutant {lines[-1:]} ended the process: {done.stderr[-3000:]}"
    result = json.loads(lines[-1])
    assert not result["wrong"], "\n".join(f"{n}: {t}" for n, t in result["wrong"].items())
    return Counter(result["outcomes"])


def run_all(folder: Path, count: int, seed: int, size: int = 500) -> Counter[str]:
    with ThreadPoolExecutor(2) as pool:
        starts = range(0, count, size)
        return sum(
            pool.map(lambda start: run(folder / str(start), start, size, seed), starts), Counter()
        )


@pytest.mark.promise("D1")
@pytest.mark.parametrize(
    ("count", "seed"),
    [(2_000, 0), pytest.param(20_000, 1, marks=[pytest.mark.nightly, pytest.mark.timeout(1800)])],
)
def test_mutants(count: int, seed: int, tmp_path: Path) -> None:
    outcomes = run_all(tmp_path, count, seed, size=count // 2 if count <= 2_000 else 1_000)
    assert outcomes.total() == count
    assert outcomes["success"] > count // 20 and outcomes["FileError"] > count // 3, outcomes


@pytest.mark.promise("D1")
def test_a_mutant_is_a_function_of_its_number() -> None:
    files = {"config.json": b'{"a": [1, 2], "b": "x"}', "vocab.txt": b"a\nb\n"}
    made = [mutate(files, number) for number in range(300)]
    assert made == [mutate(files, number) for number in range(300)]
    assert len(set(made)) > 100
    assert sum(files[name] != data for name, data in made) > 250
