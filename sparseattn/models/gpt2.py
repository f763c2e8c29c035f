"""GPT-2: learned positions, layer norm, one fused projection, weights stored (in, out).

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; names and defaults as
in Hugging Face's ``GPT2LMHeadModel``.
"""

from __future__ import annotations

import math

from sparseattn.models.common import Config, Family
from sparseattn.models.fields import (
    ACTIVATIONS,
    MAX_CONTEXT,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_LAYERS,
    MAX_VOCAB,
    Fields,
)


def read_config(fields: Fields) -> Config:
    """GPT-2's config.json; absent entries mean what they mean in transformers."""
    hidden = fields.integer("n_embd", 768, 1, MAX_HIDDEN)
    heads = fields.integer("n_head", 12, 1, MAX_HEADS)
    layers = fields.integer("n_layer", 12, 1, MAX_LAYERS)
    if hidden % heads:
        raise fields.fail("n_embd", f"is {hidden}: give a multiple of n_head, which is {heads}")
    if fields.flag("add_cross_attention", False):
        raise fields.fail("add_cross_attention", "is true: give a decoder without an encoder")
    scale = 1.0
    if fields.flag("scale_attn_weights", True):
        scale = 1.0 / math.sqrt(hidden // heads)
    by_layer = fields.flag("scale_attn_by_inverse_layer_idx", False)
    return Config(
        family="gpt2",
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=hidden // heads,
        hidden=hidden,
        inner=fields.integer("n_inner", 4 * hidden, 1, 8 * MAX_HIDDEN),
        vocab_size=fields.integer("vocab_size", 50257, 1, MAX_VOCAB),
        context=fields.integer("n_positions", 1024, 1, MAX_CONTEXT),
        eps=fields.number("layer_norm_epsilon", 1e-5, 0, 1),
        activation=fields.word("activation_function", "gelu_new", ACTIVATIONS),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=fields.flag("tie_word_embeddings", True),
        rope=None,
        scales=tuple(scale / (i + 1) if by_layer else scale for i in range(layers)),
        init_std=fields.number("initializer_range", 0.02, 0, 1),
    )


GPT2 = Family(
    name="gpt2",
    prefix="transformer.",
    embed="wte",
    positions="wpe",
    layer="h.{}.",
    norm1="ln_1",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    norm2="ln_2",
    gate=None,
    up="mlp.c_fc",
    down="mlp.c_proj",
    norm="ln_f",
    norm_kind="layer",
    weights="in_out",
    scaled_init=True,
    ignored=(".attn.bias", ".attn.masked_bias"),
    read_config=read_config,
)
