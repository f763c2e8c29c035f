"""Gradients of attention: what (dout, dlse) become at q, k, v, the bias and the sinks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparseattn import _core
from sparseattn.attention import (
    KEYWORDS,
    Call,
    kept_mass,
    read_call,
    row_lse,
    run,
    run_piece,
)
from sparseattn.errors import ArgumentError, DtypeError, NotSupported, door
from sparseattn.half import is_half, real_type, widen
from sparseattn.inputs import (
    SINK,
    Operands,
    Target,
    as_real,
    cast,
    collapse,
    dress,
    empty,
    enough_memory,
    is_torch,
    make_target,
    read_bias,
    read_operands,
    read_sink,
    spread,
    to_array,
)
from sparseattn.packed import build
from sparseattn.plan import RENAMED, Plan, refuse_keywords
from sparseattn.variants.base import Piece, Problem, Variant, parse

if TYPE_CHECKING:
    from sparseattn.variants.base import Array

__all__ = ["Gradients", "VJP", "attention_vjp"]

NO_INPUT = ("cache", "return_lse", "return_weights", "out")  # of attention()
RENAMED_HERE = {
    **RENAMED,
    "cache": "all keys and values so far as k and v: no gradient goes through a cache",
    "return_lse": "nothing: lse comes with out and pullback",
    "dout": "pullback(dout) of what it returns",
    "dlse": "pullback(dout, dlse) of what it returns",
}


class VJP(NamedTuple):
    """Output and log-sum-exp, and the function from their gradients to those of the inputs."""

    out: Any
    lse: Any
    pullback: Callable[..., Gradients]


class Gradients(NamedTuple):
    """Gradients in the shapes, dtypes and kinds of the inputs; None for what was not given."""

    dq: Any
    dk: Any
    dv: Any
    dbias: Any
    dparams: Any


@door
def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    spec: Any = None,
    *,
    params: Any = None,
    causal: Any = False,
    scale: Any = None,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    softcap: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    cu_seqlens: Any = None,
    **wrong: Any,
) -> VJP:
    """Attention and its vector-Jacobian product.

    The keys that a row keeps are held fixed: a selection has no gradient of its own. The weights
    are computed again in the pullback, so nothing of size n_q x n_k is kept in between.

    Parameters
    ----------
    q, k, v, spec, params, causal, scale, mask, key_mask, bias, softcap, dropout_p, seed, cu_seqlens
        As in :func:`attention`. The arrays are read again by the pullback, as ``out`` and ``lse``
        are: leave them unchanged until its last call.

    Returns
    -------
    VJP
        NamedTuple of ``out`` and ``lse``, as ``attention(..., return_lse=True)`` gives them, and
        ``pullback(dout, dlse=None)``, which may be called any number of times: ``dout`` in the
        shape and dtype of ``out`` (None: zeros), ``dlse`` in those of ``lse``. It gives a
        ``Gradients`` NamedTuple of ``dq, dk, dv, dbias, dparams`` in the shapes and dtypes of the
        inputs, half precision rounded from float32; ``dbias`` and ``dparams["sink"]`` where those
        were given, else None.

    Raises
    ------
    ArgumentError, DtypeError, UnknownArgument, NotSupported
        As :func:`attention`; the pullback if a gradient has another shape or dtype than what it
        belongs to.

    References
    ----------
    Dao, "FlashAttention-2", 2023, arXiv:2307.08691 (backward by recomputation); Bengio et al.,
    2013, arXiv:1308.3432 (straight-through selection, ``TopK(..., gradient="straight_through")``).

    >>> import numpy as np, sparseattn as sa
    >>> x = np.random.default_rng(0).standard_normal((2, 9, 4))
    >>> vjp = sa.attention_vjp(x, x, x, "topk:4", causal=True)
    >>> vjp.pullback(np.ones_like(vjp.out)).dq.shape
    (2, 9, 4)
    """
    known = tuple(x for x in KEYWORDS if x not in NO_INPUT)
    refuse_keywords("attention_vjp", wrong, known, RENAMED_HERE)
    call = read_call(
        *(q, k, v, spec),
        params=params,
        causal=causal,
        scale=scale,
        mask=mask,
        key_mask=key_mask,
        bias=bias,
        softcap=softcap,
        dropout_p=dropout_p,
        seed=seed,
        cu_seqlens=cu_seqlens,
    )
    ops = call.ops
    target = make_target(None, ops)
    lse, made, problem = run_once(call, target)
    likes = {"q": like("q", q), "k": like("k", k), "v": like("v", v)}
    if bias is not None:
        likes["bias"] = like("bias", bias)
    if problem.sink is not None:
        likes[SINK] = like(SINK, params[SINK])
    state = State(ops, problem, made, target.array, lse)

    @door
    def pullback(dout: Any, dlse: Any = None) -> Gradients:
        grads = pull(state, likes, *read_gradients(ops, dout, dlse))
        dparams = {SINK: grads[SINK]} if SINK in grads else None
        return Gradients(grads["q"], grads["k"], grads["v"], grads.get("bias"), dparams)

    return VJP(target.finish(ops), ops.give(lse), pullback)


class State(NamedTuple):
    """What a pullback reads: arrays of a call as (batch, heads, length, dim), and its plan."""

    ops: Operands
    problem: Problem
    plan: Plan
    out: Array
    lse: Array


# ---- tensors of PyTorch --------------------------------------------------------------------------


def run_once(call: Call, target: Target) -> tuple[Array, Plan, Problem]:
    """:func:`run` of a spec that is one attend, whose gradient the pullback knows."""
    if not isinstance(call.spec, Plan):
        variant = parse("dense" if call.spec is None else call.spec)
        if type(variant).apply is not Variant.apply:
            raise NotSupported(f"{variant} has no gradient yet: call attention() without one")
    return run(*call, target, True)


def run_recorded(call: Call, given: dict[str, Any], others: tuple[Any, ...]) -> Recorded:
    """A call whose out and lse are nodes of PyTorch's gradient graph.

    ``given``: what q, k, v, bias and sink were made of, None where there is none; ``others``: what
    else was read, kept so that PyTorch notices changes.
    """
    from sparseattn.integrations.torch import record

    for name, x in given.items():
        if name in ("q", "k", "v") and not is_torch(x):
            raise ArgumentError(f"{name} is no tensor and others require grad: convert {name}")
    constants = {name: None if is_torch(x) else x for name, x in given.items()}
    ran = []

    def forward() -> Any:
        target = make_target(None, call.ops)
        lse, made, problem = run_once(call, target)
        ran.append((lse, made, problem))
        bare = problem._replace(bias=None, sink=None)
        pullback = functools.partial(pull_tensors, constants, made, bare)
        return (target.finish(call.ops), call.ops.give(lse)), pullback

    out, lse = record(forward, *given.values(), *others)
    return Recorded(out, lse, *ran[0])


class Recorded(NamedTuple):
    out: Any  # tensors
    lse: Any
    rows: Array  # the log-sum-exp as (batch, heads, n_q)
    plan: Plan
    problem: Problem


def pull_tensors(
    constants: dict[str, Any],
    made: Plan,
    bare: Problem,
    inputs: tuple[Any, ...],
    outputs: tuple[Any, ...],
    grads: tuple[Any, ...],
    wanted: tuple[bool, ...],
) -> list[Any]:
    """Gradients of ``inputs``, None where not wanted. The first of them have the names of
    ``constants``, which holds those that were no tensors."""
    given = {
        name: constants[name] if x is None else x
        for name, x in zip(constants, inputs, strict=False)
    }
    ops = read_operands(given["q"], given["k"], given["v"])
    bias, params = given["bias"], {SINK: given[SINK]}
    problem = bare._replace(
        bias=None if bias is None else spread("bias", read_bias(bias, ops), ops),
        sink=read_sink(params, ops),
    )
    out, lse = (to_array("out", x)[0] for x in outputs)
    rows = ops.q.shape[:3]
    state = State(ops, problem, made, out.reshape(*rows, ops.v.shape[3]), lse.reshape(rows))
    likes = {
        name: like(name, x) for (name, x), want in zip(given.items(), wanted, strict=False) if want
    }
    found = pull(state, likes, *read_gradients(ops, *grads))
    return [found.get(name) for name in given] + [None] * (len(inputs) - len(given))


# ---- what goes in and comes out ------------------------------------------------------------------


class Like(NamedTuple):
    """Shape, dtype and kind of an argument, which its gradient has too."""

    shape: tuple[int, ...]
    stored: str
    torch: bool

    def give(self, grad: Array, lead: tuple[int, ...]) -> Any:
        """From (batch or 1, ...), summed over what was broadcast."""
        whole = grad.shape[0] == math.prod(lead)
        grad = grad.reshape((lead if whole else (1,) * len(lead)) + grad.shape[1:])
        grad = reduce_to(grad, self.shape).astype(real_type(self.stored), copy=False)
        return dress(grad, self.stored, self.torch)


def like(name: str, x: Any) -> Like:
    array, stored = to_array(name, x)
    return Like(array.shape, stored, is_torch(x))


def reduce_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes that an array of ``shape`` was broadcast along."""
    extra = x.ndim - len(shape)
    axes = tuple(i for i in range(x.ndim) if i < extra or x.shape[i] != shape[i - extra])
    return x.sum(axes).reshape(shape) if axes else x


def read_gradients(ops: Operands, dout: Any, dlse: Any) -> tuple[Array | None, Array | None]:
    """dout (batch, heads, n_q, dim_v) as q is stored, dlse (batch, heads, n_q) in the real type."""
    shape, real = ops.out_shape, ops.real
    if dout is not None:
        dout = read_gradient("dout", dout, "out", shape, ops.stored, ops.q.dtype)
        dout = collapse(dout, ops.lead)
    if dlse is not None:
        dlse = read_gradient("dlse", dlse, "lse", shape[:-1], real.name, real)
        dlse = dlse.reshape(ops.q.shape[:3])
    return dout, dlse


def read_gradient(
    name: str, x: Any, of: str, shape: tuple[int, ...], stored: str, dtype: np.dtype[Any]
) -> Array:
    array, given = to_array(name, x)
    if array.shape != shape:
        raise ArgumentError(f"{name} must have shape {shape} as {of} has, got {array.shape}")
    if given != stored:
        convert = f"{name}.to({of}.dtype)" if is_torch(x) else cast(name, x, f"{of}.dtype", "")
        raise DtypeError(
            f"{name} must have dtype {stored} as {of} has, got {given}: pass {convert}"
        )
    return as_real(name, array, dtype)


# ---- the pass back -------------------------------------------------------------------------------


class Pass(NamedTuple):
    """One pass back: what the core reads, and where it writes (None: not wanted)."""

    q: Array
    k: Array
    v: Array
    problem: Problem
    dout: Array | None  # None: zeros
    dlse: Array | None
    lse: Array
    delta: Array  # <dout, out> - dlse
    dq: Array | None = None  # dq, dk, dv: in the real type
    dk: Array | None = None
    dv: Array | None = None
    dbias: Array | None = None  # (batch, heads, n_q, n_k), added to; strides 0 where broadcast

    def over(self, core: _core.Plan) -> None:
        into = (self.dq, self.dk, self.dv, self.dbias)
        if any(x is not None for x in into):
            read = (self.dout, self.lse, self.delta)
            _core.attend_grad(self.q, self.k, self.v, core, self.problem, *read, *into)

    def of_piece(self, piece: Piece, group: int) -> Pass:
        """The same for the heads of one piece of a plan."""
        heads, kv = slice(piece.begin, piece.end), slice(*piece.kv_range(group))
        cut = {
            name: x[:, kv if name in ("k", "v", "dk", "dv") else heads]
            for name, x in self._asdict().items()
            if isinstance(x, np.ndarray)
        }
        return self._replace(problem=self.problem.of_heads(piece.begin, piece.end), **cut)


def pull(
    state: State, likes: dict[str, Like], dout: Array | None, dlse: Array | None
) -> dict[str, Any]:
    """Gradients by the names of ``likes``: q, k, v, bias, sink."""
    ops, problem, made, out, lse = state
    sums: dict[str, Array] = {}
    into: dict[str, Array] = {}
    for name in likes:
        if name == "bias":
            sums[name], into["dbias"] = bias_sums(likes[name].shape, ops)
        elif name == SINK:
            sums[name] = np.zeros((1, ops.q.shape[1]))
        else:
            shape = getattr(ops, name).shape
            sums[name] = into[f"d{name}"] = empty(f"d{name}", shape, ops.real)
    delta = delta_of(out, dout, dlse, lse)
    back = Pass(ops.q, ops.k, ops.v, problem, dout, dlse, lse, delta, **into)
    pull_pieces(made, back, sums.get(SINK))
    return {name: likes[name].give(x, ops.lead) for name, x in sums.items()}


def bias_sums(shape: tuple[int, ...], ops: Operands) -> tuple[Array, Array]:
    """Zeros to add a bias's gradient to, one for each of its elements, and their view over
    (batch, heads, n_q, n_k)."""
    full = ops.score_shape
    shape = (1,) * (len(ops.lead) + 3 - len(shape)) + shape
    batch = 1 if all(size == 1 for size in shape[:-3]) else full[0]
    shape = (batch, *shape[-3:])
    real = ops.real if shape == full else np.dtype(np.float64)  # sums over many rows
    with enough_memory("dbias", shape, real):
        sums = np.zeros(shape, real)
    strides = [0 if n == 1 else step for n, step in zip(sums.shape, sums.strides, strict=True)]
    return sums, np.lib.stride_tricks.as_strided(sums, full, strides)


def delta_of(out: Array, dout: Array | None, dlse: Array | None, lse: Array) -> Array:
    """<dout, out> - dlse of each row."""
    if dout is None:
        return np.zeros_like(lse) if dlse is None else -dlse
    delta = np.empty_like(lse)
    _core.attend_delta(out, dout, dlse, delta)
    return delta


def pull_pieces(made: Plan, back: Pass, dsink: Array | None) -> None:
    """Each piece over its own heads; where pieces share a kv head, its gradients add up."""
    written = 0  # kv heads
    for piece in made.pieces:
        mine = back if len(made.pieces) == 1 else back.of_piece(piece, made.group)
        low, high = piece.kv_range(made.group)
        if low < written:  # the piece lies within one kv group
            more = mine._replace(dk=empty_as(mine.dk), dv=empty_as(mine.dv))
            done = pull_piece(piece, more)
            add(mine.dk, more.dk)
            add(mine.dv, more.dv)
        else:
            done = pull_piece(piece, mine)
        written = high
        if dsink is not None:
            dsink[0, piece.begin : piece.end] = sink_gradient(done)


def pull_piece(piece: Piece, back: Pass) -> Pass:
    """The gradients of one piece; gives back the pass whose rows its sinks are in."""
    if piece.straight_through:
        # fwd: out = p_kept v; scores take the gradient of the row that sees all
        kept_pass(piece, back)._replace(dq=None, dk=None, dbias=None).over(piece.core)
        whole = dense_piece(back)
        out = np.empty((*back.lse.shape, back.v.shape[3]), back.q.dtype)
        lse = np.empty_like(back.lse)
        run_piece(whole, back.q, back.k, back.v, back.problem, out, lse)
        delta = delta_of(out, back.dout, back.dlse, lse)
        back = back._replace(dv=None, lse=lse, delta=delta)
        back.over(whole.core)
    elif piece.full_row:
        # fwd: out = sum over kept j of p_j v_j, p = exp(s - lse) of the row that sees all
        kept_pass(piece, back).over(piece.core)
        dense = dense_piece(back).core
        lse = row_lse(dense, back.q, back.k, back.problem)  # rounded as the scores are, see below
        rest = back._replace(
            dout=None, lse=lse, dq=empty_as(back.dq), dk=empty_as(back.dk), dv=None
        )
        rest.over(dense)
        add(back.dq, rest.dq)
        add(back.dk, rest.dk)
    else:
        back.over(piece.core)
    return back


def kept_pass(piece: Piece, back: Pass) -> Pass:
    """The pass over the kept keys. Where weights are those of the full row, they are taken as
    exp(s - lse_kept) times a mass: near scores of 1e4 the full lse of another call says little."""
    if not piece.full_row:
        return back
    problem = back.problem._replace(dropout_p=0.0)
    lse = row_lse(piece.core, back.q, back.k, problem._replace(sink=None))
    with np.errstate(all="ignore"):
        mass = kept_mass(piece, back.q, back.k, problem, lse.copy())[..., None]
        dout = widen(back.dout) if back.dout is not None and is_half(back.dout) else back.dout
        dout = None if dout is None else dout * mass
    return back._replace(dout=dout, lse=lse, delta=np.zeros_like(back.delta))


def dense_piece(back: Pass) -> Piece:
    """All that causality and masks show."""
    (piece,) = build(parse("dense"), back.q, back.k, back.problem, None)
    return piece


def sink_gradient(back: Pass) -> Array:
    """-sum_i exp(sink - lse_i) delta_i of each head."""
    # fwd: lse = log(exp(sink) + sum_j exp(s_j)), and the sink's value is 0
    sink = back.problem.sink
    assert sink is not None
    with np.errstate(all="ignore"):
        p = np.exp(sink[:, None] - back.lse)
        terms = np.where(np.isneginf(back.lse), p.dtype.type(0), p * back.delta)
    total: Array = -terms.sum((0, 2), dtype=np.float64)
    return total


def empty_as(x: Array | None) -> Array | None:
    return None if x is None else np.empty_like(x)


def add(x: Array | None, y: Array | None) -> None:
    if x is not None and y is not None:
        x += y
