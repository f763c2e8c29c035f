"""LLaMA: rotate-half RoPE, RMS norm, SwiGLU, grouped-query attention.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023, arXiv:2302.13971;
names and defaults as in Hugging Face's ``LlamaForCausalLM``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

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
from sparseattn.models.rope import read_rope

# What absent entries mean; those of the families that are built alike differ in some of them.
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


def read_alike(fields: Fields, family: str, sizes: Mapping[str, int] = SIZES) -> Config:
    """The config.json of a family built like LLaMA, without biases and windows.

    An absent ``num_key_value_heads`` or ``head_dim`` is that of `sizes`, where it is there, and
    null follows from the other entries.
    """
    hidden = fields.integer("hidden_size", sizes["hidden_size"], 1, MAX_HIDDEN)
    heads = fields.integer("num_attention_heads", sizes["num_attention_heads"], 1, MAX_HEADS)

    def derived(name: str, otherwise: int) -> int:
        return otherwise if name in fields.values else sizes.get(name, otherwise)

    kv_heads = fields.integer(
        "num_key_value_heads", derived("num_key_value_heads", heads), 1, MAX_HEADS
    )
    layers = fields.integer("num_hidden_layers", sizes["num_hidden_layers"], 1, MAX_LAYERS)
    if heads % kv_heads:
        raise fields.fail(
            "num_key_value_heads",
            f"is {kv_heads}: give a divisor of num_attention_heads, which is {heads}",
        )
    head_dim = derived("head_dim", hidden // heads)
    if fields.values.get("head_dim") is None and "head_dim" not in sizes and hidden % heads:
        raise fields.fail(
            "hidden_size",
            f"is {hidden}: give a multiple of num_attention_heads, which is {heads}, or a head_dim",
        )
    head_dim = fields.integer("head_dim", head_dim, 2, MAX_HIDDEN)
    context = fields.integer(
        "max_position_embeddings", sizes["max_position_embeddings"], 1, MAX_CONTEXT
    )
    rope, context = read_rope(fields, head_dim, context)
    return Config(
        family=family,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=hidden,
        inner=fields.integer("intermediate_size", sizes["intermediate_size"], 1, 8 * MAX_HIDDEN),
        vocab_size=fields.integer("vocab_size", sizes["vocab_size"], 1, MAX_VOCAB),
        context=context,
        eps=fields.number("rms_norm_eps", 1e-6, 0, 1),
        activation=fields.word("hidden_act", "silu", ACTIVATIONS),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        tied=fields.flag("tie_word_embeddings", False),
        rope=rope,
        scales=(1.0 / math.sqrt(head_dim),) * layers,
        init_std=fields.number("initializer_range", 0.02, 0, 1),
    )


def read_config(fields: Fields) -> Config:
    """LLaMA's config.json; absent entries mean what they mean in transformers."""
    bias = fields.flag("attention_bias", False)
    return replace(
        read_alike(fields, "llama"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


LLAMA = Family(
    name="llama",
    prefix="model.",
    embed="embed_tokens",
    positions=None,
    layer="layers.{}.",
    norm1="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    norm2="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    norm="norm",
    norm_kind="rms",
    weights="out_in",
    scaled_init=False,
    ignored=("rotary_emb.inv_freq",),
    read_config=read_config,
)
