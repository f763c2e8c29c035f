"""The exceptions: each is a ``SparseAttnError`` and the built-in that fits.

Every message is one sentence that names the argument, the value and the remedy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

from sparseattn._core import (
    ArgumentError,
    DtypeError,
    InternalError,
    OutOfMemory,
    SparseAttnError,
)

__all__ = [
    "ArgumentError",
    "CacheInUse",
    "DtypeError",
    "FileError",
    "InternalError",
    "NotSupported",
    "OutOfMemory",
    "SparseAttnError",
    "UnknownArgument",
]


class FileError(SparseAttnError, OSError):
    """A file or folder is missing, damaged, or not what it says it is."""


class CacheInUse(SparseAttnError, RuntimeError):
    """Two threads reach for one cache at once; the one that comes second gets this."""


class NotSupported(SparseAttnError, NotImplementedError):
    """A right request that this version does not answer yet."""


class UnknownArgument(SparseAttnError, TypeError):
    """A keyword that is spelled otherwise here."""


P = ParamSpec("P")
T = TypeVar("T")


def door(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator of what users call: an error about their call ends at their line.

    The frames of this package are left out; a fault of our own keeps them all.
    """

    @functools.wraps(function)
    def at_the_door(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except SparseAttnError as error:
            if not isinstance(error, InternalError):
                error.__traceback__ = without_ours(error.__traceback__)
            raise

    return at_the_door


def without_ours(trace: TracebackType | None) -> TracebackType | None:
    """The frames that are not of this package, such as those of a user's own variant."""
    if trace is None:
        return None
    rest = without_ours(trace.tb_next)
    if trace.tb_frame.f_globals.get("__name__", "").startswith("sparseattn."):
        return rest
    trace.tb_next = rest
    return trace
