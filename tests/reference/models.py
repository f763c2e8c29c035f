"""GPT-2 and LLaMA in plain float64 NumPy: one sequence at a time, every matrix written out.

Weights are a dictionary from the checkpoint's tensor names to arrays, the configuration is the
checkpoint's ``config.json`` as a dictionary. Nothing of the package is used here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

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
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "gelu":
        return 0.5 * x * (1 + ERF(x / math.sqrt(2)))
    if name == "relu":
        return np.maximum(x, 0)
    if name in ("silu", "swish"):
        return x / (1 + np.exp(-x))
    raise ValueError(name)


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotate-half RoPE on x (heads, length, dim)."""
    length, dim = x.shape[-2:]
    half = dim // 2
    angle = np.arange(length)[:, None] * theta ** (-2.0 * np.arange(half) / dim)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


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


def llama(
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    keep: np.ndarray | None = None,
) -> np.ndarray:
    """Logits (length, vocabulary) of one sequence of token ids."""
    w = {name.removeprefix("model."): value for name, value in weights.items()}
    heads, eps = config["num_attention_heads"], config.get("rms_norm_eps", 1e-6)
    kv_heads = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    x = w["embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        p = f"layers.{i}."
        h = rms_norm(x, w[p + "input_layernorm.weight"], eps)
        q = rotate(split(linear(h, p + "self_attn.q_proj"), heads), theta)
        k = rotate(split(linear(h, p + "self_attn.k_proj"), kv_heads), theta)
        v = split(linear(h, p + "self_attn.v_proj"), kv_heads)
        x = x + linear(
            join(causal_attention(q, k, v, 1 / math.sqrt(dim), keep)), p + "self_attn.o_proj"
        )
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"], eps)
        gate = activate(config.get("hidden_act", "silu"), linear(h, p + "mlp.gate_proj"))
        x = x + linear(gate * linear(h, p + "mlp.up_proj"), p + "mlp.down_proj")
    x = rms_norm(x, w["norm.weight"], eps)
    return x @ w.get("lm_head.weight", w["embed_tokens.weight"]).T
