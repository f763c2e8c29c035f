"""LLaMA: rotate-half RoPE, RMS norm, SwiGLU, grouped-query attention.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023, arXiv:2302.13971;
names and defaults as in Hugging Face's ``LlamaForCausalLM``.
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

MAX_THETA = 1e12


def read_theta(fields: Fields) -> float:
    """The base of the rotation, wherever this generation of files keeps it."""
    theta = fields.number("rope_theta", 10000.0, 0, MAX_THETA)
    for name in ("rope_scaling", "rope_parameters"):
        section = fields.section(name)
        kind = section.get("rope_type", section.get("type", "default"))
        if kind != "default":
            raise fields.fail(
                name, f"asks for {str(kind)[:40]!a} positions: only the default is read yet"
            )
        theta = section.number("rope_theta", theta, 0, MAX_THETA)
    return theta


def read_config(fields: Fields) -> Config:
    """LLaMA's config.json; absent entries mean what they mean in transformers."""
    hidden = fields.integer("hidden_size", 4096, 1, MAX_HIDDEN)
    heads = fields.integer("num_attention_heads", 32, 1, MAX_HEADS)
    kv_heads = fields.integer("num_key_value_heads", heads, 1, MAX_HEADS)
    layers = fields.integer("num_hidden_layers", 32, 1, MAX_LAYERS)
    if heads % kv_heads:
        raise fields.fail(
            "num_key_value_heads",
            f"is {kv_heads}: give a divisor of num_attention_heads, which is {heads}",
        )
    if fields.values.get("head_dim") is None and hidden % heads:
        raise fields.fail(
            "hidden_size",
            f"is {hidden}: give a multiple of num_attention_heads, which is {heads}, or a head_dim",
        )
    head_dim = fields.integer("head_dim", hidden // heads, 2, MAX_HIDDEN)
    if head_dim % 2:
        raise fields.fail("head_dim", f"is {head_dim}: give an even number, as RoPE turns pairs")
    return Config(
        family="llama",
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=hidden,
        inner=fields.integer("intermediate_size", 11008, 1, 8 * MAX_HIDDEN),
        vocab_size=fields.integer("vocab_size", 32000, 1, MAX_VOCAB),
        context=fields.integer("max_position_embeddings", 2048, 1, MAX_CONTEXT),
        eps=fields.number("rms_norm_eps", 1e-6, 0, 1),
        activation=fields.word("hidden_act", "silu", ACTIVATIONS),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        tied=fields.flag("tie_word_embeddings", False),
        rope_theta=read_theta(fields),
        scales=(1.0 / math.sqrt(head_dim),) * layers,
        init_std=fields.number("initializer_range", 0.02, 0, 1),
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
