"""README's Python runs as it stands, block after block, as a reader would type it."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT, requires

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)


@pytest.mark.parametrize("count", range(1, len(BLOCKS) + 1))
def test_readme_runs(count: int) -> None:
    if "import torch" in BLOCKS[count - 1]:
        requires("torch")
    names: dict[str, object] = {}
    for block in BLOCKS[:count]:
        exec(compile(block, "README.md", "exec"), names)


def test_the_first_example_has_ten_lines() -> None:
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) == 10
