"""Failing allocations on purpose: of the core by its own hook, of NumPy by a memory handler."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparseattn import _core

MOST = 2000  # allocations of one call


@contextlib.contextmanager
def core_fails(nth: int) -> Iterator[None]:
    """The core's ``nth`` next allocation fails."""
    _core.fail_set(nth)
    try:
        yield
    finally:
        _core.fail_set(0)


def settle() -> int:
    """Live bytes of the core once nothing is kept for later."""
    gc.collect()
    _core.trim()
    return _core.live_bytes()


def fail_each(call: Callable[[], Any]) -> int:
    """Let the n-th allocation of the core fail for n = 1, 2, ... until the call gets through: each
    time it says so, nothing stays behind, and the next call works. Returns how many there were."""
    call()
    live = settle()
    for nth in range(1, MOST):
        try:
            with core_fails(nth):
                call()
        except MemoryError as error:
            assert isinstance(error, _core.OutOfMemory) and str(error), repr(error)
        else:
            call()
            return nth - 1
        _core.trim()
        if _core.live_bytes() != live:  # a frame of the traceback may stand in a cycle
            assert settle() == live, f"allocation {nth} leaves something"
    raise AssertionError(f"{MOST} allocations in one call")


def sites(root: Path) -> dict[str, list[tuple[int, int]]]:
    """Calls of sa_malloc and sa_malloc_array in the sources: file to first and last lines."""
    found: dict[str, list[tuple[int, int]]] = {}
    for path in sorted(root.glob("csrc/**/*.[ch]")):
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"\bsa_malloc(_array)?\(", text):
            first = text.count("\n", 0, match.start()) + 1
            if text.splitlines()[first - 1].startswith("#define"):
                continue
            end, depth = match.end(), 1
            while depth:
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            lines = (first, text.count("\n", 0, end) + 1)
            found.setdefault(path.relative_to(root).as_posix(), []).append(lines)
    return found


# ---- NumPy ---------------------------------------------------------------------------------------

SET_HANDLER = 304  # of NumPy's table of functions, since 1.22

libc = ctypes.CDLL(None)
for name, arguments in {
    "malloc": [ctypes.c_size_t],
    "calloc": [ctypes.c_size_t, ctypes.c_size_t],
    "realloc": [ctypes.c_void_p, ctypes.c_size_t],
}.items():
    getattr(libc, name).argtypes, getattr(libc, name).restype = arguments, ctypes.c_void_p

Void, Size = ctypes.c_void_p, ctypes.c_size_t
MALLOC = ctypes.CFUNCTYPE(Void, Void, Size)
CALLOC = ctypes.CFUNCTYPE(Void, Void, Size, Size)
REALLOC = ctypes.CFUNCTYPE(Void, Void, Void, Size)
FREE = ctypes.CFUNCTYPE(None, Void, Void, Size)


class Handler(ctypes.Structure):
    """PyDataMem_Handler."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("context", Void),
        ("malloc", MALLOC),
        ("calloc", CALLOC),
        ("realloc", REALLOC),
        ("free", FREE),
    )


class NumpyMemory:
    """NumPy's data comes from the C library; the ``nth`` of the allocations while on fails.

    What it frees is kept: an exception may be set then, under which no Python code can run, and
    ``labs`` is a function of the C library that does nothing."""

    def __init__(self) -> None:
        self.left = 0

        def fails() -> bool:
            self.left -= 1
            return self.left == 0

        self.handler = Handler(
            b"failing",
            1,
            None,
            MALLOC(lambda _, size: None if fails() else libc.malloc(size)),
            CALLOC(lambda _, n, size: None if fails() else libc.calloc(n, size)),
            REALLOC(lambda _, old, size: None if fails() else libc.realloc(old, size)),
            ctypes.cast(libc.labs, FREE),
        )
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [Void, ctypes.c_char_p, Void]
        self.capsule = make(ctypes.addressof(self.handler), b"mem_handler", None)
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = Void, [ctypes.py_object, ctypes.c_char_p]
        core = getattr(np, "_core", None) or np.core
        table = ctypes.cast(
            get(core._multiarray_umath._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p)
        )
        set_type = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)
        self.set = set_type(table[SET_HANDLER])

    @contextlib.contextmanager
    def fails(self, nth: int) -> Iterator[None]:
        before = self.set(self.capsule)
        self.left = nth
        try:
            yield
        finally:
            self.left = 0
            self.set(before)
