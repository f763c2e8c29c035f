"""A model's own sliding windows: what any spec may choose among, in one call and token by token."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SPECS
from reference import models as reference
from tiny_decoders import MISTRAL_CONFIG, QWEN2_CONFIG, qwen2_weights
from tiny_models import llama_weights, save_folder

import sparseattn as sa
from sparseattn import _core
from sparseattn.errors import FileError
from sparseattn.models import Model
from sparseattn.models.incremental import Incremental
from sparseattn.models.windows import band, cached, stays_inside
from sparseattn.variants.base import Variant

WINDOW = 7  # of MISTRAL_CONFIG
IDS = np.random.default_rng(3).integers(0, 61, (2, 40))
MODEL_SPECS = [
    *(s for s in SPECS if not s.arrays and not isinstance(s, sa.PerHead)),
    sa.PerHead(["topk:3", "window:4:sinks=2", "dense", "topk:3:placement=post"] * 2),
]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    weights = llama_weights(MISTRAL_CONFIG)
    return Model.from_pretrained(save_folder(tmp_path, MISTRAL_CONFIG, weights))


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 300), (3, 7), (7, 7), (63, 64), (65, 257), (257, 257)]
)
@pytest.mark.parametrize("window", [1, 2, 7, 64, 256, None])
def test_a_band_is_the_definition(window: int | None, shape: tuple[int, int]) -> None:
    """Together with causality: a row sees itself and the window - 1 keys before it."""
    n_q, n_k = shape
    at = np.arange(n_q)[:, None] + n_k - n_q
    causal = np.arange(n_k) <= at
    want = causal if window is None else causal & (np.arange(n_k) > at - window)
    mask = band(window, n_q, n_k)
    if window is None or window >= n_k:
        assert mask is None and (want == causal).all()
        return
    assert mask is not None and mask.shape == shape
    np.testing.assert_array_equal(mask & causal, want)
    assert mask.strides == (-1, 1)  # a view of one row


@pytest.mark.parametrize("spec", MODEL_SPECS, ids=str)
def test_a_spec_chooses_in_the_window(model: Model, spec: Variant) -> None:
    seen = np.tri(40, dtype=bool) & ~np.tri(40, k=-WINDOW, dtype=bool)
    layers = []

    def look(layer: int, plan: sa.Plan) -> None:
        mask = plan.to_mask()
        assert not (mask & ~seen).any()
        assert plan.count().visible == 2 * 8 * seen.sum()
        layers.append(layer)
        if isinstance(plan.spec, sa.Dense):
            assert (mask == seen).all() and plan.kept_share == 1.0
        if plan.spec == sa.TopK(8):
            assert (mask.sum(-1) == seen.sum(-1)).all()  # eight of the seven there are

    model.hidden(IDS, spec, on_attend=look)
    assert layers == [0, 1, 2]


def test_the_best_keys_of_the_window(model: Model) -> None:
    """Not those of all keys that lie in the window: every row has its three."""
    counts = []
    model.hidden(IDS, "topk:3", on_attend=lambda _, plan: counts.append(plan.to_mask().sum(-1)))
    for count in counts:
        assert (count == np.minimum(3, np.arange(40) + 1)).all()


@pytest.mark.parametrize("spec", MODEL_SPECS, ids=str)
@pytest.mark.promise("A5")
def test_token_by_token_is_the_whole_text(model: Model, spec: Variant) -> None:
    """For prompts shorter and longer than the window, read together."""
    lengths = (3, 20, 7, 20)
    texts = [np.roll(IDS.reshape(-1), n * 5)[: n + 12] for n in range(1, 5)]
    texts = [np.resize(text, n + 12) for text, n in zip(texts, lengths, strict=True)]
    whole = [model(text, attention=spec) for text in texts]
    prompts = [text[:n] for text, n in zip(texts, lengths, strict=True)]
    running = Incremental(model, [spec.layer(i) for i in range(3)], prompts)
    got = running.read()
    for step in range(12):
        for row, p in zip(got, running.prompts, strict=True):
            np.testing.assert_allclose(row, whole[p][lengths[p] + step - 1], atol=3e-5)
        got = running.step([int(texts[p][lengths[p] + step]) for p in running.prompts])


def test_a_narrower_spec_is_the_reference_under_both(model: Model) -> None:
    wide = {n: v.astype(np.float64) for n, v in llama_weights(MISTRAL_CONFIG).items()}
    for spec, left, sinks in (("window:3", 3, 0), ("window:20", 20, 0), ("window:3:sinks=2", 3, 2)):
        keep = np.tri(40, dtype=bool) & ~np.tri(40, k=-left, dtype=bool)
        keep[:, :sinks] |= np.tri(40, sinks, dtype=bool)
        want = reference.llama(MISTRAL_CONFIG, wide, IDS[0], keep)
        np.testing.assert_allclose(model(IDS[0], spec), want, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(model(IDS, "window:20"), model(IDS), rtol=2e-5, atol=2e-5)
    assert np.abs(model(IDS, "window:6") - model(IDS)).max() > 1e-3


def test_what_a_cache_keeps() -> None:
    """All of a window is a window, whose cache forgets; other specs are masked where they reach."""
    assert cached(sa.Dense(), 7) == sa.Window(7) and cached(sa.Dense(), None) == sa.Dense()
    assert cached(sa.TopK(3), 7) == sa.TopK(3)
    for spec, inside in (("window:7", True), ("window:8", False), ("dense", False),
                         ("window:3:sinks=1", False), ("topk:3", False),
                         ("window:3+window:5", True)):  # fmt: skip
        assert stays_inside(sa.parse(spec), 7) == inside
        assert stays_inside(sa.parse(spec), None)


def test_caches_forget(tmp_path: Path) -> None:
    """Of 500 tokens, the layers with a window keep a few."""
    config = QWEN2_CONFIG | {"max_position_embeddings": 600, "max_window_layers": 2}
    model = Model.from_pretrained(save_folder(tmp_path, config, qwen2_weights(config)))
    running = Incremental(model, model._layer_specs(None, None), [np.resize(IDS, 500)])
    running.read()
    for token in range(20):
        running.step([token])
    sizes = [cache.nbytes for cache in running.groups[0].caches]
    assert sizes[0] == sizes[1] > 10 * sizes[2]


def test_prefill_is_never_n_by_n(tmp_path: Path, clean_memory: None) -> None:
    """4,096 tokens: a mask of all pairs alone would take 16 MiB."""
    config = MISTRAL_CONFIG | {"max_position_embeddings": 4096, "num_hidden_layers": 1,
                               "sliding_window": 100}  # fmt: skip
    model = Model.from_pretrained(save_folder(tmp_path, config), random_weights=0)
    ids = np.zeros(4096, np.int64)
    for spec in ("dense", "window:64:sinks=2", "topk:16"):
        model.hidden(ids[:8], spec)
        _core.trim()
        _core.peak_reset()
        resting = _core.live_bytes()
        tracemalloc.start()
        model.hidden(ids, spec)
        numpy_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert numpy_peak < 8 * 2**20
        assert _core.peak_bytes() - resting < 8 * 2**20


def test_windows_differ_by_layer(tmp_path: Path) -> None:
    config = QWEN2_CONFIG | {"layer_types": ["full_attention", "sliding_attention"] * 2,
                             "num_hidden_layers": 4, "sliding_window": 3}  # fmt: skip
    model = Model.from_pretrained(save_folder(tmp_path, config, qwen2_weights(config)))
    assert model.config.windows == (None, 3, None, 3)
    kept: list[int] = []
    model.hidden(IDS[0], on_attend=lambda _, plan: kept.append(int(plan.to_mask()[0, 0, -1].sum())))
    assert kept == [40, 3, 40, 3]


HOSTILE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (MISTRAL_CONFIG, {"sliding_window": 0}, "sliding_window is 0: give an integer from 1"),
    (MISTRAL_CONFIG, {"sliding_window": -1}, "sliding_window is -1: give an integer from 1"),
    (MISTRAL_CONFIG, {"sliding_window": 4096.0}, "sliding_window is 4096.0: give an integer"),
    (MISTRAL_CONFIG, {"sliding_window": True}, "sliding_window is True: give an integer"),
    (MISTRAL_CONFIG, {"sliding_window": 2**70}, "give an integer from 1 to 16777216"),
    (QWEN2_CONFIG, {"sliding_window": "7"}, "sliding_window is '7': give an integer"),
    (QWEN2_CONFIG, {"use_sliding_window": 1}, "use_sliding_window is 1: give true or false"),
    (QWEN2_CONFIG, {"max_window_layers": -1}, "max_window_layers is -1: give an integer from 0"),
    (QWEN2_CONFIG, {"max_window_layers": 2.5}, "max_window_layers is 2.5: give an integer"),
    (QWEN2_CONFIG, {"layer_types": "full"}, "layer_types is 'full': give a list of 3, one a layer"),
    (QWEN2_CONFIG, {"layer_types": []}, "layer_types is []: give a list of 3, one a layer"),
    (
        QWEN2_CONFIG,
        {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
        "layer_types has 'linear_attention': known are full_attention, sliding_attention",
    ),
    (QWEN2_CONFIG, {"layer_types": [["full_attention"]] * 3}, "layer_types has ['full_attention']"),
    (
        QWEN2_CONFIG,
        {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False},
        "layer_types has 'sliding_attention': set use_sliding_window and a sliding_window",
    ),
]


@pytest.mark.promise("D4")
@pytest.mark.parametrize(("config", "changes", "sentence"), HOSTILE, ids=str)
def test_nonsense(
    config: dict[str, Any], changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    folder = save_folder(tmp_path, config | changes)
    with pytest.raises(FileError) as caught:
        Model.from_pretrained(folder, random_weights=0)
    message = str(caught.value)
    assert message.startswith("config.json: ") and sentence in message and "\n" not in message


def test_a_window_that_is_off_is_not_read(tmp_path: Path) -> None:
    """Published files carry one that nothing uses."""
    config = QWEN2_CONFIG | {"use_sliding_window": False, "sliding_window": 0}
    model = Model.from_pretrained(save_folder(tmp_path, config), random_weights=0)
    assert model.config.windows == (None,) * 3
