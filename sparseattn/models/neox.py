"""GPT-NeoX and Pythia: a part of each head turns; both halves of a layer read the same state.

Black et al., "GPT-NeoX-20B", 2022, arXiv:2204.06745, section 2; Biderman et al., "Pythia", 2023,
arXiv:2304.01373; names and defaults as in Hugging Face's ``GPTNeoXForCausalLM``.
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
from sparseattn.models.rope import read_rope


def read_config(fields: Fields) -> Config:
    """GPT-NeoX's config.json; absent entries mean what they mean in transformers."""
    hidden = fields.integer("hidden_size", 6144, 1, MAX_HIDDEN)
    heads = fields.integer("num_attention_heads", 64, 1, MAX_HEADS)
    layers = fields.integer("num_hidden_layers", 44, 1, MAX_LAYERS)
    if hidden % heads:
        raise fields.fail(
            "hidden_size",
            f"is {hidden}: give a multiple of num_attention_heads, which is {heads}",
        )
    context = fields.integer("max_position_embeddings", 2048, 1, MAX_CONTEXT)
    rope, context = read_rope(
        *(fields, hidden // heads, context),
        theta="rotary_emb_base",
        share="rotary_pct",
        default_share=0.25,
        partial=True,
    )
    bias = fields.flag("attention_bias", True)
    return Config(
        family="gpt_neox",
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=hidden // heads,
        hidden=hidden,
        inner=fields.integer("intermediate_size", 24576, 1, 8 * MAX_HIDDEN),
        vocab_size=fields.integer("vocab_size", 50432, 1, MAX_VOCAB),
        context=context,
        eps=fields.number("layer_norm_eps", 1e-5, 0, 1),
        activation=fields.word("hidden_act", "gelu", ACTIVATIONS),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        tied=fields.flag("tie_word_embeddings", False),
        rope=rope,
        scales=(1.0 / math.sqrt(hidden // heads),) * layers,
        init_std=fields.number("initializer_range", 0.02, 0, 1),
        parallel=fields.flag("use_parallel_residual", True),
    )


NEOX = Family(
    name="gpt_neox",
    prefix="gpt_neox.",
    embed="embed_in",
    positions=None,
    layer="layers.{}.",
    norm1="input_layernorm",
    qkv=("attention.query_key_value",),
    out="attention.dense",
    norm2="post_attention_layernorm",
    gate=None,
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    norm="final_layer_norm",
    norm_kind="layer",
    weights="out_in",
    scaled_init=False,
    ignored=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    read_config=read_config,
    head="embed_out",
    qkv_by_head=True,
    renamed=(("lm_head.weight", "embed_out.weight"),),  # in the memory of transformers 5
)
