"""Hugging Face transformers models whose attention is a spec of ours, for the time of a block.

transformers asks two registries by name: one for the function that attends, one for the function
that makes its mask. A name that only the first one knows gets no mask at all, and causality and
padding are lost without a word; so both are registered. The mask function answers with the padding
mask alone where a mask is no more than causality and padding, which spares the matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import transformers
from transformers import masking_utils

from sparseattn.attention import attention
from sparseattn.errors import ArgumentError, NotSupported
from sparseattn.variants import Variant, parse

if TYPE_CHECKING:
    import torch

NAME = "sparseattn"
SPEC = "_sparseattn_spec"  # on a model's modules while it is in use
MASKED = -1e30  # a float mask's entries below are no bias


@contextlib.contextmanager
def use(model: transformers.PreTrainedModel, spec: Variant) -> Iterator[None]:
    """Let all attention of the model keep what `spec` keeps; see ``sparseattn.use``."""
    transformers.AttentionInterface.register(NAME, attend)
    masking_utils.AttentionMaskInterface.register(NAME, make_mask)
    modules = list(model.modules())
    specs = [(module, module.__dict__.get(SPEC)) for module in modules]
    configs = [m.config for m in modules if isinstance(m, transformers.PreTrainedModel)]
    names = [(config, config._attn_implementation) for config in configs]
    try:
        for module in modules:
            module.__dict__[SPEC] = spec
        model.set_attn_implementation(NAME)
        left = {type(c).__name__ for c in configs if c._attn_implementation != NAME}
        if left:
            raise NotSupported(
                f"{', '.join(sorted(left))} does not let its attention be replaced: use a model "
                "that goes through transformers' AttentionInterface"
            )
        yield
    finally:
        for config, name in names:
            config._attn_implementation = name
        for module, before in specs:
            if before is None:
                module.__dict__.pop(SPEC, None)
            else:
                module.__dict__[SPEC] = before


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What transformers calls: (batch, heads, length, dim) in, (batch, length, heads, dim) out."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    sight = read_sight(attention_mask, query.shape[2], key.shape[2], is_causal)
    bias = sight.bias
    if position_bias is not None:
        position_bias = position_bias[..., : sight.n_k]
        bias = position_bias if bias is None else bias + position_bias
    result = attention(
        *(query, key[:, :, : sight.n_k], value[:, :, : sight.n_k]),
        spec_of(module),
        params=None if s_aux is None else {"sink": s_aux.to(query.dtype)},
        causal=sight.causal,
        scale=scaling,
        mask=sight.mask,
        key_mask=sight.key_mask,
        bias=bias,
        softcap=softcap,
        dropout_p=dropout,
        return_weights=output_attentions,
    )
    out, weights = (result.out, result.weights) if output_attentions else (result, None)
    if weights is not None and not hasattr(weights, "shape"):
        raise NotSupported(
            "output_attentions=True asks for weights that are too large for one array: shorten "
            "the input, or call sa.attention(..., return_weights=True) yourself"
        )
    return out.transpose(1, 2).contiguous(), weights


def spec_of(module: Any) -> Variant:
    """The spec of a module's layer; dense where the name is set without `use`."""
    spec: Variant = getattr(module, SPEC, None) or parse("dense")
    layer = getattr(module, "layer_idx", None)
    if layer is None and spec.layer(0) != spec:
        raise NotSupported(
            f"{type(module).__name__} does not say which layer it is, and {spec} differs by "
            "layer: use one spec for all"
        )
    return spec.layer(layer or 0)


# ---- masks ---------------------------------------------------------------------------------------


class Sight(NamedTuple):
    """What a mask came to, for the first `n_k` keys."""

    n_k: int
    causal: bool
    mask: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def make_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' own mask, or (batch, keys) where padding is all that causality leaves to say.

    Older versions name other arguments; they get the whole matrix.
    """
    causal = masking_utils.causal_mask_function
    if kwargs.get("mask_function", causal) is causal and "q_length" in kwargs:
        n_q, n_k = kwargs["q_length"], kwargs["kv_length"]
        first = int(kwargs.get("kv_offset", 0))
        if int(kwargs.get("q_offset", 0)) + n_q == first + n_k:  # the queries are the last keys
            return padding(kwargs.get("attention_mask"), kwargs["batch_size"], n_q, first, n_k)
    return masking_utils.sdpa_mask(*args, **kwargs)


def padding(
    given: torch.Tensor | None, batch: int, n_q: int, first: int, n_k: int
) -> torch.Tensor | None:
    """(batch, n_k), True for keys that are there; None where the shapes alone say enough."""
    import torch

    if given is None:
        return None if n_q in (1, n_k) else torch.ones(batch, n_k, dtype=torch.bool)
    short = first + n_k - given.shape[1]
    if short > 0:
        given = torch.nn.functional.pad(given, (0, short))
    there = given[:, first : first + n_k].bool()
    return padding(None, batch, n_q, first, n_k) if bool(there.all()) else there


def read_sight(mask: torch.Tensor | None, n_q: int, n_k: int, is_causal: bool) -> Sight:
    """What may be seen, in our words."""
    if mask is None:
        # an empty static cache: the keys behind the queries are not there yet
        return Sight(n_q if is_causal and n_q > 1 else n_k, is_causal)
    if mask.ndim == 2:
        return Sight(n_k, True, key_mask=None if bool(mask.all()) else mask)
    if mask.ndim != 4:
        raise ArgumentError(
            f"attention_mask has shape {tuple(mask.shape)}: give (batch, keys), or (batch, heads, "
            "queries, keys)"
        )
    known: Sight | None = getattr(mask, "_sparseattn_sight", None)
    if known is None:
        known = matrix_sight(mask, n_q)
        mask._sparseattn_sight = known  # type: ignore[attr-defined, unused-ignore]  # all layers get the same tensor
    return known


def matrix_sight(mask: torch.Tensor, n_q: int) -> Sight:
    """A matrix of bool, or of numbers to add; keys behind the last one seen are left out.

    With them gone, as for a static cache that is partly filled, queries stand at the last keys.
    """
    import torch

    bias = None
    if mask.dtype != torch.bool:
        visible = mask > MASKED
        bias = mask.masked_fill(~visible, 0)
        bias = None if bool((bias == 0).all()) else bias
        mask = visible
    seen = mask.flatten(0, 2).any(0).nonzero()
    n_k = int(seen[-1]) + 1 if len(seen) else mask.shape[-1]
    mask = mask[..., :n_k]
    before = torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)
    causal = not bool((mask & ~before).any())
    return Sight(n_k, causal, mask, bias=None if bias is None else bias[..., :n_k])
