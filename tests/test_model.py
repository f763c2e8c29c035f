"""`Model` for every family: tokens, specs, causality, memory, threads, random parameters."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SPECS, requires
from reference import models as reference
from tiny_models import GPT2_CONFIG, LLAMA_CONFIG, gpt2_weights, llama_weights, save_folder

import sparseattn as sa
from sparseattn import _core
from sparseattn.errors import ArgumentError, DtypeError, FileError
from sparseattn.models import Model, network
from sparseattn.models.model import FAMILIES
from sparseattn.variants.base import Variant

CONFIGS = {"gpt2": GPT2_CONFIG, "llama": LLAMA_CONFIG}
WEIGHTS = {"gpt2": gpt2_weights, "llama": llama_weights}
# What a model takes by spec alone: arrays of a variant and counts of heads belong to one model.
MODEL_SPECS = [s for s in SPECS if not s.arrays and not isinstance(s, sa.PerHead)]


@pytest.fixture(params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def model(family: str, tmp_path: Path) -> Model:
    config = CONFIGS[family]
    return Model.from_pretrained(save_folder(tmp_path, config, WEIGHTS[family](config)))


IDS = np.random.default_rng(3).integers(0, 61, (2, 40))


def test_shapes_and_kinds_of_tokens(model: Model) -> None:
    """1-D gives no batch axis; lists and every integer type say the same."""
    full = model(IDS)
    assert full.shape == (2, 40, 61) and full.dtype == np.float32
    hidden = model.hidden(IDS)
    assert hidden.shape == (2, 40, model.config.hidden)
    np.testing.assert_array_equal(model.head(hidden), full)
    np.testing.assert_array_equal(model(IDS.tolist()), full)
    for dtype in (np.int32, np.uint8, np.uint64, ">i2"):
        np.testing.assert_array_equal(model(IDS.astype(dtype)), full)
    np.testing.assert_array_equal(model(IDS[:, ::-1][:, ::-1]), full)
    one = model(IDS[0])
    assert one.shape == (40, 61)
    np.testing.assert_allclose(one, full[0], atol=2e-5)
    assert model([5]).shape == (1, 61)


def test_head_of_some_rows(model: Model) -> None:
    hidden = model.hidden(IDS)
    full = model.head(hidden)
    np.testing.assert_allclose(model.head(hidden[:, ::-7]), full[:, ::-7], atol=2e-5)
    np.testing.assert_allclose(model.head(hidden[1, 3]), full[1, 3], atol=2e-5)
    assert model.head(hidden[0, :0]).shape == (0, 61)
    with pytest.raises(DtypeError, match="rows is float64: give the float32 states"):
        model.head(hidden.astype(np.float64))
    with pytest.raises(ArgumentError, match=r"rows has shape \(2, 40, 61\): its last axis must be"):
        model.head(full)


@pytest.mark.parametrize(
    ("tokens", "error", "sentence"),
    [
        ([], ArgumentError, r"tokens has shape \(0,\): give \(length,\) or \(batch, length\)"),
        (5, ArgumentError, r"tokens has shape \(\): give"),
        ([[[1]]], ArgumentError, r"tokens has shape \(1, 1, 1\): give"),
        ([[1], [1, 2]], ArgumentError, "tokens has rows of different lengths: pad or split"),
        ([1.0], DtypeError, "tokens is float64: give integers"),
        ([True], DtypeError, "tokens is bool: give integers"),
        (["a"], DtypeError, "tokens is <U1: give integers"),
        ("abc", DtypeError, r"tokens is a str: give model\.tokenizer\.encode"),
        ([2**70], DtypeError, "tokens is object: give integers"),
        ([1, 61], ArgumentError, "tokens holds 61: this model's ids are 0 to 60"),
        ([1, -1], ArgumentError, "tokens holds -1: this model's ids are 0 to 60"),
        (np.array([2**63], np.uint64), ArgumentError, "tokens holds 9223372036854775808: this"),
        ([1] * 49, ArgumentError, "tokens has length 49, but this model has 48 positions"),
    ],
)
def test_bad_tokens(model: Model, tokens: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        model(tokens)


def test_full_context_is_allowed(model: Model) -> None:
    assert model([1] * 48).shape == (48, 61)


@pytest.mark.promise("A4")
@pytest.mark.parametrize("spec", MODEL_SPECS, ids=str)
def test_a_later_token_changes_no_earlier_bit(model: Model, spec: Variant) -> None:
    before = model(IDS, attention=spec)
    for j in (1, 17, 39):
        changed = IDS.copy()
        changed[:, j] = (changed[:, j] + 1) % 61
        after = model(changed, attention=spec)
        np.testing.assert_array_equal(after[:, :j], before[:, :j])
        assert (after[:, j] != before[:, j]).any()


@pytest.mark.parametrize("spec", MODEL_SPECS, ids=str)
def test_threads_change_no_bit(model: Model, spec: Variant, with_threads: Any) -> None:
    results = []
    for n in (1, 2, 3, 5):
        with_threads(n)
        results.append(model(IDS, attention=spec))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_instruction_sets_agree(family: str, tmp_path: Path, isa: str, threads: int) -> None:
    config = CONFIGS[family]
    weights = WEIGHTS[family](config)
    got = Model.from_pretrained(save_folder(tmp_path, config, weights))(IDS)
    run = getattr(reference, family)
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    want = np.stack([run(config, wide, row) for row in IDS])
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_a_window_is_what_the_reference_sees(model: Model, family: str) -> None:
    """A sparse spec through all layers, against float64 under the same mask."""
    weights = WEIGHTS[family](CONFIGS[family])
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    keep = np.tri(40, dtype=bool) & ~np.tri(40, k=-5, dtype=bool)
    want = getattr(reference, family)(CONFIGS[family], wide, IDS[0], keep)
    got = model(IDS[0], attention="window:5")
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert np.abs(got - model(IDS[0])).max() > 1e-2


def test_per_layer(model: Model) -> None:
    """The mapping, PerLayer and on_attend agree on which layer runs what."""
    seen: list[tuple[int, str]] = []

    def watch(layer: int, plan: sa.Plan) -> None:
        assert plan.count().visible == 2 * model.config.n_heads * 40 * 41 // 2
        seen.append((layer, str(plan.spec)))

    mixed = model.hidden(IDS, "window:5", {0: "dense", 2: sa.TopK(3)}, watch)
    assert seen == [(0, "dense"), (1, "window:5"), (2, "topk:3")]
    same = model.hidden(IDS, sa.PerLayer({0: "dense", 1: "window:5", 2: "topk:3"}))
    np.testing.assert_array_equal(mixed, same)
    assert (mixed != model.hidden(IDS, "window:5")).any()
    np.testing.assert_array_equal(model(IDS), model(IDS, sa.Dense()))
    for layer in (3, -1, "0", True):
        with pytest.raises(ArgumentError, match=f"per_layer names layer {layer!r}: layers are 0"):
            model(IDS, per_layer={layer: "dense"})  # type: ignore[dict-item]
    for per_layer in ("dense", ["dense"]):
        with pytest.raises(ArgumentError, match=r"per_layer is .*give specs by layer"):
            model(IDS, per_layer=per_layer)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="unknown attention variant"):
        model(IDS, attention="windowing:5")


def test_without_a_folder_it_is_the_embedded_model() -> None:
    model = Model.from_pretrained()
    assert model.tokenizer is not None and model.config.context == 512
    with pytest.raises(DtypeError, match="folder is a Model: give a folder's name"):
        Model.from_pretrained(model)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="a spec is an object such as"):
        sa.compare(attention=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_words_of_elsewhere_are_answered(model: Model, method: str) -> None:
    run = getattr(model, method)
    for word, right in (("max_length", "max_new_tokens"), ("do_sample", "temperature"),
                        ("spec", "attention"), ("max_newtokens", "max_new_tokens"),
                        ("colour", "one of max_new_tokens")):  # fmt: skip
        match = rf"{method}\(\) has no argument {word}: use {right}"
        with pytest.raises(sa.UnknownArgument, match=match):
            run([1, 2], **{word: 1})
    with pytest.raises(DtypeError, match="prompt is a mapping: give its ids"):
        run({"input_ids": [1, 2]})


def test_watching_changes_no_bit(model: Model) -> None:
    kept = [0]
    got = model.hidden(IDS, "topk:4", on_attend=lambda _, plan: kept.append(plan.count().kept))
    np.testing.assert_array_equal(got, model.hidden(IDS, "topk:4"))
    rows = np.minimum(np.arange(1, 41), 4).sum()
    assert sum(kept) == 3 * 2 * model.config.n_heads * rows


def test_inputs_are_not_changed(model: Model) -> None:
    ids = IDS.copy()
    ids.flags.writeable = False
    before = {name: value.copy() for name, value in model._values.items()}
    model(ids)
    for name, value in model._values.items():
        np.testing.assert_array_equal(value, before[name])


def test_prefill_is_never_n_by_n(family: str, tmp_path: Path, clean_memory: None) -> None:
    """4,096 tokens, 8 heads: one head's scores alone would take 64 MiB."""
    small = {"n_positions": 4096, "n_head": 8, "n_layer": 1}
    wide = {"max_position_embeddings": 4096, "num_hidden_layers": 1}
    config = CONFIGS[family] | (small if family == "gpt2" else wide)
    model = Model.from_pretrained(save_folder(tmp_path, config), random_weights=0)
    ids = np.zeros(4096, np.int64)
    for spec in ("dense", "window:64", "topk:16"):
        model.hidden(ids[:8], spec)
        _core.trim()
        _core.peak_reset()
        resting = _core.live_bytes()
        tracemalloc.start()
        model.hidden(ids, spec)
        numpy_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert numpy_peak < 16 * 2**20
        assert _core.peak_bytes() - resting < 16 * 2**20


def test_random_parameters(family: str, tmp_path: Path) -> None:
    """By seed, addressed by name: a change of depth leaves the first layers as they are."""
    config = CONFIGS[family] | {"initializer_range": 0.05}
    folder = save_folder(tmp_path / "a", config)
    one, same = (Model.from_pretrained(folder, random_weights=5) for _ in range(2))
    other = Model.from_pretrained(folder, random_weights=6)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    np.testing.assert_array_equal(one(IDS), same(IDS))
    deeper = config | {"n_layer": 5, "num_hidden_layers": 5}
    deep = Model.from_pretrained(save_folder(tmp_path / "b", deeper), random_weights=5)
    for name, value in one._values.items():
        if not (family == "gpt2" and "c_proj.weight" in name):  # scaled by depth
            np.testing.assert_array_equal(value, deep._values[name])
    assert np.isfinite(one(IDS)).all()


def test_random_parameters_are_spread_as_in_transformers(family: str, tmp_path: Path) -> None:
    torch, transformers = requires("torch"), requires("transformers")
    torch.manual_seed(0)
    if family == "gpt2":
        config: dict[str, Any] = GPT2_CONFIG | {"n_embd": 96, "n_inner": None}
    else:
        config = LLAMA_CONFIG | {"hidden_size": 96, "intermediate_size": 384}
    known = {k: v for k, v in config.items() if k != "model_type"}
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **known)
    )
    ours = Model.from_pretrained(save_folder(tmp_path, config), random_weights=0)
    wanted = {
        name.removeprefix(FAMILIES[family].prefix): value.detach().numpy()
        for name, value in theirs.named_parameters()
    }
    assert wanted.keys() == ours._values.keys()
    for name, want in wanted.items():
        got = ours._values[name]
        assert got.shape == want.shape
        if want.std() == 0:
            np.testing.assert_array_equal(got, want)
        else:
            assert abs(got.std() / want.std() - 1) < 0.1 and abs(got.mean()) < 0.1 * got.std()


def test_fingerprint(family: str, tmp_path: Path) -> None:
    """Of what is computed: not of the file's names, of every weight and switch."""
    config = CONFIGS[family]
    weights = WEIGHTS[family](config)
    name = "norm.weight" if family == "llama" else "ln_f.weight"
    prefix = FAMILIES[family].prefix
    changed = weights | {prefix + name: weights[prefix + name] + 1e-3}
    bare = {key.removeprefix(prefix): value for key, value in weights.items()}
    eps = {"layer_norm_epsilon": 1e-4, "rms_norm_eps": 1e-4}
    prints = [
        Model.from_pretrained(save_folder(tmp_path / str(i), c, w)).fingerprint
        for i, (c, w) in enumerate(
            [
                (config, weights),
                (config | {"transformers_version": "9"}, bare),
                (config, changed),
                (config | eps, weights),
            ]
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3 and all(len(p) == 64 for p in prints)


def test_mapped_and_copied_files_agree(model: Model) -> None:
    assert model.folder is not None
    copied = Model.from_pretrained(model.folder, mmap=False)
    (model.folder / "model.safetensors").unlink()
    np.testing.assert_array_equal(copied(IDS), model(IDS))


def test_a_tokenizer_from_elsewhere(model: Model, tmp_path: Path) -> None:
    from test_tokenizer import save_pair

    assert model.tokenizer is None and model.folder is not None
    other = Model.from_pretrained(model.folder, tokenizer=save_pair(tmp_path / "tokenizer"))
    assert other.tokenizer is not None and other.tokenizer.decode([66]) == "B"
    with pytest.raises(FileError, match=r"has neither tokenizer\.json nor vocab\.json with merges"):
        Model.from_pretrained(model.folder, tokenizer=model.folder)


def test_repr_names_the_shape(model: Model, family: str) -> None:
    text = repr(model)
    assert text.startswith(f"Model({family}, ") and "61 tokens, context 48" in text
    assert f"{model.n_parameters:,} parameters" in text
    assert ("8 heads over 2 of 4" in text) == (family == "llama")


def test_heads_are_views() -> None:
    """From the projections to attention nothing is copied."""
    rows = np.zeros((2 * 5, 3 * 24), np.float32)
    part = rows[:, 24:48]
    view = network.by_head(part.reshape(10, -1, 8), 2)
    assert view.shape == (2, 3, 5, 8) and np.shares_memory(view, rows)
    view[1, 2, 4] = 1
    assert rows[9, 40:48].all() and rows.sum() == 8
