"""One progress bar, on a terminal or in a notebook only: piped output stays clean."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = ["Bar", "progress"]


class Bar(Protocol):
    """What a running job tells its bar."""

    def update(self, n: float = 1) -> object:
        """Advance by `n`."""

    def set_description_str(self, desc: str) -> object:
        """Say what is being worked on."""


class _NoBar:
    def update(self, n: float = 1) -> None:
        """Show nothing."""

    def set_description_str(self, desc: str) -> None:
        """Show nothing."""


@contextmanager
def progress(total: float, text: str, unit: str, enabled: bool | None = None) -> Iterator[Bar]:
    """Yield a bar over `total` units; None enables it on a terminal and in a notebook."""
    bar = _open(total, text, unit) if _wanted(enabled) else None
    if bar is None:
        yield _NoBar()
        return
    try:
        yield bar
    finally:
        bar.close()


def _wanted(enabled: bool | None) -> bool:
    if enabled is not None:
        return enabled
    return _in_notebook() or bool(sys.stderr and sys.stderr.isatty())


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ in {"ZMQInteractiveShell", "Shell"}  # Jupyter, Colab


def _open(total: float, text: str, unit: str) -> Any:
    options = {
        "total": total,
        "desc": text,
        "unit": unit,
        "leave": False,
        "bar_format": "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
    }
    if _in_notebook():
        try:
            from tqdm.notebook import tqdm as notebook_bar

            return notebook_bar(**options)
        except Exception:  # no widgets: a bar is never worth a failure
            pass
    from tqdm import tqdm

    return tqdm(**options)
