"""Qwen2 and Qwen3: LLaMA with sliding windows in some layers; biases, or norms of each head.

Yang et al., "Qwen2 technical report", 2024, arXiv:2407.10671, section 2.2, and "Qwen3 technical
report", 2025, arXiv:2505.09388, section 2; names and defaults as in Hugging Face's
``Qwen2ForCausalLM`` and ``Qwen3ForCausalLM``.
"""

from __future__ import annotations

from dataclasses import replace

from sparseattn.models.checkpoint import show
from sparseattn.models.common import Config
from sparseattn.models.fields import MAX_LAYERS, Fields
from sparseattn.models.llama import LLAMA, SIZES, read_alike
from sparseattn.models.windows import read_window

QWEN_SIZES = SIZES | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
LAYER_TYPES = {"full_attention": False, "sliding_attention": True}  # whether it has the window


def read_windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """Each layer's window: those that ``layer_types`` names, or from ``max_window_layers`` on."""
    window = None
    if fields.flag("use_sliding_window", False):
        window = read_window(fields, 4096)
    first = fields.integer("max_window_layers", 28, 0, MAX_LAYERS)
    types = fields.values.get("layer_types")
    if types is None:
        return tuple(window if i >= first else None for i in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        raise fields.fail("layer_types", f"is {show(types)}: give a list of {layers}, one a layer")
    for kind in types:
        if not isinstance(kind, str) or kind not in LAYER_TYPES:
            raise fields.fail(
                "layer_types", f"has {show(kind)}: known are {', '.join(LAYER_TYPES)}"
            )
        if LAYER_TYPES[kind] and window is None:
            raise fields.fail(
                "layer_types", f"has {show(kind)}: set use_sliding_window and a sliding_window"
            )
    return tuple(window if LAYER_TYPES[kind] else None for kind in types)


def read_qwen2(fields: Fields) -> Config:
    """Qwen2's config.json: queries, keys and values have biases."""
    config = read_alike(fields, "qwen2", QWEN_SIZES)
    return replace(config, qkv_bias=True, windows=read_windows(fields, config.n_layers))


def read_qwen3(fields: Fields) -> Config:
    """Qwen3's config.json: heads of 128 unless it says otherwise."""
    config = read_alike(fields, "qwen3", QWEN_SIZES | {"head_dim": 128})
    bias = fields.flag("attention_bias", False)
    windows = read_windows(fields, config.n_layers)
    return replace(config, qkv_bias=bias, out_bias=bias, windows=windows)


QWEN2 = replace(LLAMA, name="qwen2", read_config=read_qwen2)
QWEN3 = replace(
    LLAMA,
    name="qwen3",
    qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
    read_config=read_qwen3,
)
