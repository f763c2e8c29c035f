"""LLaMA: logits against float64 NumPy, against transformers, and on a trained checkpoint."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import requires, shared_path
from reference import models as reference
from tiny_models import (
    LLAMA_CONFIG,
    assert_trained_parity,
    llama_weights,
    rounded,
    save_folder,
)

from sparseattn import _core
from sparseattn.models import Model

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")

TOLERANCE = 2e-5  # of logits, float32; with logits of order one


def tokens(
    config: dict[str, Any], batch: int = 2, length: int = 33, *, seed: int = 7
) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config["vocab_size"], (batch, length))


def wanted(config: dict[str, Any], weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    return np.stack([reference.llama(config, wide, row) for row in ids])


def steady(config: dict[str, Any], weights: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """Tokens and their logits, which rounding the weights once moves by under TOLERANCE / 4.

    A row near a switch of its softmax or of its norm can move by 2e-5 then: of such a row no
    program in float32 knows more.
    """
    for seed in range(7, 30):
        rng, ids = np.random.default_rng(seed), tokens(config, seed=seed)
        want, moved = wanted(config, weights, ids), 0.0
        for _ in range(3):
            near = {
                name: value * (1 + rng.uniform(-1, 1, value.shape) * 2.0**-24)
                for name, value in weights.items()
            }
            moved = max(moved, np.abs(wanted(config, near, ids) - want).max())
        if moved < TOLERANCE / 4:
            return ids, want
    raise AssertionError("no steady tokens in 23 draws")


SWITCHES: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": None},
    {"num_key_value_heads": 1},
    {"head_dim": 6},
    {"head_dim": 16, "num_key_value_heads": 4},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"tie_word_embeddings": True},
    {"rms_norm_eps": 0.1},
    {"rope_theta": 100.0},
    {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    {"hidden_act": "gelu"},
    {"hidden_act": "relu"},
    {"num_hidden_layers": 1},
]


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_logits_match_reference(changes: dict[str, Any], tmp_path: Path) -> None:
    config = LLAMA_CONFIG | changes
    weights = llama_weights(config)
    model = Model.from_pretrained(save_folder(tmp_path, config, weights))
    ids, want = steady(config, weights)
    got = model(ids)
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE)


def test_every_switch_shows() -> None:
    """The reference tells all configurations apart, so the test above can fail for each."""
    results = []
    for changes in SWITCHES:
        config = LLAMA_CONFIG | changes
        results.append(wanted(config, llama_weights(config), tokens(config)))
    for a, b in itertools.combinations(results, 2):
        assert np.abs(a - b).max() > 10 * TOLERANCE


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_stored_types(dtype: str, tmp_path: Path) -> None:
    weights = llama_weights(LLAMA_CONFIG)
    model = Model.from_pretrained(save_folder(tmp_path, LLAMA_CONFIG, weights, dtype))
    ids = tokens(LLAMA_CONFIG)
    want = wanted(LLAMA_CONFIG, rounded(weights, dtype), ids)
    np.testing.assert_allclose(model(ids), want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("scaling", [None, {"type": "default"}, {"rope_type": "default"}])
def test_rope_scaling_that_asks_for_nothing(scaling: Any, tmp_path: Path) -> None:
    config = LLAMA_CONFIG | {"rope_scaling": scaling}
    weights = llama_weights(config, prefix="")
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2)  # a buffer of old files
    model = Model.from_pretrained(save_folder(tmp_path, config, weights))
    ids = tokens(config)
    want = wanted(LLAMA_CONFIG, llama_weights(LLAMA_CONFIG), ids)
    np.testing.assert_allclose(model(ids), want, rtol=TOLERANCE, atol=TOLERANCE)


def test_rope_angles_are_float64(tmp_path: Path) -> None:
    """At position 10^5 a float32 angle is off by up to 4e-3, ours by its rounding."""
    config = LLAMA_CONFIG | {"max_position_embeddings": 200_000}
    model = Model.from_pretrained(save_folder(tmp_path, config), random_weights=0)
    assert model.config.rope is not None
    tables = model._network.rope_tables(model.config.rope, 100_001)
    for position in (1, 99_999, 100_000):
        for t, (cos, sin) in enumerate(zip(tables[0][position], tables[1][position], strict=True)):
            angle = position * 10000.0 ** (-2 * t / 4)
            assert abs(cos - math.cos(angle)) <= 6e-8 and abs(sin - math.sin(angle)) <= 6e-8


@pytest.mark.promise("A3")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},  # grouped-query attention, 4 to 1, untied
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
    ids=str,
)
def test_logits_match_transformers(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    torch, transformers = requires("torch"), requires("transformers")
    torch.manual_seed(0)
    known = {k: v for k, v in (LLAMA_CONFIG | changes).items() if k != "model_type"}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**known)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = tokens(known)
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(want).max() > 1
    assert np.abs(Model.from_pretrained(tmp_path)(ids) - want).max() <= TOLERANCE


# ---- stories260K ----------------------------------------------------------------------------


@pytest.mark.promise("A3")
def test_stories_match_transformers() -> None:
    assert_trained_parity(shared_path("models/stories260K"), reference.llama)


def test_stories_match_reference() -> None:
    folder = shared_path("models/stories260K")
    config = json.loads((folder / "config.json").read_text())
    weights = reference.read_safetensors(folder / "model.safetensors")
    model = Model.from_pretrained(folder)
    assert (model.config.n_heads, model.config.n_kv_heads, model.config.tied) == (8, 4, True)
    ids = np.random.default_rng(0).integers(0, 512, (1, 512))
    want = wanted(config, weights, ids)
    np.testing.assert_allclose(model(ids), want, rtol=TOLERANCE, atol=TOLERANCE)


def test_stories_mean_loss() -> None:
    """1.2969 nats a token over 20,106 tokens of the sample.

    The sample is split at ``<|endoftext|>`` and its first story, which is cut, is left out. Each
    story is stripped, encoded by itself with ``<s>`` before it, and cut to 513 ids: the first 512
    are the context, every id after ``<s>`` is predicted once. The first 59 stories make 20,106
    predictions; the figure is the mean of all of them, at temperature 1.
    """
    model = Model.from_pretrained(shared_path("models/stories260K"))
    assert model.tokenizer is not None
    text = shared_path("text/tinystories_sample.txt").read_text()
    total, count = 0.0, 0
    for story in text.split("<|endoftext|>")[1:60]:
        ids = np.array(model.tokenizer.encode(story.strip(), special=True)[:513], np.int32)
        nll, _ = _core.nll(model(ids[:-1]), ids[1:])
        total, count = total + float(nll.sum()), count + len(nll)
    assert count == 20_106
    assert abs(total / count - 1.2969) < 5e-5


def test_stories_greedy_text_is_a_story() -> None:
    """From ``<s>`` alone: what llama2.c is known to print first."""
    model = Model.from_pretrained(shared_path("models/stories260K"))
    assert model.tokenizer is not None
    ids = [1]
    for _ in range(40):
        ids.append(int(model.head(model.hidden(ids)[-1:])[0].argmax()))
    text = model.tokenizer.decode(ids, special=False)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")
