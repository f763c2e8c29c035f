"""GPT-2: logits against float64 NumPy, against transformers, and on trained checkpoints."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import requires, shared_path
from reference import models as reference
from tiny_models import (
    GPT2_CONFIG,
    assert_trained_parity,
    gpt2_weights,
    rounded,
    save_folder,
)

from sparseattn.models import Model

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")

TOLERANCE = 2e-5  # of logits, float32; with logits of order one


def tokens(config: dict[str, Any], batch: int = 2, length: int = 33) -> np.ndarray:
    return np.random.default_rng(7).integers(0, config["vocab_size"], (batch, length))


def wanted(config: dict[str, Any], weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    return np.stack([reference.gpt2(config, wide, row) for row in ids])


SWITCHES = [
    {},
    {"n_inner": None},
    {"activation_function": "gelu"},
    {"activation_function": "relu"},
    {"activation_function": "silu"},
    {"activation_function": "gelu_pytorch_tanh"},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    {"layer_norm_epsilon": 0.1},
    {"tie_word_embeddings": False},
    {"n_head": 1, "n_layer": 1},
    {"n_head": 24},
]


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_logits_match_reference(changes: dict[str, Any], tmp_path: Path) -> None:
    config = GPT2_CONFIG | changes
    weights = gpt2_weights(config)
    model = Model.from_pretrained(save_folder(tmp_path, config, weights))
    ids = tokens(config)
    got, want = model(ids), wanted(config, weights, ids)
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE)


def test_every_switch_shows() -> None:
    """The reference tells all configurations apart, so the test above can fail for each."""
    results = []
    for changes in SWITCHES[:11]:
        config = GPT2_CONFIG | changes
        if changes.get("activation_function") != "gelu_pytorch_tanh":  # gelu_new's other name
            results.append(wanted(config, gpt2_weights(config), tokens(config)))
    for a, b in itertools.combinations(results, 2):
        assert np.abs(a - b).max() > 10 * TOLERANCE


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_stored_types(dtype: str, tmp_path: Path) -> None:
    weights = gpt2_weights(GPT2_CONFIG)
    model = Model.from_pretrained(save_folder(tmp_path, GPT2_CONFIG, weights, dtype))
    ids = tokens(GPT2_CONFIG)
    want = wanted(GPT2_CONFIG, rounded(weights, dtype), ids)
    np.testing.assert_allclose(model(ids), want, rtol=TOLERANCE, atol=TOLERANCE)


def test_names_and_layouts_in_use(tmp_path: Path) -> None:
    """With and without prefix, with the buffers of old files, tied under either name, or twice."""
    good = gpt2_weights(GPT2_CONFIG)
    bare = gpt2_weights(GPT2_CONFIG, prefix="")
    buffers = {f"h.{i}.attn.bias": np.ones((1, 1, 48, 48)) for i in range(3)}
    buffers |= {f"h.{i}.attn.masked_bias": np.full((), -1e4) for i in range(3)}
    head = {"lm_head.weight": good["transformer.wte.weight"]}
    swapped = {k: v for k, v in good.items() if k != "transformer.wte.weight"} | head
    ids = tokens(GPT2_CONFIG)
    want = Model.from_pretrained(save_folder(tmp_path / "good", GPT2_CONFIG, good))(ids)
    for number, weights in enumerate((bare, bare | buffers, good | head, swapped)):
        model = Model.from_pretrained(save_folder(tmp_path / str(number), GPT2_CONFIG, weights))
        np.testing.assert_array_equal(model(ids), want)
    other = {"lm_head.weight": good["transformer.wte.weight"][::-1]}
    model = Model.from_pretrained(save_folder(tmp_path / "untied", GPT2_CONFIG, good | other))
    assert not model.config.tied  # the file knows better, as in transformers
    np.testing.assert_allclose(model(ids), want[..., ::-1], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.promise("A3")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"n_inner": 40, "scale_attn_by_inverse_layer_idx": True},
        {"activation_function": "relu", "scale_attn_weights": False},
        {"tie_word_embeddings": False, "activation_function": "gelu"},
    ],
    ids=str,
)
def test_logits_match_transformers(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    torch, transformers = requires("torch"), requires("transformers")
    torch.manual_seed(0)
    known = GPT2_CONFIG | {"n_inner": None} | changes
    del known["model_type"]
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**known)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = tokens(known)
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(want).max() > 1
    assert np.abs(Model.from_pretrained(tmp_path)(ids) - want).max() <= TOLERANCE


def test_base_model_without_head_or_prefix(tmp_path: Path) -> None:
    """GPT2Model saves bare names; its states are what our hidden() gives."""
    torch, transformers = requires("torch"), requires("transformers")
    torch.manual_seed(0)
    known = {k: v for k, v in GPT2_CONFIG.items() if k != "model_type"}
    theirs = transformers.GPT2Model(transformers.GPT2Config(**known)).eval()
    theirs.save_pretrained(tmp_path)
    ids = tokens(GPT2_CONFIG)
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids)).last_hidden_state.numpy()
    assert np.abs(Model.from_pretrained(tmp_path).hidden(ids) - want).max() <= TOLERANCE


# ---- trained checkpoints --------------------------------------------------------------------


def test_gpt_nano_sort_gives_upstreams_activations() -> None:
    """minGPT's own PyTorch run, for three inputs: logits, and states after the final norm."""
    folder = shared_path("models/gpt-nano-sort")
    expected = reference.read_safetensors(folder / "expected.safetensors")
    ids = expected["idx"].astype(np.int64)
    model = Model.from_pretrained(folder)
    assert model.tokenizer is None and not model.config.tied
    assert np.abs(model(ids) - expected["lm_head"]).max() <= TOLERANCE
    assert np.abs(model.hidden(ids) - expected["ln_f"]).max() <= TOLERANCE


def test_gpt_nano_sort_sorts_all_inputs() -> None:
    model = Model.from_pretrained(shared_path("models/gpt-nano-sort"))
    inputs = np.array(list(itertools.product(range(3), repeat=6)))
    ids = inputs
    for _ in range(6):
        states = model.hidden(ids)[:, -1]
        ids = np.concatenate([ids, model.head(states).argmax(-1)[:, None]], 1)
    assert len(ids) == 729
    np.testing.assert_array_equal(ids[:, 6:], np.sort(inputs, 1))


@pytest.mark.promise("A3")
@pytest.mark.parametrize("name", ["capp-gpt", "gpt-nano-sort"])
def test_trained_logits_match_transformers(name: str) -> None:
    assert_trained_parity(shared_path(f"models/{name}"), reference.gpt2)


def test_capp_gpt_matches_reference() -> None:
    """Without transformers too; its begin token lies outside its own vocabulary."""
    folder = shared_path("models/capp-gpt")
    config = json.loads((folder / "config.json").read_text())
    weights = reference.read_safetensors(folder / "model.safetensors")
    model = Model.from_pretrained(folder)
    assert model.config.bos_token_id is None and model.config.eos_token_ids == (51,)
    ids = np.random.default_rng(1).integers(0, 53, (1, 200))
    want = wanted(config, weights, ids)
    np.testing.assert_allclose(model(ids), want, rtol=TOLERANCE, atol=TOLERANCE)
