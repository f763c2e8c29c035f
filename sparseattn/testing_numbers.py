"""Contract checks of the arithmetic: outputs, weights, gradients and decoding in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparseattn.attention import OutLse, attention
from sparseattn.cache import Cache
from sparseattn.gradients import attention_vjp
from sparseattn.testing_subject import (
    CEILING,
    Fault,
    Shape,
    Skip,
    Subject,
    check,
    near,
    same,
    same_rows,
    threads,
)

# of central differences
EPS, ATOL, RTOL = 1e-6, 1e-5, 1e-3
DECODE = 1e-13  # promise A5, relative to 1 + |value|


def forward(s: Subject, dtype: str) -> None:
    for shape, causal in s.cases():
        for masks in ({}, s.masks(shape)):
            arrays = s.inputs(shape, dtype)
            got = s.run(arrays, shape, causal, **masks)
            want = s.want(arrays, shape, causal, **masks)
            where = s.where(shape, causal, dtype + (", masked" if masks else ""))
            near(where, "out", got.out, want[0], CEILING[dtype])
            near(where, "lse", got.lse, want[1], CEILING[dtype])


@check("A1")
def forward_float64(s: Subject) -> None:
    """out and lse are those of the definition in float64, masked or not."""
    forward(s, "float64")


@check("A1")
def forward_float32(s: Subject) -> None:
    """float32 is within 1e-5 of the definition in float64."""
    forward(s, "float32")


@check("A1")
def half_is_rounded_once(s: Subject) -> None:
    """float16 inputs give float32's output, rounded."""
    for shape, causal in s.cases():
        halves = s.inputs(shape, np.float16)
        got = s.run(halves, shape, causal)
        want = s.run([x.astype(np.float32) for x in halves], shape, causal)
        where = s.where(shape, causal, "float16")
        if got.out.dtype != np.float16 or got.lse.dtype != np.float32:
            raise Fault(where, f"{got.out.dtype} and lse {got.lse.dtype}", "float16 and float32")
        near(where, "out", got.out, want.out.astype(np.float64), 1e-3)
        near(where, "lse", got.lse, want.lse.astype(np.float64), 1e-5)


@check("A1")
def scores_take_terms(s: Subject) -> None:
    """``scale``, ``softcap`` and ``bias`` act on the scores as the definition says."""
    if s.reference is not None:
        raise Skip("its reference takes no terms")
    for shape, causal in s.cases():
        rng = np.random.default_rng(2)
        bias = np.round(rng.standard_normal((s.heads, 1, shape[4])) * 64) / 64
        terms = {"scale": 0.5, "softcap": 2.5, "bias": bias}
        arrays = s.inputs(shape)
        got = s.run(arrays, shape, causal, **terms)
        want = s.want(arrays, shape, causal, **terms)
        where = s.where(shape, causal, "scale, softcap, bias")
        near(where, "out", got.out, want[0], CEILING["float64"])
        near(where, "lse", got.lse, want[1], CEILING["float64"])


@check("G1")
def weights_are_the_outputs(s: Subject) -> None:
    """``return_weights`` gives weights whose product with v is the output."""
    if s.composed:
        raise Skip("it composes operators, which one array of weights does not hold")
    for shape, causal in s.cases():
        q, k, v = s.inputs(shape)
        got = attention(q, k, v, s.spec, return_weights=True, **s.call(shape, causal))
        of = np.arange(s.heads) * s.kv_heads // s.heads
        near(s.where(shape, causal), "out", got.out, got.weights @ v[:, of], CEILING["float64"])


@check("G1")
def outputs_follow_inputs(s: Subject) -> None:
    """Shape and dtype of out and lse follow the inputs, with any leading axes."""
    for dtype in (np.float32, np.float64):
        shape = s.shape(6, 9, 13)
        q, k, v = s.inputs(shape, dtype)
        flat = s.run((q, k, v), shape)
        deep = s.run([x.reshape(2, 3, *x.shape[1:]) for x in (q, k, v)], shape)
        where = s.where(shape, extra=np.dtype(dtype).name)
        want = (6, s.heads, 9, 5)
        if flat.out.shape != want or flat.out.dtype != dtype or flat.lse.dtype != dtype:
            raise Fault(where, f"out {flat.out.dtype}{flat.out.shape}", f"{want}, and lse alike")
        folded = OutLse(deep.out.reshape(want), deep.lse.reshape(want[:3]))
        same_rows(where, folded, flat, ..., "with a batch of 2 x 3")


# ---- gradients -----------------------------------------------------------------------------------


class Back(NamedTuple):
    """A call with gradients of its outputs, and those of its inputs."""

    shape: Shape
    causal: Any
    arrays: dict[str, Any]
    dout: Any
    dlse: Any
    grads: dict[str, Any]


def back(s: Subject, shape: Shape, causal: Any) -> Back:
    if s.composed:
        raise Skip("it composes operators, which have no gradient yet")
    q, k, v = s.inputs(shape)
    rng = np.random.default_rng(3)
    arrays = {"q": q, "k": k, "v": v, "bias": rng.standard_normal((1, shape[3], shape[4]))}
    call = {"params": s.params(shape), "causal": causal, "bias": arrays["bias"]}
    vjp = attention_vjp(q, k, v, s.spec, **call)
    dout, dlse = rng.standard_normal(vjp.out.shape), rng.standard_normal(vjp.lse.shape)
    dlse = np.where(np.isneginf(vjp.lse), 0, dlse)
    found = vjp.pullback(dout, dlse)
    grads = {"q": found.dq, "k": found.dk, "v": found.dv, "bias": found.dbias}
    return Back(shape, causal, arrays, dout, dlse, grads)


@check("A2")
def gradients_are_slopes(s: Subject) -> None:
    """Gradients of q, k, v and bias are central differences, the kept keys held fixed."""
    for shape, causal in s.cases():
        b = back(s, shape, causal)
        made = s.plan([b.arrays["q"], b.arrays["k"]], shape, causal, bias=b.arrays["bias"])
        if any(piece.straight_through for piece in made.pieces):
            raise Skip("its gradient is straight-through, not a slope")
        rng = np.random.default_rng(4)
        for name in b.arrays:
            for _ in range(10 if s.long else 2):
                slope(s, b, made, name, rng.standard_normal(b.arrays[name].shape))


def slope(s: Subject, b: Back, made: Any, name: str, step: Any) -> None:
    def total(sign: float) -> float:
        x = {**b.arrays, name: b.arrays[name] + sign * EPS * step}
        got = attention(x["q"], x["k"], x["v"], made, bias=x["bias"], return_lse=True)
        lse = np.where(np.isneginf(got.lse), 0, got.lse)
        return float((got.out * b.dout).sum() + (lse * b.dlse).sum())

    want = (total(1) - total(-1)) / (2 * EPS)
    got = float((b.grads[name] * step).sum())
    if not abs(got - want) <= ATOL + RTOL * abs(want):
        raise Fault(s.where(b.shape, b.causal), f"slope {got:.6g} of {name}", f"{want:.6g}")


@check("A2")
def unseen_keys_get_no_gradient(s: Subject) -> None:
    """A key that no row keeps has a gradient of zero."""
    for shape, causal in s.cases():
        b = back(s, shape, causal)
        made = s.plan([b.arrays["q"], b.arrays["k"]], shape, causal, bias=b.arrays["bias"])
        kept = made.to_mask()
        through = any(piece.straight_through for piece in made.pieces)
        kept = kept.reshape(shape[0], s.kv_heads, -1, *kept.shape[2:])
        dead = ~kept.any((2, 3))
        for name in ("v",) if through or s.full_row(made) else ("k", "v"):
            if b.grads[name][dead].any():
                where = s.where(shape, causal, f"d{name} of keys that no row keeps")
                raise Fault(where, f"{np.abs(b.grads[name][dead]).max():.3g}", "0")


@check("C5")
def same_gradients_for_threads(s: Subject) -> None:
    """Gradients have the same bits for any number of threads."""
    shape = s.shape(1, 130, 130)
    want = back(s, shape, s.causal).grads
    for n in (1, 3):
        with threads(n):
            got = back(s, shape, s.causal).grads
        for name in want:
            where = s.where(shape, extra=f"{n} threads")
            same(where, f"d{name}", got[name], want[name], "as the call before")


# ---- decode --------------------------------------------------------------------------------------


def by_chunks(
    s: Subject, sizes: tuple[int, ...], shape: Shape, key_mask: Any = None, stop: int = 0
) -> OutLse:
    """The rows of one prefill, chunk after chunk, the last size again and again; after the chunk
    that reaches ``stop`` a fresh cache goes on from a snapshot."""
    arrays = s.inputs(shape)
    cache, outs, at, chunk = Cache(s.spec), [], 0, 0
    while at < shape[4]:
        end = min(at + sizes[min(chunk, len(sizes) - 1)], shape[4])
        there = None if key_mask is None else key_mask[:, at:end]
        q, k, v = (x[:, :, at:end] for x in arrays)
        call = {**s.call(shape, True), "key_mask": there, "cache": cache}
        outs.append(attention(q, k, v, return_lse=True, **call))
        if at < stop <= end:
            cache = Cache(s.spec).restore(cache.snapshot())
        at, chunk = end, chunk + 1
    return OutLse(*(np.concatenate([x[i] for x in outs], 2) for i in (0, 1)))


def decode(s: Subject, sizes: tuple[int, ...], padded: bool = False) -> None:
    s.need_causal()
    n = 300 if s.long else 70
    shape = s.shape(2, n, n)
    key_mask = s.masks(shape)["key_mask"] if padded else None
    got = by_chunks(s, sizes, shape, key_mask)
    masks = {"key_mask": key_mask} if padded else {}
    want = s.run(s.inputs(shape), shape, True, **masks)
    where = s.where(shape, True, f"chunks of {sizes}" + (", padded" if padded else ""))
    near(where, "out", got.out, want.out, DECODE)
    near(where, "lse", got.lse, want.lse, DECODE)


@check("A5")
def decode_by_tokens(s: Subject) -> None:
    """Token by token with a cache gives the rows of one call over everything."""
    decode(s, (1,))


@check("A5")
def decode_by_chunks(s: Subject) -> None:
    """So do chunks: a prompt, tokens, a longer chunk."""
    for sizes in ((2,), (7,), (64,), (33, 1, 1, 20)) if s.long else ((7,), (33, 1, 1, 20)):
        decode(s, sizes)


@check("A5")
def decode_with_padding(s: Subject) -> None:
    """So does decoding with padding among the keys."""
    decode(s, (33, 1, 1, 20), padded=True)


@check("A5")
def decode_restored(s: Subject) -> None:
    """A cache restored from a snapshot goes on to the bit."""
    s.need_causal()
    shape = s.shape(1, 70, 70)
    got, want = (by_chunks(s, (30, 1, 9), shape, stop=stop) for stop in (31, 0))
    same_rows(s.where(shape, True), got, want, ..., "without the restore")
