"""Checkpoints of float16 and bfloat16: kept so in memory, the same model as widened."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import models as reference
from tiny_models import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    gpt2_weights,
    llama_weights,
    pack_tensors,
    rounded,
    save_folder,
)

from sparseattn import _core
from sparseattn.errors import ArgumentError
from sparseattn.models import Model

FAMILIES = {"gpt2": (GPT2_CONFIG, gpt2_weights), "llama": (LLAMA_CONFIG, llama_weights)}
KINDS = {"F16": np.dtype(np.float16), "BF16": np.dtype(np.uint16)}
IDS = np.random.default_rng(3).integers(0, 61, (2, 40))


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def tiles() -> Iterator[None]:
    """Products without OpenBLAS, whose bits depend on more than the numbers."""
    carried = sorted(Path(_core.__file__).with_name("_libs").glob("libscipy_openblas*"))
    _core.set_blas_path(None)
    yield
    _core.set_blas_path(str(carried[0]) if carried else None)


def folder_of(path: Path, family: str, kind: str, **changes: Any) -> Path:
    config, weights = FAMILIES[family]
    config = config | changes
    values = weights(config)
    if not config.get("tie_word_embeddings", family == "gpt2"):
        rng = np.random.default_rng(7)
        embed = values[
            "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
        ]
        values["lm_head.weight"] = rng.standard_normal(embed.shape).astype(np.float32)
    return save_folder(path, config, values, dtype=kind)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_logits_are_those_of_widened_weights(
    family: str, kind: str, tied: bool, mmap: bool, tmp_path: Path, tiles: None, isa: str
) -> None:
    """To the bit, on the tiles; every matrix is as stored, every vector float32."""
    path = folder_of(tmp_path, family, kind, tie_word_embeddings=tied)
    half = Model.from_pretrained(path, mmap=mmap)
    wide = Model.from_pretrained(path, mmap=mmap, dtype="float32")
    for name, value in half._values.items():
        assert value.dtype == (KINDS[kind] if value.ndim == 2 else np.float32), name
        assert wide._values[name].dtype == np.float32
    np.testing.assert_array_equal(half(IDS), wide(IDS))
    np.testing.assert_array_equal(half(IDS[0, :1]), wide(IDS[0, :1]))
    np.testing.assert_array_equal(half(IDS, "topk:5"), wide(IDS, "topk:5"))


def test_logits_with_the_library(family: str, kind: str, tmp_path: Path) -> None:
    """OpenBLAS, which takes float32 weights, sums in another order than the tiles: neither is
    further from float64 than the other."""
    path = folder_of(tmp_path, family, kind)
    forward = getattr(reference, family)
    weights = reference.read_safetensors(path / "model.safetensors")
    want = np.stack([forward(FAMILIES[family][0], weights, ids) for ids in IDS])
    errors = [
        np.sqrt(np.mean((Model.from_pretrained(path, dtype=dtype)(IDS) - want) ** 2))
        for dtype in (None, "float32")
    ]
    assert max(errors) <= 2 * min(errors) <= 2e-6 * np.abs(want).max()


def test_the_fingerprint_is_of_the_numbers(family: str, kind: str, tmp_path: Path) -> None:
    """As stored, widened, or saved as float32: one model."""
    path = folder_of(tmp_path / "half", family, kind)
    config, weights = FAMILIES[family]
    config = json.loads((path / "config.json").read_text())
    same = save_folder(tmp_path / "wide", config, rounded(weights(config), kind))
    prints = [Model.from_pretrained(path, dtype=dtype).fingerprint for dtype in (None, "float32")]
    if config.get("tie_word_embeddings", family == "gpt2"):
        prints.append(Model.from_pretrained(same).fingerprint)
    assert len(set(prints)) == 1


def test_files_of_several_types(kind: str, tmp_path: Path) -> None:
    """Norms in float32 beside matrices of half precision, as training programs save them."""
    values = gpt2_weights(GPT2_CONFIG)
    want = Model.from_pretrained(save_folder(tmp_path / "pure", GPT2_CONFIG, values, dtype=kind))
    data = pack_tensors(values, {n: kind if v.ndim == 2 else "F32" for n, v in values.items()})
    mixed = Model.from_pretrained(save_folder(tmp_path / "mixed", GPT2_CONFIG, data))
    for name, value in mixed._values.items():
        assert value.dtype == want._values[name].dtype
    np.testing.assert_array_equal(mixed._values["wte.weight"], want._values["wte.weight"])
    assert not np.array_equal(mixed._values["ln_f.weight"], want._values["ln_f.weight"])
    assert np.isfinite(mixed(IDS)).all()


@pytest.mark.parametrize("mmap", [True, False])
def test_no_float32_copy_in_memory(kind: str, mmap: bool, tmp_path: Path) -> None:
    """Loading and a call take little beside the file; without the map, the file once."""
    config = GPT2_CONFIG | {"n_embd": 256, "vocab_size": 4000, "n_head": 4, "n_inner": None}
    path = save_folder(tmp_path, config, gpt2_weights(config), dtype=kind)
    size = (path / "model.safetensors").stat().st_size
    tracemalloc.start()
    model = Model.from_pretrained(path, mmap=mmap)
    model.hidden(IDS)
    _ = model.fingerprint
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held <= (0 if mmap else size) + size // 8
    assert peak <= (0 if mmap else size) + (6 << 20)  # the fingerprint widens 4 MiB at a time


@pytest.mark.parametrize("dtype", ["float16", "float64", np.float32, 1])
def test_other_dtypes_are_refused(dtype: Any, tmp_path: Path) -> None:
    path = folder_of(tmp_path, "gpt2", "F16")
    with pytest.raises(ArgumentError, match="give 'float32', or None for the weights as stored"):
        Model.from_pretrained(path, dtype=dtype)
