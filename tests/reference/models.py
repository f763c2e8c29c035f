"""Decoders in plain float64 NumPy: one sequence at a time, every matrix written out.

Weights are a dictionary from the checkpoint's tensor names to arrays, the configuration is the
checkpoint's ``config.json`` as a dictionary. Nothing of the package is used here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from reference import positions

ERF = np.vectorize(math.erf, otypes=[np.float64])


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a trusted file, widened to float64 (bfloat16 is the upper half of a float32)."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[8 + size + begin : 8 + size + end]
        if entry["dtype"] == "BF16":
            flat = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1"}
            flat = np.frombuffer(raw, kinds[entry["dtype"]])
        tensors[name] = flat.astype(np.float64).reshape(entry["shape"])
    return tensors


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * w + b


def rms_norm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def activate(name: str, x: np.ndarray) -> np.ndarray:
    if name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "gelu":
        return 0.5 * x * (1 + ERF(x / math.sqrt(2)))
    if name == "relu":
        return np.maximum(x, 0)
    if name in ("silu", "swish"):
        return x / (1 + np.exp(-x))
    raise ValueError(name)


def rotate(x: np.ndarray, w: np.ndarray, by: float = 1.0) -> np.ndarray:
    """Rotate-half RoPE on x (heads, length, dim): the first channels turn by position times w, of
    all or (length, pairs) of each, and grow by `by`."""
    half = w.shape[-1]
    angle = np.arange(x.shape[-2])[:, None] * w
    cos, sin = by * np.cos(angle), by * np.sin(angle)
    a, b, rest = np.split(x, [half, 2 * half], -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def causal_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, keep: np.ndarray | None
) -> np.ndarray:
    """q (heads, n, dim), k and v (kv_heads, n, dim); keep (n, n) bool narrows the visible keys."""
    group = len(q) // len(k)
    k, v = k.repeat(group, 0), v.repeat(group, 0)
    visible = np.tril(np.ones((q.shape[1], k.shape[1]), bool))
    if keep is not None:
        visible &= keep
    scores = np.where(visible, scale * q @ k.transpose(0, 2, 1), -np.inf)
    return softmax(scores) @ v


def split(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)


def join(x: np.ndarray) -> np.ndarray:
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def gpt2(
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    keep: np.ndarray | None = None,
) -> np.ndarray:
    """Logits (length, vocabulary) of one sequence of token ids."""
    w = {name.removeprefix("transformer."): value for name, value in weights.items()}
    heads, eps = config["n_head"], config.get("layer_norm_epsilon", 1e-5)
    act = config.get("activation_function", "gelu_new")
    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    for i in range(config["n_layer"]):
        p = f"h.{i}."
        scale = 1.0
        if config.get("scale_attn_weights", True):
            scale /= math.sqrt(config["n_embd"] // heads)
        if config.get("scale_attn_by_inverse_layer_idx", False):
            scale /= i + 1
        h = layer_norm(x, w[p + "ln_1.weight"], w[p + "ln_1.bias"], eps)
        qkv = h @ w[p + "attn.c_attn.weight"] + w[p + "attn.c_attn.bias"]
        q, k, v = (split(part, heads) for part in np.split(qkv, 3, -1))
        y = join(causal_attention(q, k, v, scale, keep))
        x = x + y @ w[p + "attn.c_proj.weight"] + w[p + "attn.c_proj.bias"]
        h = layer_norm(x, w[p + "ln_2.weight"], w[p + "ln_2.bias"], eps)
        h = activate(act, h @ w[p + "mlp.c_fc.weight"] + w[p + "mlp.c_fc.bias"])
        x = x + h @ w[p + "mlp.c_proj.weight"] + w[p + "mlp.c_proj.bias"]
    x = layer_norm(x, w["ln_f.weight"], w["ln_f.bias"], eps)
    return x @ w.get("lm_head.weight", w["wte.weight"]).T


def positions_of(
    config: dict[str, Any], dim: int, length: int, theta: float, share: float = 1.0
) -> tuple[np.ndarray, float]:
    """Frequencies and growth; the section of old files wins over that of new ones."""
    section = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta, context = section.get("rope_theta", theta), config["max_position_embeddings"]
    turned = int(dim * section.get("partial_rotary_factor", share))
    if turned == 0:
        return np.zeros(0), 1.0
    if "original_max_position_embeddings" in config:
        section = section | {
            "original_max_position_embeddings": config["original_max_position_embeddings"]
        }
    w = positions.frequencies(section, theta, turned, context, length)
    return w, positions.attention(section, context)


def window_of(config: dict[str, Any], layer: int) -> int | None:
    """Keys that a row of a layer sees, itself among them."""
    window = config.get("sliding_window", 4096)
    if config["model_type"] == "mistral":
        return window
    if not config["model_type"].startswith("qwen") or not config.get("use_sliding_window", False):
        return None
    types = config.get("layer_types")
    sliding = layer >= config.get("max_window_layers", 28)
    if types is not None:
        sliding = types[layer] == "sliding_attention"
    return window if sliding else None


def llama(
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    keep: np.ndarray | None = None,
    at_once: int | None = None,
) -> np.ndarray:
    """Logits (length, vocabulary) of one sequence of token ids; also Mistral, Qwen2 and Qwen3.

    The first `at_once` tokens, or all, are read together, and the others one by one: each turns by
    the frequencies of the length so far. Rows before the last of the first are of no call then.
    """
    w = {name.removeprefix("model."): value for name, value in weights.items()}
    heads, eps = config["num_attention_heads"], config.get("rms_norm_eps", 1e-6)
    kv_heads = config.get("num_key_value_heads") or heads
    default = 128 if config["model_type"] == "qwen3" else None
    dim = config.get("head_dim", default) or config["hidden_size"] // heads
    theta = config.get("rope_theta", 10000.0)
    w_first, growth = positions_of(config, dim, at_once or len(tokens), theta)
    later = range(at_once or len(tokens), len(tokens))
    turn = (
        np.stack(
            [w_first] * (len(tokens) - len(later))
            + [positions_of(config, dim, at + 1, theta)[0] for at in later]
        ),
        growth,
    )
    back = np.subtract.outer(np.arange(len(tokens)), np.arange(len(tokens)))

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    x = w["embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        p, window = f"layers.{i}.", window_of(config, i)
        seen = keep
        if window is not None:
            seen = back < window if keep is None else keep & (back < window)
        h = rms_norm(x, w[p + "input_layernorm.weight"], eps)
        q = split(linear(h, p + "self_attn.q_proj"), heads)
        k = split(linear(h, p + "self_attn.k_proj"), kv_heads)
        v = split(linear(h, p + "self_attn.v_proj"), kv_heads)
        if config["model_type"] == "qwen3":
            q = rms_norm(q, w[p + "self_attn.q_norm.weight"], eps)
            k = rms_norm(k, w[p + "self_attn.k_norm.weight"], eps)
        q, k = rotate(q, *turn), rotate(k, *turn)
        x = x + linear(
            join(causal_attention(q, k, v, 1 / math.sqrt(dim), seen)), p + "self_attn.o_proj"
        )
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"], eps)
        gate = activate(config.get("hidden_act", "silu"), linear(h, p + "mlp.gate_proj"))
        x = x + linear(gate * linear(h, p + "mlp.up_proj"), p + "mlp.down_proj")
    x = rms_norm(x, w["norm.weight"], eps)
    return x @ w.get("lm_head.weight", w["embed_tokens.weight"]).T


def gpt_neox(
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    keep: np.ndarray | None = None,
) -> np.ndarray:
    """Logits (length, vocabulary) of one sequence of token ids."""
    w = {name.removeprefix("gpt_neox."): value for name, value in weights.items()}
    heads, eps = config["num_attention_heads"], config.get("layer_norm_eps", 1e-5)
    dim = config["hidden_size"] // heads
    turn = positions_of(
        *(config, dim, len(tokens), config.get("rotary_emb_base", 10000.0)),
        config.get("rotary_pct", 0.25),
    )

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(x, w[name + ".weight"], w[name + ".bias"], eps)

    x = w["embed_in.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        p = f"layers.{i}."
        qkv = linear(norm(x, p + "input_layernorm"), p + "attention.query_key_value")
        # for every head its query, then its key, then its value
        q, k, v = qkv.reshape(len(x), heads, 3, dim).transpose(2, 1, 0, 3)
        y = join(causal_attention(rotate(q, *turn), rotate(k, *turn), v, 1 / math.sqrt(dim), keep))
        y = linear(y, p + "attention.dense")
        read = x if config.get("use_parallel_residual", True) else x + y
        h = linear(norm(read, p + "post_attention_layernorm"), p + "mlp.dense_h_to_4h")
        h = activate(config.get("hidden_act", "gelu"), h)
        x = x + y + linear(h, p + "mlp.dense_4h_to_h")
    return norm(x, "final_layer_norm") @ w.get("embed_out.weight", w["embed_in.weight"]).T
