"""Attention calls: the public functions, and how a plan is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparseattn import _core
from sparseattn.errors import ArgumentError, NotSupported
from sparseattn.inputs import (
    Operands,
    Target,
    check_params,
    collapse,
    empty,
    is_torch,
    make_operands,
    make_target,
    read_alike,
    read_bias,
    read_bool,
    read_causal,
    read_number,
    read_operands,
    read_problem,
    spread,
    to_array,
    to_real,
)
from sparseattn.plan import Plan, plan, refuse_keywords
from sparseattn.variants.base import Piece, Problem, Variant, parse
from sparseattn.weights import Weights, dense_weights

if TYPE_CHECKING:
    from sparseattn.variants.base import Array, Params

__all__ = [
    "Plan",
    "attend_with_plan",
    "attention",
    "merge",
    "plan",
    "scaled_dot_product_attention",
]

KEYWORDS = (
    *("params", "causal", "scale", "mask", "key_mask", "bias", "softcap", "dropout_p", "seed"),
    *("cu_seqlens", "cache", "return_lse", "return_weights", "out"),
)
DENSE_WEIGHTS = 1 << 22  # weights up to here come as an array


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
            pieces = spec.build(q, k, self.problem, params)
            shape = (*q.shape[:3], k.shape[2])
            made = Plan(pieces, self.problem, shape, k.shape[1], self.ops.lead, spec)
        self.plan = made
        need = self.want_lse or any(piece.full_row for piece in made.pieces)
        lse = empty("the log-sum-exp", q.shape[:3], q.dtype) if need else None
        out, self.target = self.target, None
        shape = (*q.shape[:3], v.shape[3])
        if out is None or out.shape != shape:  # a compose rule's further parts
            out = empty("the output", shape, q.dtype)
        run_pieces(made.pieces, q, k, v, self.problem, out, lse)
        return out, np.empty(0, q.dtype) if lse is None else lse


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
    _core.attend(q, k, v, piece.core, problem, out, lse)
    if piece.full_row and lse is not None:
        with np.errstate(all="ignore"):
            mass = kept_mass(piece, q, k, problem, lse)
            np.multiply(out, mass[..., None], out=out)


def kept_mass(piece: Piece, q: Array, k: Array, problem: Problem, lse: Array) -> Array:
    """exp(lse_kept - lse_full), which is P_post / P_pre (algorithms 4.1); lse becomes the full one.

    Both are taken relative to the lse given, so that large scores do not swallow the difference:
    one more column of q and k subtracts it from every score. A soft-cap bounds scores by itself.
    """
    shift = np.zeros_like(lse)
    if problem.softcap == 0:
        np.copyto(shift, lse, where=np.isfinite(lse))
        q = np.concatenate([q * q.dtype.type(problem.scale), -shift[..., None]], -1)
        k = np.concatenate([k, np.ones_like(k[..., :1])], -1)
        problem = problem._replace(scale=1.0)
    dense = _core.plan_build("dense", parse("dense"), None, q, k, problem)
    nothing = np.broadcast_to(np.zeros(1, q.dtype), (*k.shape[:3], 1))
    kept, full, ignored = np.empty_like(lse), np.empty_like(lse), np.empty((*lse.shape, 1), q.dtype)
    _core.attend(q, k, nothing, piece.core, problem, ignored, kept)
    _core.attend(q, k, nothing, dense, problem, ignored, full)
    np.add(full, shift, out=lse)
    mass: Array = np.where(np.isneginf(full), full.dtype.type(0), np.exp(kept - full))
    return mass


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
    return_weights: bool = False,
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
    spec : spec, str or Plan
        Which keys: ``sa.TopK(16)``, ``"window:64"``, a plan. None is dense.
    params : mapping of str to array
        Arrays that a variant needs, such as ``layout`` of ``BlockMask``.
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
    dropout_p, seed, cu_seqlens, cache
        Not in this version: values other than the defaults are refused.
    return_lse, return_weights : bool
        Add the log-sum-exp of each row in natural units, (..., heads, n_q); add the weights: an
        array (..., heads, n_q, n_k) of up to 2**22 entries, a ``Weights`` object beyond.
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
    refuse_later(dropout_p, cu_seqlens, cache)
    ops = read_operands(q, k, v)
    call = {"causal": causal, "mask": mask, "key_mask": key_mask}
    if isinstance(spec, Plan):
        refuse_with_plan(spec, call, params)
        call = {}
    problem = read_problem(ops, **call, scale=scale, bias=bias, softcap=softcap)
    target = make_target(out, ops, problem)
    want_lse = return_lse or return_weights
    lse, made, problem = run(ops, spec, params, problem, target, want_lse)
    result = target.finish(ops)
    if not want_lse:
        return result
    if not return_weights:
        return OutLse(result, ops.give(lse))
    weights = make_weights(ops, lse, problem, made)
    return (
        OutLseWeights(result, ops.give(lse), weights) if return_lse else OutWeights(result, weights)
    )


def run(
    ops: Operands, spec: Any, params: Any, problem: Problem, target: Target, want_lse: bool
) -> tuple[Array, Plan, Problem]:
    """Fill the target; the log-sum-exp, the plan that ran, and the problem it ran under."""
    if isinstance(spec, Plan):
        made = spec.for_call(ops)
        under = made.problem
        problem = problem._replace(causal=under.causal, mask=under.mask, key_mask=under.key_mask)
        eager = Eager(ops, problem, target.array, want_lse)
        result, lse = eager.attend(ops.q, ops.k, ops.v, made)
    else:
        variant = parse("dense" if spec is None else spec)
        taken = check_params(params, variant.arrays, variant)
        eager = Eager(ops, problem, target.array, want_lse)
        result, lse = variant.apply(eager, ops.q, ops.k, ops.v, taken)
    if result is not target.array:
        target.array[...] = result
    assert eager.plan is not None
    return lse, eager.plan, problem


def refuse_later(dropout_p: Any, cu_seqlens: Any, cache: Any) -> None:
    if not 0.0 <= read_number("dropout_p", dropout_p) < 1.0:
        raise ArgumentError(f"dropout_p must be in [0, 1), got {dropout_p}")
    later = {
        "dropout_p": (dropout_p != 0.0, "0.0"),
        "cu_seqlens": (cu_seqlens is not None, "one call a sequence, or mask="),
        "cache": (cache is not None, "all keys and values so far as k and v"),
    }
    for name, (given, instead) in later.items():
        if given:
            raise NotSupported(f"{name} comes in a later version: pass {instead}")


def refuse_with_plan(made: Plan, call: dict[str, Any], params: Any) -> None:
    """A plan already says who may see whom, so a second word about it must agree."""
    if call["causal"] is not False and read_causal(call["causal"]) != made.problem.causal:
        raise ArgumentError(
            f"causal={call['causal']!r} and the plan was made otherwise: "
            "make the plan with it, and leave it out here"
        )
    for name, value in {**call, "params": params}.items():
        if name != "causal" and value is not None:
            raise ArgumentError(
                f"{name} is part of a plan: give it to sa.plan(..., {name}=...), not to attention()"
            )


def make_weights(ops: Operands, lse: Array, problem: Problem, made: Plan) -> Any:
    batch, heads, n_q, n_k = ops.score_shape
    if batch * heads * n_q * n_k > DENSE_WEIGHTS:
        return Weights(ops.q, ops.k, lse, problem, made, ops.lead)
    mask = made.to_mask().reshape(ops.score_shape)
    return ops.give(dense_weights(ops.q, ops.k, lse, problem, mask), stored=True)


def attend_with_plan(
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
) -> tuple[Array, Array, Plan]:
    """out, log-sum-exp and the plan that ran: ``attention`` for the package's own use.

    >>> import numpy as np
    >>> x = np.ones((1, 2, 5, 4), np.float32)
    >>> attend_with_plan(x, x, x, "topk:2")[2].count().kept
    20
    """
    ops = read_operands(q, k, v)
    problem = read_problem(
        ops, causal=causal, scale=scale, mask=mask, key_mask=key_mask, bias=bias, softcap=softcap
    )
    target = make_target(None, ops)
    lse, made, _ = run(ops, spec, params, problem, target, True)
    return target.finish(ops), ops.give(lse), made


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    spec: Any = None,
) -> Any:
    """PyTorch's function of this name, semantics included, over the keys that ``spec`` keeps.

    Parameters
    ----------
    query, key, value : array, shape (..., n_q, dim), (..., n_k, dim), (..., n_k, dim_v)
        At least 2-D; axes before the last two broadcast. Dtypes as in :func:`attention`.
    attn_mask : array
        bool, True = may attend, or float, added to the scores; broadcasts to (..., n_q, n_k).
    dropout_p : float
        0 in this version.
    is_causal : bool
        Top-left aligned: query i sees key j iff ``j <= i``. Not together with ``attn_mask``.
    scale : float
        None is ``dim ** -0.5``.
    enable_gqa : bool
        Let heads of key and value divide those of query; without it the axes must broadcast.
    spec : spec, str or Plan
        None is dense.

    Returns
    -------
    array, shape (..., n_q, dim_v)
        Rows that may see nothing are 0.

    Raises
    ------
    ArgumentError, DtypeError, NotSupported
        As :func:`attention`.

    References
    ----------
    ``torch.nn.functional.scaled_dot_product_attention``.

    >>> import numpy as np, sparseattn as sa
    >>> x = np.eye(4, dtype=np.float32)[None]
    >>> sa.scaled_dot_product_attention(x, x, x, is_causal=True)[0, 0]
    array([1., 0., 0., 0.], dtype=float32)
    """
    refuse_later(dropout_p, None, None)
    if is_causal and attn_mask is not None:
        raise ArgumentError("is_causal=True and attn_mask= exclude each other: pass one of them")
    given = {"query": query, "key": key, "value": value}
    arrays, stored = read_alike(given, "(..., length, dim)")
    flat = all(array.ndim == 2 for array in arrays)
    arrays = grouped_heads(*arrays) if enable_gqa else broadcast_heads(*arrays)
    ops = make_operands(arrays, ("query", "key", "value"), stored, is_torch(query))
    problem = read_problem(ops, causal="top_left" if is_causal else False, scale=scale)
    if attn_mask is not None:
        array, _ = to_array("attn_mask", attn_mask)
        if array.dtype.kind == "f":
            problem = problem._replace(bias=spread("attn_mask", read_bias(attn_mask, ops), ops))
        else:
            array = read_bool("attn_mask", attn_mask, "pass bool or float")
            problem = problem._replace(mask=spread("attn_mask", array, ops))
    if isinstance(spec, Plan):
        causal = is_causal and "top_left"
        refuse_with_plan(spec, {"causal": causal, "attn_mask": problem.mask}, None)
    target = make_target(None, ops)
    run(ops, spec, None, problem, target, False)
    result = target.finish(ops)
    return result[0] if flat else result


def broadcast_heads(q: Array, k: Array, v: Array) -> list[Array]:
    """All axes before (length, dim) broadcast together, the last of them becoming heads."""
    arrays = [x[(None,) * max(0, 3 - x.ndim)] for x in (q, k, v)]
    heads = [x.shape[-3] for x in arrays]
    if max(heads) != min(heads) and 1 not in heads:
        raise ArgumentError(
            f"query, key, value have {heads[0]}, {heads[1]}, {heads[2]} heads: "
            "pass enable_gqa=True where key and value heads divide those of query"
        )
    shared = heads[1] == heads[2] == 1  # one kv head for all query heads: nothing to expand
    for at, x in enumerate(arrays):
        if x.shape[-3] == 1 and not (shared and at > 0):
            arrays[at] = np.broadcast_to(x, (*x.shape[:-3], max(heads), *x.shape[-2:]))
    return arrays


def grouped_heads(q: Array, k: Array, v: Array) -> list[Array]:
    """Key and value heads divide query heads, each on its own as in PyTorch."""
    if min(q.ndim, k.ndim, v.ndim) < 3:
        raise ArgumentError("enable_gqa=True needs (..., heads, length, dim) for query, key, value")
    heads = q.shape[-3]
    for name, x in (("key", k), ("value", v)):
        if x.shape[-3] == 0 or heads % x.shape[-3]:
            raise ArgumentError(
                f"the {x.shape[-3]} heads of {name} must divide the {heads} of query"
            )
    if k.shape[-3] != v.shape[-3]:
        k, v = (np.repeat(x, heads // x.shape[-3], axis=-3) for x in (k, v))
    return [q, k, v]


def merge(parts: Sequence[Any]) -> OutLse:
    """Join attention outputs over disjoint key sets as if over all keys at once.

    ``L = logsumexp_a L_a``, ``out = sum_a exp(L_a - L) out_a`` (algorithms 0.8); parts that are
    ``-inf`` everywhere add nothing.

    Parameters
    ----------
    parts : list of (out, lse)
        out (..., heads, n_q, dim_v), lse (..., heads, n_q) in natural units, of one shape and
        dtype; results of ``attention(..., return_lse=True)`` or of ``merge``.

    Returns
    -------
    OutLse
        NamedTuple of ``out`` and ``lse``.

    Raises
    ------
    ArgumentError, DtypeError
        If there is no part, or shapes or dtypes differ.

    References
    ----------
    Dao, "FlashAttention-2", 2023, arXiv:2307.08691 (split keys); Milakov and Gimelshein, 2018.

    >>> import numpy as np, sparseattn as sa
    >>> x = np.random.default_rng(0).standard_normal((2, 9, 4))
    >>> ab = [sa.attention(x, x[:, s], x[:, s], return_lse=True) for s in np.s_[:5, 5:]]
    >>> bool(np.allclose(sa.merge(ab).out, sa.attention(x, x, x)))
    True
    """
    pairs = [tuple(part) for part in parts]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ArgumentError(f"merge takes a list of (out, lse), got {len(pairs)} parts not so made")
    given = {f"parts[{i}][0]": pair[0] for i, pair in enumerate(pairs)}
    outs, stored = read_alike(given, "(..., heads, n_q, dim_v)")
    lses = [to_real(f"parts[{i}][1]", pair[1])[0] for i, pair in enumerate(pairs)]
    shape = outs[0].shape
    for i, (o, lse) in enumerate(zip(outs, lses, strict=True)):
        if o.shape != shape or lse.shape != shape[:-1]:
            raise ArgumentError(
                f"parts[{i}] has shapes {o.shape} and {lse.shape}: "
                f"all must have {shape} and {shape[:-1]}"
            )
    ops = make_operands([outs[0]] * 3, ("parts", "parts", "parts"), stored, is_torch(pairs[0][0]))
    out, lse = np.empty(ops.q.shape, ops.q.dtype), np.empty(ops.q.shape[:3], ops.q.dtype)
    lead = ops.lead
    flat_outs = tuple(collapse(o, lead) for o in outs)
    flat_lses = tuple(np.ascontiguousarray(x, dtype=lse.dtype).reshape(lse.shape) for x in lses)
    _core.merge(flat_outs, flat_lses, out, lse)
    return OutLse(ops.give(out, stored=True), ops.give(lse))
