"""BERT, RoBERTa and DistilBERT in plain float64 NumPy: one sequence at a time, padding left out of
attention. Devlin et al. 2019, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692.

Weights are a dictionary from the checkpoint's tensor names to arrays, the configuration is the
checkpoint's ``config.json`` as a dictionary. Nothing of the package is used here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from reference.models import activate, join, layer_norm, softmax, split

Weights = dict[str, np.ndarray]

# What each part is called: BERT's and RoBERTa's names, and DistilBERT's.
LAYER = {
    "bert": "encoder.layer.{}.",
    "distilbert": "transformer.layer.{}.",
}
PARTS = {
    "bert": (
        *("attention.self.query", "attention.self.key", "attention.self.value"),
        *("attention.output.dense", "attention.output.LayerNorm"),
        *("intermediate.dense", "output.dense", "output.LayerNorm"),
    ),
    "distilbert": (
        *("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        *("attention.out_lin", "sa_layer_norm"),
        *("ffn.lin1", "ffn.lin2", "output_layer_norm"),
    ),
}


def tanh_or(name: str, x: np.ndarray) -> np.ndarray:
    return np.tanh(x) if name == "tanh" else activate(name, x)


def linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def norm(w: Weights, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    return layer_norm(x, w[name + ".weight"], w[name + ".bias"], eps)


def states(
    config: dict[str, Any],
    weights: Weights,
    tokens: np.ndarray,
    mask: np.ndarray | None = None,
    types: np.ndarray | None = None,
    keep: np.ndarray | None = None,
) -> np.ndarray:
    """States (length, hidden) after the last layer; keys where `mask` (length,) is False are not
    attended to; `keep` (length, length) narrows the keys of each row."""
    family = config["model_type"]
    names = "distilbert" if family == "distilbert" else "bert"
    w = {name.removeprefix(f"{family}."): value for name, value in weights.items()}
    heads = config["n_heads" if names == "distilbert" else "num_attention_heads"]
    layers = config["n_layers" if names == "distilbert" else "num_hidden_layers"]
    act = config.get("activation" if names == "distilbert" else "hidden_act", "gelu")
    eps = config.get("layer_norm_eps", 1e-12)
    length = len(tokens)
    there = np.ones(length, bool) if mask is None else mask
    places = np.arange(length)
    if family == "roberta":
        pad = config.get("pad_token_id", 1)
        places = np.where(there, np.cumsum(there) + pad, pad)
    x = w["embeddings.word_embeddings.weight"][tokens]
    x = x + w["embeddings.position_embeddings.weight"][places]
    if names == "bert":
        kinds = np.zeros(length, int) if types is None else types
        x = x + w["embeddings.token_type_embeddings.weight"][kinds]
    x = norm(w, "embeddings.LayerNorm", x, eps)
    visible = np.broadcast_to(there, (length, length))
    if keep is not None:
        visible = visible & keep
    for i in range(layers):
        at = LAYER[names].format(i)
        q_, k_, v_, out, norm1, up, down, norm2 = (at + part for part in PARTS[names])
        q, k, v = (split(linear(w, name, x), heads) for name in (q_, k_, v_))
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        y = join(softmax(np.where(visible, scores, -np.inf)) @ v)
        x = norm(w, norm1, x + linear(w, out, y), eps)
        x = norm(w, norm2, x + linear(w, down, activate(act, linear(w, up, x))), eps)
    return x


def masked_lm(config: dict[str, Any], weights: Weights, x: np.ndarray) -> np.ndarray:
    """Logits (length, vocabulary) of states (length, hidden)."""
    family = config["model_type"]
    eps = config.get("layer_norm_eps", 1e-12)
    dense, name, out, bias, act = {
        "bert": (
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            "cls.predictions.bias",
            config.get("hidden_act", "gelu"),
        ),
        "roberta": (
            "lm_head.dense",
            "lm_head.layer_norm",
            "lm_head.decoder",
            "lm_head.bias",
            "gelu",
        ),
        "distilbert": (
            "vocab_transform",
            "vocab_layer_norm",
            "vocab_projector",
            "vocab_projector.bias",
            config.get("activation", "gelu"),
        ),
    }[family]
    x = norm(weights, name, activate(act, linear(weights, dense, x)), eps)
    tied = weights[f"{family}.embeddings.word_embeddings.weight"]
    return x @ weights.get(out + ".weight", tied).T + weights[bias]


def classify(config: dict[str, Any], weights: Weights, x: np.ndarray) -> np.ndarray:
    """Logits (labels,) of states (length, hidden)."""
    dense, act, out = {
        "bert": ("bert.pooler.dense", "tanh", "classifier"),
        "roberta": ("classifier.dense", "tanh", "classifier.out_proj"),
        "distilbert": ("pre_classifier", "relu", "classifier"),
    }[config["model_type"]]
    return linear(weights, out, tanh_or(act, linear(weights, dense, x[0])))
