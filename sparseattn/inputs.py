"""The door for arrays: whatever a caller brings becomes 4-D views that the core reads.

(..., heads, length, dim) becomes (batch, heads, length, dim), by view where strides allow. Copied
are: other byte orders, misaligned data, strides that split elements, a last axis with gaps.
float16 and bfloat16 stay as they are stored: the core reads and writes them.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparseattn.errors import ArgumentError, DtypeError, OutOfMemory
from sparseattn.half import (
    BITS,
    HALF,
    REAL,
    is_half,
    narrow,
    real_type,
    storage_type,
    widen,
    with_name,
)
from sparseattn.variants.base import SEEDS, Problem

if TYPE_CHECKING:
    from sparseattn.variants.base import Array

# The core's bounds, asked before anything is copied: (axis from the end, most, words).
MAX_DIM = 4096
MOST_BATCHES = 1 << 31
MOST_ENTRIES = 1 << 30  # of an index array
MOST = ((-1, MAX_DIM, "wide"), (-2, 1 << 30, "long"), (-3, 1 << 20, "heads high"))
CPU_DEVICES = (1, 3, 11)  # DLPack's CPU, and pinned host memory of CUDA and ROCm
CAUSAL = {"bottomright": 1, "topleft": 2}
SINK = "sink"  # the array of params that any spec takes


def is_torch(x: object) -> bool:
    """A tensor of PyTorch; never imports it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, getattr(torch, "Tensor", ()))


def needs_grad(*arrays: Any) -> bool:
    """Some of them are tensors whose gradient PyTorch will ask for; never imports it."""
    torch = sys.modules.get("torch")
    return (
        torch is not None
        and any(is_torch(x) and x.requires_grad for x in arrays)
        and bool(torch.is_grad_enabled())
    )


def sink_of(params: Any) -> Any:
    """What the caller gave for the sinks, or None."""
    return params.get(SINK) if hasattr(params, "get") else None


def to_array(name: str, x: Any) -> tuple[Array, str]:
    """Any array-like as an ndarray on the same memory where possible, bfloat16 as its bits, and the
    name of its dtype."""
    if type(x) is np.ndarray:
        return with_name(x)
    if isinstance(x, np.ma.MaskedArray):
        raise ArgumentError(
            f"{name} is a masked array, whose mask would be lost: "
            f"pass {name}.filled(0) and say who may attend by mask= or key_mask="
        )
    if is_torch(x):
        from sparseattn.integrations import torch

        return torch.to_numpy(name, x), torch.dtype_name(x)
    if x is None or isinstance(x, str | bytes):
        raise ArgumentError(f"{name} must be an array, got {x!r:.80}")
    device = getattr(x, "__dlpack_device__", None)
    if device is not None and device()[0] not in CPU_DEVICES:
        raise ArgumentError(
            f"{name} is on DLPack device {tuple(map(int, device()))} and sparseattn computes on "
            f"the CPU: copy {name} there first"
        )
    try:
        if device is not None and not hasattr(x, "__array__"):
            array = np.from_dlpack(x)
        else:
            array = np.asarray(x)
    except (ValueError, TypeError, BufferError) as error:
        raise ArgumentError(f"{name} cannot be read as an array: {error}") from None
    return with_name(array)


def cast(name: str, x: Any, numpy: str, torch: str) -> str:
    """How to convert ``x``, in the words of its library."""
    if is_torch(x):
        return f"{name}.{torch}()"
    return f"{name}.astype({numpy})" if hasattr(x, "astype") else f"np.asarray({name}, {numpy})"


def to_real(name: str, x: Any) -> tuple[Array, str]:
    """float32 or float64, native, aligned, without gaps in the last axis; and the stored dtype."""
    array, stored = to_array(name, x)
    check_real(name, x, stored)
    return as_real(name, array, real_type(stored)), stored


def check_real(name: str, x: Any, stored: str) -> None:
    if stored not in REAL + HALF:
        raise DtypeError(
            f"{name} has dtype {stored}, not float32, float64, float16 or bfloat16: "
            f"pass {cast(name, x, 'np.float32', 'float')}"
        )


def has_steps(array: Array, size: int, packed: bool) -> bool:
    """Whether strides count whole elements of ``size`` bytes; ``packed``: one on the last axis."""
    if any(stride % size for stride in array.strides):
        return False
    return not packed or array.ndim == 0 or array.shape[-1] <= 1 or array.strides[-1] == size


def as_real(name: str, array: Array, real: np.dtype[Any], *, packed: bool = True) -> Array:
    """``array`` itself where the core can read it as ``real``, which is a real type or the type it
    is stored in, else a copy; ``packed``: no gaps in its rows."""
    size = real.itemsize
    if (
        array.dtype == real
        and array.flags.aligned
        and (array.flags.c_contiguous or has_steps(array, size, packed))
    ):
        return array
    with enough_memory(f"a copy of {name}", array.shape, real):
        if array.dtype == BITS != real:
            array = widen(array)
        return array.astype(real, order="C")


@contextlib.contextmanager
def enough_memory(what: str, shape: tuple[int, ...], dtype: Any) -> Iterator[None]:
    try:
        yield
    except (MemoryError, ValueError):  # NumPy's ValueError: more bytes than can be counted
        raise too_large(what, shape, dtype) from None


def too_large(what: str, shape: tuple[int, ...], dtype: Any) -> OutOfMemory:
    return OutOfMemory(
        f"{what} of shape {shape} in {np.dtype(dtype).name} does not fit in memory: "
        "make the call smaller"
    )


def empty(what: str, shape: tuple[int, ...], dtype: Any) -> Array:
    try:  # a context manager would take longer than the allocation
        return np.empty(shape, dtype)
    except (MemoryError, ValueError):
        raise too_large(what, shape, dtype) from None


class Operands(NamedTuple):
    """q, k, v of one call as (batch, heads, length, dim), and how to give results back."""

    q: Array  # as they are stored, bfloat16 as its bits
    k: Array
    v: Array
    lead: tuple[int, ...]  # the axes that became batch
    stored: str  # dtype name of q, that the output is given in
    torch: bool

    @property
    def real(self) -> np.dtype[Any]:
        """The type of all that is computed: float64 for float64, else float32."""
        return real_type(self.stored)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.lead, *self.q.shape[1:3], self.v.shape[3])

    @property
    def score_shape(self) -> tuple[int, int, int, int]:
        batch, heads, n_q = self.q.shape[:3]
        return batch, heads, n_q, self.k.shape[2]

    def give(self, array: Array, *, stored: bool = False) -> Any:
        """An array of (batch, ...) in the caller's kind, leading axes put back; ``stored``: in the
        dtype of q."""
        array = array.reshape(self.lead + array.shape[1:])
        return dress(array, self.stored if stored else None, self.torch)


def dress(array: Array, stored: str | None, torch: bool) -> Any:
    """An array of the core as NumPy or PyTorch has it; ``stored``: in the dtype of that name, which
    real values are rounded to."""
    if stored in HALF and not is_half(array):
        with enough_memory("the output", array.shape, np.float16):
            array = narrow(array, storage_type(stored))
    if torch:
        from sparseattn.integrations.torch import from_numpy

        return from_numpy(array)
    return array.view(np.dtype(stored)) if stored == "bfloat16" else array


def read_alike(given: dict[str, Any], axes: str) -> tuple[list[Array], str]:
    """Arrays of one dtype with at least ``axes``, as they are stored, and that dtype's name.
    Nothing is copied before all of that is known."""
    taken = {name: to_array(name, x) for name, x in given.items()}
    first, (_, stored) = next(iter(taken.items()))
    least = axes.count(",")
    for name, (array, dtype) in taken.items():
        check_real(name, given[name], dtype)
        if array.ndim < least:
            hint = f": for one head pass {name}[None]" if array.ndim == least - 1 == 2 else ""
            raise ArgumentError(f"{name} must be {axes}, got shape {array.shape}{hint}")
        if dtype != stored:
            raise DtypeError(f"{name} is {dtype} and {first} is {stored}: convert one of them")
        if array.size > MAX_DIM:
            check_sizes(name, array.shape)
    wanted = storage_type(stored)
    return [as_real(name, array, wanted) for name, (array, _) in taken.items()], stored


def check_sizes(name: str, shape: tuple[int, ...], most_of: Any = MOST) -> None:
    for axis, most, words in most_of[: len(shape)]:
        if shape[axis] > most:
            raise ArgumentError(f"{name} must be at most {most} {words}, got shape {shape}")
    if math.prod(shape[:-3]) > MOST_BATCHES:
        raise ArgumentError(f"{name} must have a batch of at most {MOST_BATCHES}, got {shape}")


def read_operands(q: Any, k: Any, v: Any) -> Operands:
    """Check kinds and leading axes; sizes of heads, lengths and dims are the core's to check.

    ``v`` None: planning needs no values, k stands in.
    """
    given = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    arrays, stored = read_alike(given, "(..., heads, length, dim)")
    return make_operands([*arrays, arrays[1]][:3], ("q", "k", "v"), stored, is_torch(q))


def make_operands(
    arrays: list[Array], names: tuple[str, str, str], stored: str, torch: bool
) -> Operands:
    """Operands of arrays (..., heads, length, dim) whose leading axes broadcast together."""
    lead, *others = [array.shape[:-3] for array in arrays]
    if len(lead) == 1 and others == [lead, lead]:
        return Operands(arrays[0], arrays[1], arrays[2], lead, stored, torch)
    try:
        lead = np.broadcast_shapes(lead, *others)
    except ValueError:
        shapes = ", ".join(f"{n} {array.shape}" for n, array in zip(names, arrays, strict=True))
        raise ArgumentError(
            f"the axes before (heads, length, dim) do not broadcast together: {shapes}"
        ) from None
    q, k, v = (collapse(array, lead) for array in arrays)
    return Operands(q, k, v, lead, stored, torch)


def collapse(x: Array, lead: tuple[int, ...]) -> Array:
    """(..., a, b, c) as (batch, a, b, c), a view where strides allow."""
    if x.shape[:-3] != lead:
        x = np.broadcast_to(x, lead + x.shape[-3:])
    return x if len(lead) == 1 else x.reshape((math.prod(lead), *x.shape[-3:]))


def read_problem(
    ops: Operands,
    *,
    causal: Any = False,
    scale: Any = None,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    softcap: Any = None,
    dropout_p: Any = 0.0,
    seed: Any = None,
    params: Any = None,
) -> Problem:
    dim = ops.q.shape[3]
    default = dim**-0.5 if dim else 1.0
    share, drawn = read_dropout(dropout_p, seed, ops.torch)
    return Problem(
        causal=read_causal(causal),
        scale=default if scale is None else read_number("scale", scale),
        softcap=0.0 if softcap is None else read_number("softcap", softcap, least=0.0),
        mask=None if mask is None else spread("mask", read_mask(mask), ops),
        bias=None if bias is None else spread("bias", read_bias(bias, ops), ops),
        key_mask=None if key_mask is None else read_key_mask(key_mask, ops),
        dropout_p=share,
        seed=drawn,
        sink=read_sink(params, ops),
    )


def read_causal(causal: Any) -> int:
    if isinstance(causal, bool | np.bool_):
        return int(causal)
    if isinstance(causal, str):
        found = CAUSAL.get(causal.lower().replace("-", "").replace("_", ""))
        if found is not None:
            return found
    raise ArgumentError(
        f"causal must be False, True (the same as 'bottom_right'), 'bottom_right' or 'top_left', "
        f"got {causal!r:.80}"
    )


def read_number(name: str, value: Any, least: float = -math.inf) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name} must be a number, got {value!r:.80}") from None
    if not math.isfinite(number) or number < least:
        bound = f" of at least {least:g}" if least > -math.inf else ""
        raise ArgumentError(f"{name} must be a finite number{bound}, got {value!r:.80}")
    return number


def read_dropout(dropout_p: Any, seed: Any, torch: bool = False) -> tuple[float, int]:
    """The share of weights to drop, and what says which: drawn here unless given, for tensors by
    PyTorch's generator."""
    share = 0.0 if dropout_p == 0 else read_number("dropout_p", dropout_p)
    if not 0.0 <= share < 1.0:
        raise ArgumentError(f"dropout_p must be in [0, 1), got {dropout_p!r:.80}")
    if seed is None and share and torch:
        from sparseattn.integrations.torch import draw_seed

        return share, draw_seed()
    if seed is None:
        return share, int.from_bytes(os.urandom(8)) >> 1 if share else 0
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < SEEDS or isinstance(seed, bool):
        raise ArgumentError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r:.80}")
    return share, number


def read_sink(params: Any, ops: Operands) -> Array | None:
    """``params["sink"]``: for each query head the score of one more key, whose value is 0."""
    given = sink_of(params)
    if given is None:
        return None
    array, stored = to_array("params['sink']", given)
    check_real("params['sink']", given, stored)
    heads = ops.q.shape[1]
    if array.shape != (heads,):
        raise ArgumentError(
            f"params['sink'] must have one entry a query head, shape ({heads},), got {array.shape}"
        )
    sink = as_real("params['sink']", array, real_type(stored))
    return sink.astype(ops.real, copy=False)


def read_bool(name: str, x: Any, otherwise: str) -> Array:
    array, stored = to_array(name, x)
    if array.dtype == np.bool_:
        return array
    if array.dtype.kind in "iu" and stored not in HALF:
        raise DtypeError(
            f"{name} has dtype {stored}, and True must mean 'may attend': "
            f"pass {cast(name, x, 'bool', 'bool')} if 1 means that"
        )
    raise DtypeError(f"{name} has dtype {stored}, not bool: {otherwise}")


def read_mask(mask: Any) -> Array:
    return read_bool("mask", mask, "a float array added to the scores is passed as bias=")


def read_bias(bias: Any, ops: Operands) -> Array:
    array, stored = to_array("bias", bias)
    if array.dtype == np.bool_:
        raise DtypeError("bias has dtype bool: True for 'may attend' is passed as mask=")
    check_real("bias", bias, stored)
    real = as_real("bias", once(array), ops.real, packed=False)
    return np.broadcast_to(real, array.shape)  # what was broadcast stays so


def once(array: Array) -> Array:
    """What an array holds, without the repeats of strides of zero; it broadcasts to the array."""
    return array[tuple(slice(None) if step else slice(1) for step in array.strides)]


def read_key_mask(key_mask: Any, ops: Operands) -> Array:
    """bool (batch, n_k); a call without leading axes may leave batch out."""
    array = read_bool("key_mask", key_mask, "it says which keys are there, and takes no floats")
    n_k = ops.k.shape[2]
    wanted = (*ops.lead, n_k)
    if array.shape == (1, *wanted):
        array = array[0]
    if array.shape != wanted:
        hint = ": a mask for (..., heads, n_q, n_k) is passed as mask=" if array.ndim > 2 else ""
        raise ArgumentError(f"key_mask must have shape {wanted}, got {array.shape}{hint}")
    return array.reshape(-1, n_k) if len(ops.lead) != 1 else array


def spread(name: str, x: Array, ops: Operands) -> Array:
    """Broadcast to (batch, heads, n_q, n_k) with strides of zero, never by copies of rows."""
    batch, heads, n_q, n_k = ops.score_shape
    full = (*ops.lead, heads, n_q, n_k)
    try:
        np.broadcast_to(x, full)
    except ValueError:
        hint = ""
        if x.shape == (batch, n_k):
            hint = ": padding of shape (batch, n_k) is passed as key_mask="
        elif x.shape == (batch, n_q, n_k):
            hint = f": for one {name} a batch pass {name}[:, None]"
        raise ArgumentError(
            f"{name} must broadcast to (..., heads, n_q, n_k) = {full}, got {x.shape}{hint}"
        ) from None
    x = x.reshape((1,) * (len(full) - x.ndim) + x.shape)
    if all(size == 1 for size in x.shape[:-3]):
        x = x.reshape((1, *x.shape[-3:]))
    else:
        x = collapse(x, ops.lead)
    return np.broadcast_to(x, ops.score_shape)


def check_params(params: Any, known: tuple[str, ...], spec: object) -> dict[str, Array] | None:
    """The arrays of a spec, by name; names that it does not take are refused. ``sink`` goes with
    every spec, in the problem."""
    if params is None:
        return None
    if not hasattr(params, "items"):
        raise ArgumentError(f"params must be a mapping from names to arrays, got {params!r:.80}")
    for name in params:
        if name != SINK and name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no arrays but sink"
            raise ArgumentError(f"params has {name!r:.80}, and {spec} {takes}")
    taken = {
        name: to_array(f"params[{name!r}]", value) for name, value in params.items() if name != SINK
    }
    return {
        n: np.broadcast_to(widen(once(x)), x.shape) if stored in HALF else x
        for n, (x, stored) in taken.items()
    } or None


class Target(NamedTuple):
    """Where the output goes: an array the core writes, then perhaps a copy into the caller's."""

    array: Array  # (batch, heads, n_q, dim_v), stored as q is
    given: Any  # the caller's out=, or None
    direct: bool  # the core writes the caller's memory

    def finish(self, ops: Operands) -> Any:
        if self.given is None:
            return ops.give(self.array, stored=True)
        if not self.direct:
            result = self.array.reshape(ops.out_shape)
            self.given[...] = dress(result, ops.stored, is_torch(self.given))
        return self.given


def make_target(out: Any, ops: Operands, masks: Problem | None = None) -> Target:
    """A fresh array, or the caller's ``out``: checked for shape, dtype, writing and overlap."""
    batch, heads, n_q = ops.q.shape[:3]
    shape = (batch, heads, n_q, ops.v.shape[3])
    if out is None:
        return Target(empty("the output", shape, ops.q.dtype), None, True)
    if not isinstance(out, np.ndarray) and not is_torch(out):
        raise ArgumentError(f"out must be an array or a CPU tensor, got {type(out).__name__}")
    if tuple(out.shape) != ops.out_shape:
        raise ArgumentError(f"out must have shape {ops.out_shape}, got {tuple(out.shape)}")
    array, stored = to_array("out", out)
    if stored != ops.stored:
        raise DtypeError(f"out must have dtype {ops.stored} as q has, got {stored}")
    if not array.flags.writeable:
        raise ArgumentError("out must be writable, got a read-only array: pass a copy")
    steps = array.strides
    if 0 in steps and any(step == 0 and n > 1 for step, n in zip(steps, array.shape, strict=True)):
        raise ArgumentError("out must hold each element once, got a broadcast array: pass a copy")
    read = {"q": ops.q, "k": ops.k, "v": ops.v}
    if masks is not None:
        named = {"mask": masks.mask, "bias": masks.bias, "key_mask": masks.key_mask}
        named["params['sink']"] = masks.sink
        read |= {name: x for name, x in named.items() if x is not None}
    for name, x in read.items():
        if overlap(array, x):
            raise ArgumentError(f"out must not overlap {name}: pass another array")
    view = as_real("out", array, ops.q.dtype).reshape(shape)
    native = is_torch(out) or out.dtype.isnative
    if array.size == 0 or (native and np.may_share_memory(view, array)):
        return Target(view, out, True)
    return Target(empty("the output", shape, ops.q.dtype), out, False)


def overlap(a: Array, b: Array) -> bool:
    try:
        return np.may_share_memory(a, b) and np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]  # NumPy takes any
    except np.exceptions.TooHardError:
        return True
