"""Tiny checkpoints of the decoder families that came after GPT-2 and LLaMA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tiny_models import LLAMA_CONFIG, Weights, draw, llama_weights

MISTRAL_CONFIG: dict[str, Any] = LLAMA_CONFIG | {"model_type": "mistral", "sliding_window": 7}
QWEN2_CONFIG: dict[str, Any] = LLAMA_CONFIG | {
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 7,
    "max_window_layers": 1,
}
QWEN3_CONFIG: dict[str, Any] = LLAMA_CONFIG | {
    "model_type": "qwen3",
    "head_dim": 6,
    "use_sliding_window": True,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
NEOX_CONFIG: dict[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_size": 48,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 48,
    "rotary_pct": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 60,
}


def qwen2_weights(config: Mapping[str, Any], *, prefix: str = "model.") -> Weights:
    """Queries, keys and values have biases."""
    weights = llama_weights({**config, "attention_bias": True}, prefix=prefix)
    return {name: value for name, value in weights.items() if not name.endswith("o_proj.bias")}


def qwen3_weights(config: Mapping[str, Any], *, prefix: str = "model.") -> Weights:
    """Queries and keys have norms; a head is 128 wide unless the configuration says otherwise."""
    config = {"head_dim": 128, **config}
    shapes = {
        f"{prefix}layers.{i}.self_attn.{name}.weight": (config["head_dim"],)
        for i in range(config["num_hidden_layers"])
        for name in ("q_norm", "k_norm")
    }
    return llama_weights(config, prefix=prefix) | draw(shapes, seed=2)


def neox_weights(config: Mapping[str, Any], *, prefix: str = "gpt_neox.") -> Weights:
    wide, inner, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    shapes: dict[str, tuple[int, ...]] = {
        "embed_in.weight": (vocab, wide),
        "final_layer_norm.weight": (wide,),
        "final_layer_norm.bias": (wide,),
    }
    for i in range(config["num_hidden_layers"]):
        for name, n_in, n_out, bias in (
            ("attention.query_key_value", wide, 3 * wide, config.get("attention_bias", True)),
            ("attention.dense", wide, wide, config.get("attention_bias", True)),
            ("mlp.dense_h_to_4h", wide, inner, True),
            ("mlp.dense_4h_to_h", inner, wide, True),
        ):
            shapes[f"layers.{i}.{name}.weight"] = (n_out, n_in)
            if bias:
                shapes[f"layers.{i}.{name}.bias"] = (n_out,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{i}.{name}.weight"] = shapes[f"layers.{i}.{name}.bias"] = (wide,)
    weights = draw({prefix + name: shape for name, shape in shapes.items()})
    if not config.get("tie_word_embeddings", False):
        weights |= draw({"embed_out.weight": (vocab, wide)}, seed=1)
    return weights


DECODERS: dict[str, tuple[dict[str, Any], Callable[..., Weights]]] = {
    "llama": (LLAMA_CONFIG, llama_weights),
    "mistral": (MISTRAL_CONFIG, llama_weights),
    "qwen2": (QWEN2_CONFIG, qwen2_weights),
    "qwen3": (QWEN3_CONFIG, qwen3_weights),
    "gpt_neox": (NEOX_CONFIG, neox_weights),
}
