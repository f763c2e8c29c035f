"""PyTorch's scaled_dot_product_attention, signature and semantics, over sparse plans."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparseattn.attention import Call, refuse_with_plan, run
from sparseattn.errors import ArgumentError, door
from sparseattn.gradients import run_recorded
from sparseattn.half import HALF
from sparseattn.inputs import (
    SINK,
    is_torch,
    make_operands,
    make_target,
    needs_grad,
    read_alike,
    read_bias,
    read_bool,
    read_problem,
    spread,
    to_array,
)
from sparseattn.plan import Plan

__all__ = ["scaled_dot_product_attention"]


@door
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
        Share of the weights that become 0, the others growing by ``1 / (1 - dropout_p)``; another
        draw each call.
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
    if is_causal and attn_mask is not None:
        raise ArgumentError("is_causal=True and attn_mask= exclude each other: pass one of them")
    given = {"query": query, "key": key, "value": value}
    arrays, stored = read_alike(given, "(..., length, dim)")
    flat = all(array.ndim == 2 for array in arrays)
    align = grouped_heads if enable_gqa else broadcast_heads
    ops = make_operands(align(*arrays), ("query", "key", "value"), stored, is_torch(query))
    causal = "top_left" if is_causal else False
    problem = read_problem(ops, causal=causal, scale=scale, dropout_p=dropout_p)
    if attn_mask is not None:
        array, stored = to_array("attn_mask", attn_mask)
        if stored in HALF or array.dtype.kind == "f":
            problem = problem._replace(bias=spread("attn_mask", read_bias(attn_mask, ops), ops))
        else:
            array = read_bool("attn_mask", attn_mask, "pass bool or float")
            problem = problem._replace(mask=spread("attn_mask", array, ops))
    if isinstance(spec, Plan):
        refuse_with_plan(spec, {"causal": causal, "attn_mask": problem.mask}, None)
    if needs_grad(query, key, value, attn_mask):
        tensors = align(query, key, value)
        given = dict(zip(("q", "k", "v"), tensors, strict=True))
        given |= {"bias": None if problem.bias is None else attn_mask, SINK: None}
        others = (attn_mask,) if problem.bias is None else ()
        result = run_recorded(Call(ops, spec, None, problem), given, others).out
    else:
        target = make_target(None, ops)
        run(ops, spec, None, problem, target, False)
        result = target.finish(ops)
    return result[0] if flat else result


def broadcast_heads(q: Any, k: Any, v: Any) -> list[Any]:
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
            shape = (*x.shape[:-3], max(heads), *x.shape[-2:])
            arrays[at] = x.expand(shape) if is_torch(x) else np.broadcast_to(x, shape)
    return arrays


def grouped_heads(q: Any, k: Any, v: Any) -> list[Any]:
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
        k, v = (repeat_heads(x, heads // x.shape[-3]) for x in (k, v))
    return [q, k, v]


def repeat_heads(x: Any, times: int) -> Any:
    return x.repeat_interleave(times, -3) if is_torch(x) else np.repeat(x, times, axis=-3)
