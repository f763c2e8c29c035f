"""The exceptions: each is a ``SparseAttnError`` and the built-in that fits.

Every message is one sentence that names the argument, the value and the remedy.
"""

from __future__ import annotations

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
