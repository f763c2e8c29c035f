"""Contract checks of the plan: who sees whom, how it is counted, what it may depend on."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparseattn.attention import attention
from sparseattn.testing_subject import (
    Fault,
    Shape,
    Skip,
    Subject,
    check,
    first,
    same,
    same_rows,
    threads,
)


def inside(where: str, kept: Any, see: Any, what: str) -> None:
    """No row keeps a key that it may not see."""
    if (kept & ~see).any():
        b, h, i, j = first(kept & ~see)
        raise Fault(where, f"key {j} kept by row {i} of batch {b}, head {h}", what)


@check("G1")
def plan_covers_heads(s: Subject) -> None:
    """The pieces of the plan cover every query head once, in order."""
    for shape, causal in s.cases():
        made = s.plan(s.inputs(shape), shape, causal)
        spans = [(piece.begin, piece.end) for piece in made.pieces]
        ends = [0, *(end for _, end in spans)]
        if [begin for begin, _ in spans] != ends[:-1] or ends[-1] != s.heads:
            raise Fault(s.where(shape, causal), f"pieces over heads {spans}", f"0 to {s.heads}")
        if made.to_mask().shape != (shape[0], s.heads, *shape[3:5]):
            raise Fault(s.where(shape, causal), made.to_mask().shape, "(batch, heads, n_q, n_k)")


@check("A4")
def plan_sees_no_future(s: Subject) -> None:
    """No row keeps a key that causality hides."""
    for shape in s.shapes:
        for causal in s.alignments:
            kept = s.plan(s.inputs(shape), shape, causal).to_mask()
            inside(s.where(shape, causal), kept, s.see(shape, causal), "no key after the row's own")


@check("G1")
def plan_obeys_mask(s: Subject) -> None:
    """No row keeps a key that ``mask`` hides."""
    for shape, causal in s.cases():
        mask = s.masks(shape)["mask"]
        kept = s.plan(s.inputs(shape), shape, causal, mask=mask).to_mask()
        inside(s.where(shape, causal, "mask="), kept, mask, "only keys that mask shows")


@check("G1")
def plan_obeys_key_mask(s: Subject) -> None:
    """No row keeps a key that ``key_mask`` says is padding."""
    for shape, causal in s.cases():
        key_mask = s.masks(shape)["key_mask"]
        kept = s.plan(s.inputs(shape), shape, causal, key_mask=key_mask).to_mask()
        see = np.broadcast_to(key_mask[:, None, None], kept.shape)
        inside(s.where(shape, causal, "key_mask="), kept, see, "only keys that are there")


@check("G1")
def plan_counts(s: Subject) -> None:
    """``kept_share`` and ``count`` are those of the plan's mask."""
    for shape, causal in s.cases():
        masks = s.masks(shape)
        made = s.plan(s.inputs(shape), shape, causal, **masks)
        kept, see = int(made.to_mask().sum()), int(s.see(shape, causal, **masks).sum())
        where = s.where(shape, causal, "masked")
        if made.count()[:2] != (kept, see):
            raise Fault(where, f"kept, visible = {made.count()[:2]}", f"{(kept, see)}")
        share = kept / see if see else 1.0
        if made.kept_share != share:
            raise Fault(where, f"kept_share {made.kept_share}", f"{share}")


@check("G1")
def plan_rows(s: Subject) -> None:
    """Keys read row by row are those of the plan's mask."""
    for shape, causal in s.cases():
        made = s.plan(s.inputs(shape), shape, causal)
        kept, rng = made.to_mask(), np.random.default_rng(0)
        for _ in range(50 if s.long else 5):
            b, h, i = (int(rng.integers(size)) for size in kept.shape[:3])
            keys = made.rows(h).keys(b, h, i).tolist()
            want = np.flatnonzero(kept[b, h, i]).tolist()
            if keys != want:
                raise Fault(s.where(shape, causal), f"keys {keys} of {(b, h, i)}", f"{want}")


@check("G1")
def plan_runs(s: Subject) -> None:
    """``attention`` over the plan gives the bits of ``attention`` over the spec."""
    for shape, causal in s.cases():
        q, k, v = s.inputs(shape, np.float32)
        if s.composed:
            raise Skip("it composes operators, which one plan does not hold")
        got = attention(q, k, v, s.plan((q, k), shape, causal), return_lse=True)
        same_rows(s.where(shape, causal), got, s.run((q, k, v), shape, causal), ..., "by the spec")


@check("C5")
def plan_twice(s: Subject) -> None:
    """The same call makes the same plan, for any number of threads."""
    for shape, causal in s.cases():
        arrays = s.inputs(shape, np.float32)
        want = s.plan(arrays, shape, causal).to_mask()
        for n in (1, 3, 2):
            with threads(n):
                got = s.plan(arrays, shape, causal).to_mask()
            where = s.where(shape, causal, f"{n} threads")
            same(where, "plan", got, want, "as the call before")


@check("G1")
def pattern_reads_nothing(s: Subject) -> None:
    """Unless ``reads_keys`` says so, the plan does not depend on what q and k hold."""
    if s.spec.reads_keys:
        raise Skip("it reads keys")
    for shape, causal in s.cases():
        one, two = (s.plan(s.inputs(shape, seed=n), shape, causal).to_mask() for n in (0, 1))
        same(s.where(shape, causal), "plan", one, two, "of other q and k; else reads_keys = True")


@check("A5")
def keep_covers_rows(s: Subject) -> None:
    """``keep()`` names all keys that a row may see: the first ones and those before it."""
    s.need_causal()
    keep = s.spec.keep()
    if keep is None:
        raise Skip("it keeps all keys")
    shape = s.shape(1, 70, 70)
    kept = s.plan(s.inputs(shape), shape, True).to_mask()
    i, j = np.arange(70)[:, None], np.arange(70)
    covered = (j < keep[0]) | (j >= i - keep[1])
    inside(s.where(shape, True), kept, covered[None, None], f"a key that keep() = {keep} names")


# ---- who may change whom -------------------------------------------------------------------------


@check("A4")
def later_keys_change_nothing(s: Subject) -> None:
    """A key or value at j changes no bit of the rows before it."""
    s.need_causal()
    for shape in s.shapes:
        n_q, n_k = shape[3:5]
        arrays = s.inputs(shape, np.float32)
        before = s.run(arrays, shape, True)
        rng = np.random.default_rng(0)
        for j in rng.choice(n_k, min(n_k, 12 if s.long else 3), replace=False):
            q, k, v = (x.copy() for x in arrays)
            k[:, :, j] = rng.standard_normal(k.shape[3]) * 50
            v[:, :, j] = np.nan if j % 2 else 1e30
            rows = np.s_[:, :, : max(0, int(j) - (n_k - n_q))]
            where = s.where(shape, True, f"key {j} changed")
            same_rows(where, s.run((q, k, v), shape, True), before, rows, "as before")


@check("A4")
def later_queries_change_nothing(s: Subject) -> None:
    """A query at i changes no bit of the rows before it."""
    s.need_causal()
    for shape in s.shapes:
        arrays = s.inputs(shape, np.float32)
        before = s.run(arrays, shape, True)
        for i in {shape[3] // 2, shape[3] - 1}:
            q, k, v = (x.copy() for x in arrays)
            q[:, :, i:] = -q[:, :, i:] * 3
            where = s.where(shape, True, f"queries from {i} on changed")
            rows = np.s_[:, :, :i]
            same_rows(where, s.run((q, k, v), shape, True), before, rows, "as before")


def changed(s: Subject, shape: Shape, axis: int, at: int) -> tuple[Any, ...]:
    """Inputs, with entry ``at`` of the batch or of the kv heads replaced."""
    group = s.heads // s.kv_heads
    arrays, others = s.inputs(shape, np.float32), s.inputs(shape, np.float32, seed=1)
    for which, (x, y) in enumerate(zip(arrays, others, strict=True)):
        size = group if axis == 1 and which == 0 else 1
        part = (slice(None),) * axis + (slice(at * size, (at + 1) * size),)
        x[part] = y[part]
    return arrays


@check("G1")
def batches_are_apart(s: Subject) -> None:
    """What one batch entry holds changes no bit of another."""
    for sizes in ((2, 33, 47), (2, 1, 40)):
        shape = s.shape(*sizes)
        before = s.run(s.inputs(shape, np.float32), shape)
        after = s.run(changed(s, shape, 0, 1), shape)
        same_rows(s.where(shape, extra="batch 1 changed"), after, before, np.s_[:1], "as before")


@check("G1")
def heads_are_apart(s: Subject) -> None:
    """What one kv group of heads holds changes no bit of another."""
    if s.kv_heads == 1:
        raise Skip("it has one kv head here")
    for sizes in ((1, 33, 47), (1, 1, 40)):
        shape = s.shape(*sizes)
        before = s.run(s.inputs(shape, np.float32), shape)
        after = s.run(changed(s, shape, 1, s.kv_heads - 1), shape)
        rows = np.s_[:, : s.heads - s.heads // s.kv_heads]
        same_rows(s.where(shape, extra="last kv head changed"), after, before, rows, "as before")


@check("C5")
def same_bits_for_threads(s: Subject) -> None:
    """The same call gives the same bits again, for 1, 2, 3 and more threads."""
    for sizes in ((1, 130, 130), (1, 1, 300)):
        shape = s.shape(*sizes)
        arrays = s.inputs(shape, np.float32)
        want = s.run(arrays, shape)
        for n in (1, 2, 3, 4, 7, 8) if s.long else (1, 3, 2):
            with threads(n):
                got = s.run(arrays, shape)
            same_rows(s.where(shape, extra=f"{n} threads"), got, want, ..., "as the call before")
