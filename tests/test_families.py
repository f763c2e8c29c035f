"""Decoder families: logits against float64 NumPy and transformers, every switch, generation."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import requires
from reference import models as reference
from tiny_decoders import DECODERS, LLAMA_CONFIG
from tiny_models import Weights, llama_weights, rounded, save_folder

from sparseattn.errors import FileError
from sparseattn.models import Model
from sparseattn.models.common import draw as draw_parameters
from sparseattn.models.fields import Fields
from sparseattn.models.incremental import Incremental
from sparseattn.models.model import FAMILIES
from sparseattn.positions import Rope

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")

TOLERANCE = 2e-5  # of logits, float32; with logits of order one

LINEAR = {"type": "linear", "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WIDE = {"head_dim": 16, "rope_theta": 100.0}  # enough channels to show a ramp
SHORT = {"max_position_embeddings": 12}  # less than the 33 tokens of a test

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_scaling": LINEAR, "max_position_embeddings": 20}),
    ("llama", {"rope_scaling": DYNAMIC} | SHORT),
    ("llama", {"rope_parameters": {**DYNAMIC, "rope_theta": 500.0}} | SHORT),
    ("llama", {"rope_scaling": YARN} | WIDE),
    ("llama", {"rope_scaling": {**YARN, "truncate": False}} | WIDE),
    ("llama", {"rope_parameters": {**YARN, "rope_theta": 500.0, "attention_factor": 1.2}}),
    ("llama", {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}),
    ("llama", {"rope_scaling": {**YARN, "beta_fast": 3, "beta_slow": 0.3}} | WIDE),
    ("llama", {"rope_scaling": LLAMA3}),
    ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.5}}),
    ("mistral", {}),
    ("mistral", {"sliding_window": 1}),
    ("mistral", {"sliding_window": 32}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"head_dim": 6, "tie_word_embeddings": True}),
    ("mistral", {"rope_scaling": YARN}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen2", {"max_window_layers": 0, "num_key_value_heads": 8}),
    ("qwen2", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
    ("qwen2", {"tie_word_embeddings": True, "rope_scaling": YARN}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "sliding_window": 3}),
    ("qwen3", {"layer_types": None, "max_window_layers": 2}),
    ("qwen3", {"head_dim": None, "num_attention_heads": 1, "num_key_value_heads": 1}),
    ("qwen3", {"rms_norm_eps": 0.1}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"rotary_pct": 0.25}),  # 3 of 12 channels: two pairs
    ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 50}),
    ("gpt_neox", {"rotary_pct": 0.0}),
    ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.75, "rope_theta": 99.0}}),
    ("gpt_neox", {"rope_scaling": LINEAR}),
    ("gpt_neox", {"rope_scaling": DYNAMIC} | SHORT),
    ("gpt_neox", {"attention_bias": False}),
    ("gpt_neox", {"tie_word_embeddings": True}),
    ("gpt_neox", {"hidden_act": "gelu_fast", "layer_norm_eps": 0.1}),
]  # fmt: skip


def made(family: str, changes: dict[str, Any]) -> tuple[dict[str, Any], Weights]:
    config, weights = DECODERS[family]
    config = config | changes
    if family == "qwen3" and config["head_dim"] is None:
        del config["head_dim"]
    return config, weights(config)


def tokens(batch: int = 2, length: int = 33, *, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 61, (batch, length))


def wanted(
    config: dict[str, Any], weights: Weights, ids: np.ndarray, keep: np.ndarray | None = None
) -> np.ndarray:
    run = reference.gpt_neox if config["model_type"] == "gpt_neox" else reference.llama
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    return np.stack([run(config, wide, row, keep) for row in ids])


def steady(config: dict[str, Any], weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their logits, which rounding the weights once moves by under TOLERANCE / 4: of
    others no program in float32 knows more."""
    for seed in range(7, 30):
        rng, ids = np.random.default_rng(seed), tokens(seed=seed)
        want = wanted(config, weights, ids)
        near = {
            name: value * (1 + rng.uniform(-1, 1, value.shape) * 2.0**-24)
            for name, value in weights.items()
        }
        if np.abs(wanted(config, near, ids) - want).max() < TOLERANCE / 4:
            return ids, want
    raise AssertionError("no steady tokens in 23 draws")


@pytest.mark.parametrize(("family", "changes"), CASES, ids=str)
def test_logits_match_reference(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config, weights = made(family, changes)
    model = Model.from_pretrained(save_folder(tmp_path, config, weights))
    ids, want = steady(config, weights)
    got = model(ids)
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("family", list(DECODERS))
def test_every_switch_shows(family: str) -> None:
    """The reference tells all configurations apart, so the test above can fail for each."""
    ids, results = tokens(1), []
    for changes in (changes for name, changes in CASES if name == family):
        results.append(wanted(*made(family, changes), ids))
    for a, b in itertools.combinations(results, 2):
        assert np.abs(a - b).max() > 10 * TOLERANCE


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
@pytest.mark.parametrize("family", list(DECODERS))
def test_stored_types(family: str, dtype: str, tmp_path: Path) -> None:
    config, weights = made(family, {})
    model = Model.from_pretrained(save_folder(tmp_path, config, weights, dtype))
    want = wanted(config, rounded(weights, dtype), tokens())
    np.testing.assert_allclose(model(tokens()), want, rtol=TOLERANCE, atol=TOLERANCE)


def test_families_are_the_blocks_of_llama(tmp_path: Path) -> None:
    """What is left of Mistral and Qwen2 without window and biases is LLaMA, to the bit."""
    weights = llama_weights(LLAMA_CONFIG)
    want = Model.from_pretrained(save_folder(tmp_path / "llama", LLAMA_CONFIG, weights))(tokens())
    mistral = LLAMA_CONFIG | {"model_type": "mistral", "sliding_window": 33}
    model = Model.from_pretrained(save_folder(tmp_path / "mistral", mistral, weights))
    np.testing.assert_array_equal(model(tokens()), want)
    qwen = LLAMA_CONFIG | {"model_type": "qwen2"}
    zeros = {
        f"model.layers.{i}.self_attn.{x}_proj.bias": np.zeros(32 if x == "q" else 8)
        for i in range(3)
        for x in "qkv"
    }
    model = Model.from_pretrained(save_folder(tmp_path / "qwen", qwen, weights | zeros))
    np.testing.assert_array_equal(model(tokens()), want)


# ---- transformers --------------------------------------------------------------------------------

THEIRS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_scaling": LINEAR, "max_position_embeddings": 20}),
    ("llama", {"rope_scaling": DYNAMIC} | SHORT),
    ("llama", {"rope_scaling": YARN} | WIDE),
    ("llama", {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}),
    ("llama", {"rope_scaling": LLAMA3}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None, "rope_parameters": {**YARN, "rope_theta": 500.0}}),
    ("qwen2", {}),
    ("qwen2", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "rope_scaling": YARN, "max_position_embeddings": 12}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.25}),
    ("gpt_neox", {"rope_scaling": DYNAMIC, "tie_word_embeddings": True} | SHORT),
]  # fmt: skip
OWN = [("llama", CASES[0][1]), *((family, {}) for family in DECODERS if family != "llama")]


def oracle(family: str, changes: dict[str, Any], folder: Path, dtype: str = "float32") -> Any:
    """transformers' model of random weights, as saved and read again."""
    torch, transformers = requires("torch"), requires("transformers")
    torch.manual_seed(0)
    known = {k: v for k, v in (DECODERS[family][0] | changes).items() if k != "model_type"}
    config = transformers.AutoConfig.for_model(family, **json.loads(json.dumps(known)))
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    theirs.to(getattr(torch, dtype)).save_pretrained(folder)
    read = transformers.AutoModelForCausalLM.from_pretrained
    return read(folder, dtype=torch.float32).eval()


def logits_of(theirs: Any, ids: np.ndarray, **more: np.ndarray) -> np.ndarray:
    torch = requires("torch")
    with torch.no_grad():
        given = {name: torch.from_numpy(value) for name, value in more.items()}
        result: np.ndarray = theirs(torch.from_numpy(ids), **given).logits.numpy()
    return result


@pytest.mark.promise("A3")
@pytest.mark.parametrize(("family", "changes"), THEIRS, ids=str)
def test_logits_match_transformers(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """At lengths within and beyond the original context."""
    theirs = oracle(family, changes, tmp_path)
    model = Model.from_pretrained(tmp_path)
    for length in (33, 9):
        ids = tokens(length=length)
        want = logits_of(theirs, ids)
        assert np.abs(want).max() > 1
        assert np.abs(model(ids) - want).max() <= TOLERANCE


@pytest.mark.promise("A3")
@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.nightly), "bfloat16"])
@pytest.mark.parametrize(("family", "changes"), OWN, ids=str)
def test_half_files_match_transformers(
    family: str, changes: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    theirs = oracle(family, changes, tmp_path, dtype)
    want = logits_of(theirs, tokens())
    assert np.abs(Model.from_pretrained(tmp_path)(tokens()) - want).max() <= TOLERANCE


@pytest.mark.promise("A3")
@pytest.mark.parametrize(("family", "changes"), OWN, ids=str)
def test_padded_batches_match_transformers(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Right padding: a causal model's tokens do not see it. Left padding: prompts of different
    lengths read together, as for generation."""
    theirs, model = oracle(family, changes, tmp_path), Model.from_pretrained(tmp_path)
    lengths, ids = (33, 20, 1, 9), tokens(4)
    here = np.arange(33) < np.array(lengths)[:, None]
    right = np.where(here, ids, 0)
    want = logits_of(theirs, right, attention_mask=here.astype(np.int64))
    got = model(right)
    for row, n in enumerate(lengths):
        assert np.abs(got[row, :n] - want[row, :n]).max() <= TOLERANCE
    prompts = [row[:n] for row, n in zip(ids, lengths, strict=True)]
    left = np.stack([np.concatenate([np.zeros(33 - len(p), np.int64), p]) for p in prompts])
    mask = here[:, ::-1].astype(np.int64)
    pos = np.maximum(np.cumsum(mask, 1) - 1, 0)
    want = logits_of(theirs, left, attention_mask=mask, position_ids=pos)
    got = Incremental(model, model._layer_specs(None, None), prompts).read()
    assert np.abs(got - want[:, -1]).max() <= TOLERANCE
    want, there = logits_of(theirs, left, attention_mask=mask), mask.astype(bool)
    got = model(left, key_mask=there)
    assert np.abs(got[there] - want[there]).max() <= TOLERANCE


@pytest.mark.promise("A3")
@pytest.mark.parametrize(
    ("family", "changes"), [*OWN, ("llama", CASES[1][1]), ("llama", CASES[3][1])], ids=str
)
def test_generation_matches_transformers(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Greedy, past the window and the original context, token by token; and prompts together.

    Dynamic frequencies follow the longest prompt of a batch in transformers, and each prompt here,
    so that it does not matter what runs beside it: there one prompt is compared.
    """
    torch = requires("torch")
    changes = {**changes, "eos_token_id": None}
    theirs, model = oracle(family, changes, tmp_path), Model.from_pretrained(tmp_path)
    theirs.generation_config.eos_token_id = None
    alone = changes.get("rope_scaling") == DYNAMIC
    lengths = (5,) if alone else (5, 12, 9)
    prompts = [row[:n] for row, n in zip(tokens(3, seed=3), lengths, strict=False)]
    longest = max(lengths)
    left = np.stack([np.concatenate([np.zeros(longest - len(p), np.int64), p]) for p in prompts])
    mask = np.arange(longest) >= longest - np.array(lengths)[:, None]
    with torch.no_grad():
        want = theirs.generate(
            torch.from_numpy(left),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            max_new_tokens=18,
            do_sample=False,
            pad_token_id=0,
        ).numpy()[:, longest:]
    for row, got in zip(want, model.generate(prompts, 18), strict=True):
        np.testing.assert_array_equal(got, row)
    assert len({tuple(row) for row in want}) == len(want) and len(np.unique(want)) > 3


def test_what_runs_beside_does_not_matter(tmp_path: Path) -> None:
    """With frequencies that follow the length, and prompts within and beyond the original."""
    config, weights = made("llama", {"rope_scaling": DYNAMIC} | SHORT)
    model = Model.from_pretrained(save_folder(tmp_path, config, weights))
    prompts = [row[:n] for row, n in zip(tokens(3), (4, 14, 10), strict=True)]
    together = model.generate(prompts, 14)
    for prompt, got in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(got, model.generate(prompt, 14))
    assert len({row.tobytes() for row in together}) == 3


def test_each_token_turns_by_the_length_so_far(tmp_path: Path) -> None:
    """Keys in a cache keep what they were turned by: continuing is not reading at once."""
    config, weights = made("llama", {"rope_scaling": DYNAMIC} | SHORT)
    model = Model.from_pretrained(save_folder(tmp_path, config, weights))
    text, wide = tokens(1)[0], {name: w.astype(np.float64) for name, w in weights.items()}
    prompts = [text[:5], text[:15]]
    want = [reference.llama(config, wide, text, at_once=len(prompt)) for prompt in prompts]
    running = Incremental(model, model._layer_specs(None, None), prompts)
    got = running.read()
    for step in range(18):
        for row, rows, prompt in zip(got, want, prompts, strict=True):
            at = len(prompt) + step
            np.testing.assert_allclose(row, rows[at - 1], rtol=TOLERANCE, atol=TOLERANCE)
        got = running.step([int(text[len(prompt) + step]) for prompt in prompts])
    whole = reference.llama(config, wide, text)
    for rows in want:
        assert np.abs(rows[-1] - whole[-1]).max() > 1e-2


def test_random_parameters_are_spread_as_in_transformers() -> None:
    """Names, shapes and spread of every family's, so that fresh models are alike."""
    torch, transformers = requires("torch"), requires("transformers")
    for name, (config, _) in DECODERS.items():
        torch.manual_seed(0)
        config = config | {"hidden_size": 96, "intermediate_size": 384, "initializer_range": 0.05}
        known = {k: v for k, v in config.items() if k != "model_type"}
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(name, **known)
        )
        family = FAMILIES[name]
        ours = draw_parameters(family, family.read_config(Fields(config)), 0)
        wanted = {
            key.removeprefix(family.prefix): value.detach().numpy()
            for key, value in theirs.named_parameters()
        }
        for memory, file in family.renamed:  # files and models in memory differ in names
            wanted[file] = wanted.pop(memory)
        assert wanted.keys() == ours.keys()
        for key, want in wanted.items():
            assert ours[key].shape == want.shape
            assert abs(ours[key].mean() - want.mean()) < 0.02
            assert ours[key].std() == pytest.approx(want.std(), rel=0.1)


# ---- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(DECODERS))
def test_absent_entries_are_the_defaults_of_transformers(family: str) -> None:
    requires("torch")
    theirs = requires("transformers").AutoConfig.for_model(family)
    ours = FAMILIES[family].read_config(Fields({"model_type": family}))
    heads = theirs.num_attention_heads
    dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
    assert (ours.n_layers, ours.n_heads, ours.head_dim) == (theirs.num_hidden_layers, heads, dim)
    assert ours.n_kv_heads == getattr(theirs, "num_key_value_heads", heads)
    assert (ours.hidden, ours.inner) == (theirs.hidden_size, theirs.intermediate_size)
    assert (ours.vocab_size, ours.context) == (theirs.vocab_size, theirs.max_position_embeddings)
    assert ours.eps == getattr(theirs, "rms_norm_eps", None) or theirs.layer_norm_eps
    assert (ours.activation, ours.tied) == (theirs.hidden_act, theirs.tie_word_embeddings)
    assert ours.init_std == theirs.initializer_range
    turn = theirs.rope_parameters
    share = turn.get("partial_rotary_factor", 1.0)
    assert ours.rope == Rope(turn["rope_theta"], int(dim * share))
    np.testing.assert_allclose(ours.scales, dim**-0.5, rtol=1e-15)
    assert ours.qkv_bias == getattr(theirs, "attention_bias", family == "qwen2")
    assert ours.out_bias == getattr(theirs, "attention_bias", False)
    assert ours.parallel == getattr(theirs, "use_parallel_residual", False)
    assert ours.window(0) == getattr(theirs, "sliding_window", None)


PUBLISHED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (  # Mistral 7B v0.1, and v0.3, whose window is null
        {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768},
        {"windows": (4096,) * 32, "context": 32768, "n_kv_heads": 8},
    ),
    (
        {"model_type": "mistral", "sliding_window": None, "rope_theta": 1000000.0},
        {"windows": (None,) * 32, "rope": Rope(1e6, 128)},
    ),
    (  # Qwen2.5 with YaRN as its page says
        {
            "model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28,
            "num_key_value_heads": 4, "num_hidden_layers": 28, "max_window_layers": 28,
            "rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768,
                             "type": "yarn"},
        },
        {"rope": Rope(1e6, 128, "yarn", 4.0, 32768), "context": 131072, "qkv_bias": True,
         "out_bias": False, "windows": (None,) * 28},
    ),
    (  # Qwen3 0.6B
        {"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128,
         "num_key_value_heads": 8, "num_hidden_layers": 28, "tie_word_embeddings": True},
        {"head_dim": 128, "n_heads": 16, "tied": True, "qkv_bias": False},
    ),
    (  # Llama 3.1 8B
        {
            "model_type": "llama", "num_key_value_heads": 8, "rope_theta": 500000.0,
            "max_position_embeddings": 131072,
            "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        },
        {"rope": Rope(5e5, 128, "llama3", 8.0, 8192), "context": 131072},
    ),
    (  # Pythia 160M
        {"model_type": "gpt_neox", "hidden_size": 768, "num_attention_heads": 12,
         "num_hidden_layers": 12, "intermediate_size": 3072, "rotary_pct": 0.25,
         "rotary_emb_base": 10000, "use_parallel_residual": True, "vocab_size": 50304},
        {"rope": Rope(1e4, 16), "parallel": True, "head_dim": 64, "qkv_bias": True},
    ),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(PUBLISHED)))
def test_published_configurations(number: int) -> None:
    entries, wanted = PUBLISHED[number]
    config = FAMILIES[entries["model_type"]].read_config(Fields(entries))
    assert {name: getattr(config, name) for name in wanted} == wanted


class Watched(dict[str, Any]):
    """Entries that remember which of them were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)


ODD = [
    *(0, -1, 1, 2, 3, 2**31, 2**70, -(2**70), 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *(True, False, "", "7", "\n" * 9, [], [1], [[]], ["full_attention"] * 3, {}, {"a": {"b": 1}}),
    *({"rope_type": "yarn"}, {"type": "dynamic", "factor": 1e308}, {"rope_theta": 0}),
]


@pytest.mark.promise("D4")
@pytest.mark.parametrize("family", list(DECODERS))
def test_odd_entries_are_read_or_refused(family: str) -> None:
    """Every entry that a family reads, with every odd value: a configuration, or one sentence that
    names an entry and a remedy."""
    base, refused = DECODERS[family][0], 0
    watched = Watched(base)
    FAMILIES[family].read_config(Fields(watched))
    assert len(watched.asked) > 12
    for name in watched.asked:
        for value in ODD:
            try:
                config = FAMILIES[family].read_config(Fields(base | {name: value}))
            except FileError as error:
                message, refused = str(error), refused + 1
                assert re.match("config.json: .*: (give|known are|add|set) ", message)
                assert "\n" not in message and len(message) < 300
            else:
                assert config.rope is None or np.isfinite(config.rope.frequencies(10**6)).all()
    assert refused > len(watched.asked) * len(ODD) / 2
