"""Contract checks of what comes in: NaN and infinities, layouts, empty sizes, ``out=``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from sparseattn.attention import OutLse, attention
from sparseattn.errors import ArgumentError
from sparseattn.testing_subject import Fault, Shape, Skip, Subject, check, same, same_rows

if TYPE_CHECKING:
    from sparseattn.variants.base import Array

BAD = (np.nan, np.inf, -np.inf)
SIZES = ((2, 33, 47), (2, 1, 40))  # batch, n_q, n_k: a prefill and a decode


# ---- NaN, infinities, empty rows -----------------------------------------------------------------


@check("A6")
def rows_that_see_nothing(s: Subject) -> None:
    """A row without a visible key is 0 with log-sum-exp -inf, and nothing is NaN."""
    for sizes in SIZES:
        shape = s.shape(*sizes)
        mask = np.ones((shape[0], s.heads, *sizes[1:]), bool)
        mask[0, :, sizes[1] // 2] = False
        mask[1, 0] = False
        got = s.run(s.inputs(shape, np.float32), shape, mask=mask)
        empty = ~s.see(shape, mask=mask).any(-1)
        where = s.where(shape, extra="mask= with empty rows")
        if got.out[empty].any() or not np.isneginf(got.lse[empty]).all():
            raise Fault(where, "other numbers in rows that see nothing", "out 0 and lse -inf")
        if np.isnan(got.out).any() or np.isnan(got.lse).any():
            raise Fault(where, "NaN", "none")


@check("A6")
def masked_nan_has_no_effect(s: Subject) -> None:
    """NaN and infinities at keys that a mask or padding hides change no bit."""
    for sizes in SIZES:
        shape = s.shape(*sizes)
        key_mask = np.random.default_rng(5).random((2, sizes[2])) < 0.8
        for masks in ({"key_mask": key_mask}, {"mask": key_mask[:, None, None]}):
            arrays = s.inputs(shape, np.float32)
            before = s.run(arrays, shape, **masks)
            for bad in BAD:
                q, k, v = (x.copy() for x in arrays)
                k.swapaxes(1, 2)[~key_mask] = bad
                v.swapaxes(1, 2)[~key_mask] = bad
                where = s.where(shape, extra=f"{bad} where {next(iter(masks))} hides it")
                same_rows(where, s.run((q, k, v), shape, **masks), before, ..., "as without")


@check("A6")
def unselected_nan_has_no_effect(s: Subject) -> None:
    """NaN in a value that a row does not keep changes no bit of that row."""
    for sizes in SIZES:
        shape = s.shape(*sizes)
        arrays = s.inputs(shape, np.float32)
        kept = s.plan(arrays, shape).to_mask()
        before = s.run(arrays, shape)
        for j in (0, sizes[2] // 2, sizes[2] - 1):
            q, k, v = (x.copy() for x in arrays)
            v[:, :, j] = np.nan
            if not s.spec.reads_keys:
                k[:, :, j] = np.nan
            where = s.where(shape, extra=f"NaN at key {j}")
            same_rows(where, s.run((q, k, v), shape), before, ~kept[..., j], "as without")


@check("A6")
def nan_stays_in_its_row(s: Subject) -> None:
    """NaN in a query makes its own row NaN, where it sees a key, and changes no bit of others."""
    for sizes in SIZES:
        shape = s.shape(*sizes)
        q, k, v = s.inputs(shape, np.float32)
        before = s.run((q, k, v), shape)
        q = q.copy()
        row = (1, s.heads - 1, sizes[1] // 2)
        q[row][1] = np.nan
        after = s.run((q, k, v), shape)
        where = s.where(shape, extra=f"NaN in query {row}")
        others = np.ones(q.shape[:3], bool)
        others[row] = False
        same_rows(where, after, before, others, "as without")
        sees = not s.composed and s.plan((q, k, v), shape).to_mask()[row].any()
        if sees and not np.isnan(after.out[row]).all():
            raise Fault(where, f"out{row} = {after.out[row]}", "NaN")


@check("A6")
def extreme_scores_are_finite(s: Subject) -> None:
    """Scores up to 3e38, all equal, or denormal give finite outputs."""
    for sizes in SIZES:
        shape = s.shape(*sizes)
        q, k, v = s.inputs(shape, np.float32)
        for size in (3e38, 1e4, 1e-40):
            bias = np.where(np.arange(sizes[2]) % 3 == 0, size, -size).astype(np.float32)
            got = s.run((q * np.float32(1e-40), k, v), shape, bias=bias)
            if not np.isfinite(got.out).all():
                where = s.where(shape, extra=f"bias of {size:g} and {-size:g}")
                raise Fault(where, "out that is not finite", "finite numbers")


# ---- layouts -------------------------------------------------------------------------------------


def gapped(x: Array) -> Array:
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def misaligned(x: Array) -> Array:
    raw = np.zeros(x.nbytes + 3, np.uint8)
    y: Array = np.ndarray(x.shape, x.dtype, raw, 3)
    y[...] = x
    return y


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "heads after length": lambda x: x.swapaxes(1, 2).copy().swapaxes(1, 2),
    "Fortran order": np.asfortranarray,
    "length backwards": lambda x: x[:, :, ::-1].copy()[:, :, ::-1],
    "last axis backwards": lambda x: x[..., ::-1].copy()[..., ::-1],
    "gaps in the last axis": gapped,
    "swapped bytes": lambda x: x.astype(x.dtype.newbyteorder()),
    "misaligned by 3 bytes": misaligned,
}


@check("B1")
def any_layout(s: Subject) -> None:
    """Strides, byte order and alignment of the inputs change no bit."""
    shape = s.shape(2, 33, 47)
    arrays = s.inputs(shape, np.float32)
    want = s.run(arrays, shape)
    for name, layout in LAYOUTS.items():
        got = s.run([layout(x) for x in arrays], shape)
        same_rows(s.where(shape, extra=name), got, want, ..., "of contiguous copies")


@check("B1")
def repeated_keys_by_stride_zero(s: Subject) -> None:
    """A batch of keys broadcast by strides of zero gives the bits of a copy."""
    shape = s.shape(3, 9, 47)
    q, k, v = s.inputs(shape, np.float32)
    k, v = (np.broadcast_to(x[:1], x.shape) for x in (k, v))
    want = s.run((q, k.copy(), v.copy()), shape)
    same_rows(s.where(shape, extra="strides of zero"), s.run((q, k, v), shape), want, ..., "copied")


@check("B1")
def inputs_stay_as_they_are(s: Subject) -> None:
    """No call changes q, k, v, masks, bias or params, read-only ones included."""
    for locked in (False, True):
        shape = s.shape(2, 33, 47)
        given = dict(zip("qkv", s.inputs(shape, np.float32), strict=True)) | s.masks(shape)
        given["bias"] = np.ones(shape[3:5], np.float32)
        made = s.params(shape) or {}
        params = {name: np.array(x) for name, x in made.items()}
        every = given | params
        before = {name: x.tobytes() for name, x in every.items()}
        for x in every.values():
            x.flags.writeable = not locked
        terms = {n: x for n, x in given.items() if n not in ("q", "k", "v")}
        try:
            s.run([given[n] for n in "qkv"], shape, params=params or None, **terms)
        except ValueError as error:
            if "read-only" not in str(error):
                raise
            raise Fault(s.where(shape), f"{error} for a read-only input", "no write") from None
        for name, x in every.items():
            if x.tobytes() != before[name]:
                raise Fault(s.where(shape), f"{name} written to", "inputs left as they are")


@check("B1")
def empty_sizes(s: Subject) -> None:
    """No batch, no queries or no keys give empty outputs, or rows that see nothing."""
    for sizes in ((0, 5, 7), (2, 0, 7), (2, 5, 0)):
        if s.spec.arrays:
            raise Skip("its arrays have no empty form")
        shape = s.shape(*sizes)
        got = s.run(s.inputs(shape, np.float32), shape)
        want = OutLse(
            np.zeros((sizes[0], s.heads, sizes[1], shape[6]), np.float32),
            np.full((sizes[0], s.heads, sizes[1]), -np.inf, np.float32),
        )
        same_rows(s.where(shape), got, want, ..., "of rows that see nothing")


# ---- out= ----------------------------------------------------------------------------------------


@check("B2")
def out_is_filled(s: Subject) -> None:
    """``out=`` of any layout is filled with the bits of a call without, and given back."""
    shape = s.shape(2, 33, 47)
    arrays = s.inputs(shape, np.float32)
    want = s.run(arrays, shape).out
    for name, layout in LAYOUTS.items():
        out = layout(np.full(want.shape, 7, np.float32))
        got = s.run(arrays, shape, out=out).out
        where = s.where(shape, extra=f"out= with {name}")
        if got is not out:
            raise Fault(where, "another array back", "out itself")
        same(where, "out", np.array(out, np.float32), np.ascontiguousarray(want), "without out=")


@check("B2")
def out_may_not_overlap(s: Subject) -> None:
    """``out=`` on an input's memory is refused, or gives the bits of a call without."""
    n = 12
    shape = s.shape(1, n, n, 4, 4)
    size = s.heads * n * 4
    for name in ("q", "k", "v"):
        for shift in (0, 4, size // 2):
            overlapping(s, shape, name, shift)


def overlapping(s: Subject, shape: Shape, name: str, shift: int) -> None:
    arrays = dict(zip("qkv", s.inputs(shape, np.float32), strict=True))
    x = arrays[name]
    out_shape = (*arrays["q"].shape[:3], shape[6])
    memory = np.zeros(x.size + shift + int(np.prod(out_shape)), np.float32)
    arrays[name] = memory[: x.size].reshape(x.shape)
    arrays[name][...] = x
    q, k, v = arrays.values()
    want = s.run((q.copy(), k.copy(), v.copy()), shape).out
    out = memory[shift : shift + int(np.prod(out_shape))].reshape(out_shape)
    try:
        got = attention(q, k, v, s.spec, out=out, **s.call(shape))
    except ArgumentError:
        return
    same(s.where(shape, extra=f"out= {shift} elements into {name}"), "out", got, want, "apart")
