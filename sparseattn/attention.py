"""Attention calls: the public functions, and how a plan is run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparseattn import _core
from sparseattn.errors import ArgumentError, door
from sparseattn.half import is_half, real_type, store, widen
from sparseattn.inputs import (
    SINK,
    Operands,
    Target,
    check_params,
    empty,
    make_target,
    needs_grad,
    read_causal,
    read_operands,
    read_problem,
    sink_of,
)
from sparseattn.packed import build, read_cu_seqlens
from sparseattn.plan import Plan, plan, refuse_keywords
from sparseattn.variants.base import Piece, Problem, Variant, parse
from sparseattn.weights import make_weights, read_wanted

if TYPE_CHECKING:
    from sparseattn.variants.base import Array, Params

__all__ = ["Plan", "attend_with_plan", "attention", "plan"]

KEYWORDS = (
    *("params", "causal", "scale", "mask", "key_mask", "bias", "softcap", "dropout_p", "seed"),
    *("cu_seqlens", "cache", "return_lse", "return_weights", "out"),
)
NEAR = 32.0  # log-sum-exps up to which it does not matter that tiles and rows round scores apart


class OutLse(NamedTuple):
    """Output (..., heads, n_q, dim_v) and log-sum-exp (..., heads, n_q)."""

    out: Any
    lse: Any

    @property
    def weights(self) -> None:
        return None


class OutWeights(NamedTuple):
    """Output (..., heads, n_q, dim_v) and weights."""

    out: Any
    weights: Any

    @property
    def lse(self) -> None:
        return None


class OutLseWeights(NamedTuple):
    """Output (..., heads, n_q, dim_v), log-sum-exp (..., heads, n_q) and weights."""

    out: Any
    lse: Any
    weights: Any


class Eager:
    """The operators of ``Variant.apply``, run at once; remembers the plan of the last attend."""

    def __init__(self, ops: Operands, problem: Problem, target: Array, want_lse: bool) -> None:
        self.ops, self.problem = ops, problem
        self.target: Array | None = target  # for the first output of its shape
        self.want_lse = want_lse
        self.plan: Plan | None = None

    def attend(
        self, q: Array, k: Array, v: Array, spec: Variant | Plan, params: Params | None = None
    ) -> tuple[Array, Array]:
        if isinstance(spec, Plan):
            made = spec.for_call(self.ops)
        else:
            pieces = build(spec, q, k, self.problem, params)
            shape = (*q.shape[:3], k.shape[2])
            made = Plan(pieces, self.problem, shape, k.shape[1], self.ops.lead, spec)
        self.plan = made
        need = self.want_lse or any(piece.full_row for piece in made.pieces)
        real = real_type(q.dtype)
        lse = empty("the log-sum-exp", q.shape[:3], real) if need else None
        out, self.target = self.target, None
        shape = (*q.shape[:3], v.shape[3])
        if out is None or out.shape != shape or out.dtype not in (q.dtype, real):
            out = empty("the output", shape, real)  # a compose rule's further parts
        run_pieces(made.pieces, q, k, v, self.problem, out, lse)
        return out, np.empty(0, real) if lse is None else lse


def run_pieces(
    pieces: tuple[Piece, ...],
    q: Array,
    k: Array,
    v: Array,
    problem: Problem,
    out: Array,
    lse: Array | None,
) -> None:
    """Each piece over its own heads, one call after the other; most plans have one piece."""
    group = max(1, q.shape[1] // max(1, k.shape[1]))
    if len(pieces) == 1:
        run_piece(pieces[0], q, k, v, problem, out, lse)
        return
    for piece in pieces:
        low, high = piece.kv_range(group)
        heads, kv = slice(piece.begin, piece.end), slice(low, high)
        run_piece(
            piece,
            q[:, heads],
            k[:, kv],
            v[:, kv],
            problem.of_heads(piece.begin, piece.end),
            out[:, heads],
            None if lse is None else lse[:, heads],
        )


def run_piece(
    piece: Piece, q: Array, k: Array, v: Array, problem: Problem, out: Array, lse: Array | None
) -> None:
    """One piece over its own heads; with ``full_row`` its weights are those of the full row."""
    if not piece.full_row or lse is None:
        _core.attend(q, k, v, piece.core, problem, out, lse)
        return
    wide = out if out.dtype == lse.dtype else empty("the output", out.shape, lse.dtype)
    _core.attend(q, k, v, piece.core, problem._replace(sink=None), wide, lse)
    with np.errstate(all="ignore"):
        mass = kept_mass(piece, q, k, problem._replace(dropout_p=0.0), lse)
        np.multiply(wide, mass[..., None], out=wide)
    if wide is not out:
        store(out, wide)


def kept_mass(piece: Piece, q: Array, k: Array, problem: Problem, lse: Array) -> Array:
    """exp(lse_kept - lse_full), which is P_post / P_pre (algorithms 4.1); lse becomes the full one.

    Both are taken relative to the lse given, so that large scores do not swallow the difference:
    one more column of q and k subtracts it from every score. A soft-cap bounds scores by itself.
    A sink is in the full row's sum only.
    """
    sink, problem = problem.sink, problem._replace(sink=None)
    shift = np.zeros_like(lse)
    if problem.softcap == 0:
        np.copyto(shift, lse, where=np.isfinite(lse))
        scaled = (widen(q) if is_half(q) else q) * lse.dtype.type(problem.scale)
        q = with_column(scaled, -shift[..., None])
        k = with_column(k, np.ones(1, real_type(k.dtype)))
        problem = problem._replace(scale=1.0)
    ((dense, *_),) = build(parse("dense"), q, k, problem, None)
    kept, full = (row_lse(core, q, k, problem) for core in (piece.core, dense))
    far = np.abs(shift) > NEAR
    if far.any():  # the same keys as dense, but row by row as the kept ones are
        rows = _core.plan_combine(dense, piece.core, "union")
        np.copyto(full, row_lse(rows, q, k, problem), where=far)
    if sink is not None:
        full = np.logaddexp(full, sink[:, None] - shift)
    np.add(full, shift, out=lse)
    mass: Array = np.where(np.isneginf(full), full.dtype.type(0), np.exp(kept - full))
    return mass


def with_column(x: Array, column: Array) -> Array:
    """One more channel, in rows without gaps whatever the strides of ``x``."""
    wide = np.empty((*x.shape[:3], x.shape[3] + 1), x.dtype)
    wide[..., :-1] = x
    store(wide[..., -1:], column)
    return wide


def row_lse(core: _core.Plan, q: Array, k: Array, problem: Problem) -> Array:
    """The log-sum-exp alone of attention over a plan."""
    real = real_type(q.dtype)
    nothing = np.broadcast_to(np.zeros(1, real), (*k.shape[:3], 1))
    ignored, lse = np.empty((*q.shape[:3], 1), real), np.empty(q.shape[:3], real)
    _core.attend(q, k, nothing, core, problem._replace(dropout_p=0.0), ignored, lse)
    return lse


@door
def attention(
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
    cache: Any = None,
    return_lse: bool = False,
    return_weights: bool | str = False,
    out: Any = None,
    **wrong: Any,
) -> Any:
    """Softmax attention over the keys that a spec keeps.

    ``s_ij = softcap(scale q_i.k_j) + bias_ij``, ``p_i = softmax`` over the keys that row i keeps,
    ``out_i = sum_j p_ij v_j``. A row that keeps none is 0, with log-sum-exp ``-inf``.

    Parameters
    ----------
    q, k, v : array
        Shapes (..., heads, n_q, dim), (..., kv_heads, n_k, dim), (..., kv_heads, n_k, dim_v). One
        dtype: float32, float64, or float16 and bfloat16 (computed in float32). ``kv_heads``
        divides ``heads``. NumPy arrays, torch CPU tensors, anything with ``__array__`` or DLPack.
        Through tensors gradients flow, to ``bias`` and ``params["sink"]`` as well; of arrays,
        :func:`attention_vjp` gives them.
    spec : spec, str or Plan
        Which keys: ``sa.TopK(16)``, ``"window:64"``, a plan. None is dense.
    params : mapping of str to array
        Arrays that a variant needs, such as ``layout`` of ``BlockMask``. Any spec takes ``sink``,
        shape (heads,): the score of one more key, whose value is 0, in each row's softmax; a row
        that keeps no key then has log-sum-exp ``sink``.
    causal : False, True, "bottom_right" or "top_left"
        True is bottom-right: query i sees key j iff ``j <= i + n_k - n_q``.
    scale : float
        None is ``dim ** -0.5``.
    mask : array of bool
        True = may attend; broadcasts to (..., heads, n_q, n_k). Applies before any selection.
    key_mask : array of bool, shape (batch, n_k)
        True for the keys that are there (padding is False).
    bias : array of float
        Added to scores after scaling and soft-cap; broadcasts like ``mask``.
    softcap : float
        ``c tanh(s / c)`` of the scaled scores; None or 0 is none.
    dropout_p : float
        Share of the weights that become 0, the others growing by ``1 / (1 - dropout_p)``.
    seed : int
        Which they are: the same seed drops the same weights. None draws one for this call, for
        tensors by PyTorch's generator.
    cu_seqlens : array of int, shape (sequences + 1,), or a pair (cu_q, cu_k) of them
        Several sequences packed on the length axis: where each begins, then the length; rising
        from 0. Rows see their own sequence alone, and positions, causality, windows, sinks and
        selections begin anew in each. Sequences of length 0 are legal.
    cache : Cache
        Keys and values of the tokens so far: ``k`` and ``v`` are appended, then ``q`` attends to
        all of them. ``mask`` and ``bias`` have a column for each of these, ``key_mask`` for each or
        for the new ones. Without gradients, dropout, ``cu_seqlens`` and weights.
    return_lse : bool
        Add the log-sum-exp of each row in natural units, (..., heads, n_q).
    return_weights : bool or str
        Add the weights before dropout. True: an array (..., heads, n_q, n_k) of up to 2**22
        entries, a ``Weights`` beyond. ``"topn:16"``: the 16 largest of each row as ``TopWeights``,
        ``values`` and int64 ``indices`` of shape (..., heads, n_q, 16), downwards, equal ones by
        key upwards; past the keys that a row keeps, weight 0 and index -1. ``"mass"``: what each
        key received over all rows, (..., heads, n_k). Neither ever holds n_q x n_k numbers; both
        are float64 for float64 inputs, else float32.
    out : array
        Where to put the output; must not overlap an input.

    Returns
    -------
    array, shape (..., heads, n_q, dim_v)
        In the kind and dtype of ``q``; a NamedTuple of ``out`` and what else was asked for.

    Raises
    ------
    ArgumentError, DtypeError, UnknownArgument, NotSupported
        Subclasses of ValueError, TypeError, TypeError and NotImplementedError; each message names
        the argument, the value and the remedy.

    References
    ----------
    Vaswani et al., 2017, arXiv:1706.03762; Dao et al., "FlashAttention", 2022, arXiv:2205.14135.

    >>> import numpy as np, sparseattn as sa
    >>> q = k = v = np.random.default_rng(0).standard_normal((1, 8, 100, 64), np.float32)
    >>> sa.attention(q, k, v, "window:16+topk:8", causal=True).shape
    (1, 8, 100, 64)
    """
    refuse_keywords("attention", wrong, KEYWORDS)
    wanted = read_wanted(return_weights)
    if cache is not None:
        from sparseattn.decode import attend_cached  # which stands on this module

        return attend_cached(
            *(cache, q, k, v, spec),
            params=params,
            causal=causal,
            scale=scale,
            mask=mask,
            key_mask=key_mask,
            bias=bias,
            softcap=softcap,
            dropout_p=dropout_p,
            cu_seqlens=cu_seqlens,
            return_lse=return_lse,
            return_weights=return_weights,
            out=out,
        )
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
    want_lse = bool(return_lse or wanted.kind)
    given = {"q": q, "k": k, "v": v, "bias": bias, SINK: sink_of(params)}
    if needs_grad(*given.values()):
        from sparseattn.gradients import run_recorded  # which stands on this module

        if out is not None:
            raise ArgumentError("out= takes no gradients: leave it out, or use torch.no_grad()")
        result, lse, rows, made, problem = run_recorded(call, given, (mask, key_mask))
    else:
        target = make_target(out, ops, call.problem)
        rows, made, problem = run(*call, target, want_lse)
        result = target.finish(ops)
        lse = ops.give(rows) if return_lse else None
    if not wanted.kind:
        return OutLse(result, lse) if return_lse else result
    weights = make_weights(wanted, ops, rows, problem, made)
    return OutLseWeights(result, lse, weights) if return_lse else OutWeights(result, weights)


class Call(NamedTuple):
    """An attention call that has passed the door; the sinks of its params are in the problem."""

    ops: Operands
    spec: Any
    params: Any
    problem: Problem


def read_call(
    q: Any,
    k: Any,
    v: Any,
    spec: Any,
    *,
    params: Any = None,
    causal: Any = False,
    mask: Any = None,
    key_mask: Any = None,
    cu_seqlens: Any = None,
    **terms: Any,
) -> Call:
    """``terms``: what else :func:`read_problem` takes."""
    ops = read_operands(q, k, v)
    sight = {"causal": causal, "mask": mask, "key_mask": key_mask}
    if isinstance(spec, Plan):
        refuse_with_plan(spec, {**sight, "cu_seqlens": cu_seqlens}, params)
        sight, cu_seqlens = {}, None
    problem = read_problem(ops, **sight, params=params, **terms)
    if cu_seqlens is not None:
        offsets = read_cu_seqlens(cu_seqlens, ops.q.shape[2], ops.k.shape[2])
        problem = problem._replace(cu_seqlens=offsets)
    return Call(ops, spec, params, problem)


def run(
    ops: Operands, spec: Any, params: Any, problem: Problem, target: Target, want_lse: bool
) -> tuple[Array, Plan, Problem]:
    """Fill the target; the log-sum-exp, the plan that ran, and the problem it ran under."""
    if isinstance(spec, Plan):
        made = spec.for_call(ops)
        under = made.problem
        problem = problem._replace(
            causal=under.causal,
            mask=under.mask,
            key_mask=under.key_mask,
            cu_seqlens=under.cu_seqlens,
        )
        eager = Eager(ops, problem, target.array, want_lse)
        result, lse = eager.attend(ops.q, ops.k, ops.v, made)
    else:
        variant = parse("dense" if spec is None else spec)
        taken = check_params(params, variant.arrays, variant)
        eager = Eager(ops, problem, target.array, want_lse)
        result, lse = variant.apply(eager, ops.q, ops.k, ops.v, taken)
    if result is not target.array:
        store(target.array, result)
    assert eager.plan is not None
    return lse, eager.plan, problem


def refuse_with_plan(made: Plan, call: dict[str, Any], params: Any) -> None:
    """A plan already says who may see whom, so a second word about it must agree."""
    if call["causal"] is not False and read_causal(call["causal"]) != made.problem.causal:
        raise ArgumentError(
            f"causal={call['causal']!r} and the plan was made otherwise: "
            "make the plan with it, and leave it out here"
        )
    arrays = None if params is None or set(params) == {SINK} else params
    for name, value in {**call, "params": arrays}.items():
        if name != "causal" and value is not None:
            raise ArgumentError(
                f"{name} is part of a plan: give it to sa.plan(..., {name}=...), not to attention()"
            )


def attend_with_plan(
    q: Any, k: Any, v: Any, spec: Any = None, **terms: Any
) -> tuple[Array, Array, Plan]:
    """out, log-sum-exp and the plan that ran: ``attention`` for the package's own use.

    >>> import numpy as np
    >>> x = np.ones((1, 2, 5, 4), np.float32)
    >>> attend_with_plan(x, x, x, "topk:2")[2].count().kept
    20
    """
    call = read_call(q, k, v, spec, **terms)
    target = make_target(None, call.ops)
    lse, made, _ = run(*call, target, True)
    return target.finish(call.ops), call.ops.give(lse), made
