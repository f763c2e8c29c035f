"""Checkpoint folders made on the spot: safetensors bytes by hand, tiny models with random weights;
and the comparison of a trained checkpoint with transformers.

Weights are drawn large (0.3) so that logits are of order one and a wrong switch shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from conftest import requires
from reference import models as reference

Weights = dict[str, np.ndarray]

GPT2_CONFIG: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 24,
    "n_head": 3,
    "n_layer": 3,
    "n_inner": 40,
    "n_positions": 48,
    "vocab_size": 61,
    "bos_token_id": 0,
    "eos_token_id": 60,
}
LLAMA_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": [2, 60],
}


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: `header` is JSON, or bytes taken as they are; `length` may lie."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def pack_tensors(weights: Weights, dtypes: str | Mapping[str, str] = "F32") -> bytes:
    """An honest file, of one type or one a tensor; BF16 keeps the upper half of a float32, rounded
    to nearest even."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks, at = [], 0
    for name, value in weights.items():
        value = np.ascontiguousarray(value, np.float32)
        dtype = dtypes if isinstance(dtypes, str) else dtypes[name]
        if dtype == "BF16":
            chunk = bfloat16(value).tobytes()
        else:
            chunk = value.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(value.shape),
            "data_offsets": [at, at + len(chunk)],
        }
        chunks.append(chunk)
        at += len(chunk)
    raw = json.dumps(header).encode()
    return pack(raw + b" " * (-len(raw) % 8), b"".join(chunks))


def bfloat16(value: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def rounded(weights: Weights, dtype: str) -> Weights:
    """The weights as a file in `dtype` gives them back."""
    if dtype == "BF16":
        return {
            n: (bfloat16(v).astype(np.uint32) << 16).view(np.float32) for n, v in weights.items()
        }
    return {n: v.astype({"F32": "f4", "F16": "f2", "F64": "f4"}[dtype]) for n, v in weights.items()}


def gpt2_weights(config: Mapping[str, Any], *, prefix: str = "transformer.") -> Weights:
    wide, inner = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config["vocab_size"], wide),
        "wpe.weight": (config["n_positions"], wide),
        "ln_f.weight": (wide,),
        "ln_f.bias": (wide,),
    }
    for i in range(config["n_layer"]):
        for name, n_in, n_out in (
            ("attn.c_attn", wide, 3 * wide),
            ("attn.c_proj", wide, wide),
            ("mlp.c_fc", wide, inner),
            ("mlp.c_proj", inner, wide),
        ):
            shapes[f"h.{i}.{name}.weight"] = (n_in, n_out)
            shapes[f"h.{i}.{name}.bias"] = (n_out,)
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{i}.{name}.weight"] = shapes[f"h.{i}.{name}.bias"] = (wide,)
    weights = draw({prefix + name: shape for name, shape in shapes.items()})
    if not config.get("tie_word_embeddings", True):
        weights |= draw({"lm_head.weight": (config["vocab_size"], wide)}, seed=1)
    return weights


def llama_weights(config: Mapping[str, Any], *, prefix: str = "model.") -> Weights:
    wide, inner, heads = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    dim = config.get("head_dim") or wide // heads
    kv = (config.get("num_key_value_heads") or heads) * dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config["vocab_size"], wide),
        "norm.weight": (wide,),
    }
    for i in range(config["num_hidden_layers"]):
        for name, n_in, n_out, switch in (
            ("self_attn.q_proj", wide, heads * dim, "attention_bias"),
            ("self_attn.k_proj", wide, kv, "attention_bias"),
            ("self_attn.v_proj", wide, kv, "attention_bias"),
            ("self_attn.o_proj", heads * dim, wide, "attention_bias"),
            ("mlp.gate_proj", wide, inner, "mlp_bias"),
            ("mlp.up_proj", wide, inner, "mlp_bias"),
            ("mlp.down_proj", inner, wide, "mlp_bias"),
        ):
            shapes[f"layers.{i}.{name}.weight"] = (n_out, n_in)
            if config.get(switch):
                shapes[f"layers.{i}.{name}.bias"] = (n_out,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{i}.{name}.weight"] = (wide,)
    weights = draw({prefix + name: shape for name, shape in shapes.items()})
    if not config.get("tie_word_embeddings", False):
        weights |= draw({"lm_head.weight": (config["vocab_size"], wide)}, seed=1)
    return weights


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        value = 0.3 * rng.standard_normal(shape, np.float32)
        weights[name] = value + 1 if "ln_" in name or "norm" in name else value
    return weights


def save_folder(
    folder: Path,
    config: Mapping[str, Any],
    weights: Weights | bytes | None = None,
    dtype: str = "F32",
) -> Path:
    """Write config.json and, where given, model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        data = weights if isinstance(weights, bytes) else pack_tensors(weights, dtype)
        (folder / "model.safetensors").write_bytes(data)
    return folder


def assert_trained_parity(folder: Path, run: Callable[..., np.ndarray]) -> None:
    """Logits of a trained checkpoint, which reach 19: within 2e-5 of transformers' on the scale of
    the largest, and in the mean at most twice as far from float64 as theirs are."""
    from sparseattn.models import Model

    torch, transformers = requires("torch"), requires("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = Model.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    weights = reference.read_safetensors(folder / "model.safetensors")
    for seed in range(3):
        length = min(300, model.config.context)
        ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, length))
        want = np.stack([run(config, weights, row) for row in ids])
        with torch.no_grad():
            logits = theirs(torch.from_numpy(ids)).logits.numpy()
        ours = model(ids)
        assert np.abs(ours - logits).max() <= 2e-5 * np.abs(want).max()
        assert rms(ours - want) <= 2 * rms(logits - want)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x * x).mean()))
