"""float16 and bfloat16 arrays: stored so, computed in float32.

NumPy has no bfloat16. Inside the package it goes by its bits, as uint16, which is also how the core
takes it; arrays of ``ml_dtypes``, JAX and others are known by the name of their dtype, and none of
these packages is imported.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseattn import _core

if TYPE_CHECKING:
    from sparseattn.variants.base import Array

REAL = ("float32", "float64")
HALF = ("float16", "bfloat16")
BITS = np.dtype(np.uint16)  # of bfloat16
NAMES = {np.dtype(name): name for name in (*REAL, "float16")}  # dtype.name takes microseconds


def with_name(array: Array) -> tuple[Array, str]:
    """The array, bfloat16 as its bits, and the name of its dtype."""
    name = NAMES.get(array.dtype) or array.dtype.name
    if name != "bfloat16":
        return array, name
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array.view(BITS), name


@functools.cache
def real_type(stored: str | np.dtype[Any]) -> np.dtype[Any]:
    """What a dtype, or the dtype of a name, is computed in."""
    return np.dtype(np.float64 if stored == "float64" else np.float32)


@functools.cache
def storage_type(stored: str) -> np.dtype[Any]:
    """What the core takes arrays as whose dtype has this name."""
    return BITS if stored == "bfloat16" else np.dtype(stored)


def is_half(array: Array) -> bool:
    """float16, or the bits of bfloat16."""
    return array.dtype == np.float16 or array.dtype == BITS


def kind_of(dtype: np.dtype[Any]) -> Any:
    """The core's word for float16, or for the bits of bfloat16."""
    return "bf16" if dtype == BITS else "f16"


def widen(array: Array) -> Array:
    """The values of float16, or of the bits of bfloat16, as a new float32 array."""
    native = array.dtype.newbyteorder("=")
    bits = np.require(array, native, ["C", "A"]).reshape(-1).view(BITS)
    wide = np.empty(array.shape, np.float32)
    _core.widen(bits, kind_of(native), wide.reshape(-1))
    return wide


def narrow(array: Array, dtype: np.dtype[Any]) -> Array:
    """float32 values rounded to nearest, ties to even, as a new array: float16, or for
    ``BITS`` the bits of bfloat16."""
    half = np.empty(array.shape, dtype)
    store(half, array)
    return half


def store(array: Array, values: Array) -> None:
    """``array[...] = values``, where these are in the array's own type or in the one that it is
    computed in."""
    if not is_half(array) or values.dtype == array.dtype:
        array[...] = values
    elif array.flags.c_contiguous and array.flags.aligned:
        values = np.broadcast_to(values, array.shape)
        flat = np.require(values, np.float32, ["C", "A"]).reshape(-1)
        _core.narrow(flat, kind_of(array.dtype), array.reshape(-1))
    else:
        array[...] = narrow(values, array.dtype)
