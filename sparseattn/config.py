"""What runs: version, instruction set, threads, BLAS."""

from __future__ import annotations

import operator
import platform
import sys
from typing import Any, Literal

import numpy as np

from sparseattn import _core
from sparseattn.errors import ArgumentError

MOST_THREADS = 64  # SA_MAX_THREADS of the core


def get_num_threads() -> int:
    """Threads that a call may use.

    ``SPARSEATTN_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the CPUs that this process may use.

    >>> import sparseattn as sa
    >>> sa.get_num_threads() >= 1
    True
    """
    return _core.num_threads()


def set_num_threads(n: int) -> None:
    """Let calls use ``n`` threads from now on; results do not depend on it, to the bit.

    Parameters
    ----------
    n : int
        1 to 64.

    Raises
    ------
    ArgumentError
        If ``n`` is no integer in that range.

    >>> import sparseattn as sa
    >>> sa.set_num_threads(sa.get_num_threads())
    """
    try:
        count = operator.index(n)
    except TypeError:
        raise ArgumentError(f"n must be a number of threads, got {n!r:.80}") from None
    if not 1 <= count <= MOST_THREADS:
        raise ArgumentError(f"the number of threads must be 1 to {MOST_THREADS}, got {count}")
    _core.set_num_threads(count)


def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, Any] | None:
    """Print what runs: version, ISA, threads, BLAS; ``mode="dicts"`` returns it instead.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        As in ``numpy.show_config``.

    Raises
    ------
    ArgumentError
        For another mode.

    >>> import sparseattn as sa
    >>> sorted(sa.show_config("dicts"))
    ['blas', 'isa', 'isas', 'numpy', 'platform', 'python', 'threads', 'version']
    """
    if mode not in ("stdout", "dicts"):
        raise ArgumentError(f"mode must be 'stdout' or 'dicts', got {mode!r:.80}")
    config = {
        "version": _core.__version__,
        "isa": _core.isa(),
        "isas": list(_core.isas()),
        "threads": _core.num_threads(),
        "blas": _core.blas_config(),
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "platform": platform.platform(),
    }
    if mode == "dicts":
        return config
    for name, value in config.items():
        print(f"{name:<10}{', '.join(value) if isinstance(value, list) else value}")
    return None
