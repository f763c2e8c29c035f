"""Rotary positions: frequencies against float64 formulas and transformers' own, in every spelling
of config.json; and what is no position at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import requires
from reference import positions as reference
from tiny_decoders import NEOX_CONFIG
from tiny_models import LLAMA_CONFIG, llama_weights, save_folder

from sparseattn.errors import FileError
from sparseattn.models import Model
from sparseattn.models.fields import Fields
from sparseattn.models.rope import read_rope
from sparseattn.positions import Rope

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
SECTIONS: list[dict[str, Any]] = [
    {},
    {"rope_type": "default"},
    {"type": "linear", "factor": 2.5},
    {"rope_type": "linear", "type": "yarn", "factor": 4},  # the newer name wins
    {"rope_type": "dynamic", "factor": 2.0},
    {"type": "dynamic", "factor": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "beta_slow": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 3.0, "beta_slow": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 100},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 3},
    {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 64},
    {"type": "llama3", **LLAMA3},
    {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 0.25, "high_freq_factor": 30},
]
CONTEXT = 400


def read(
    section: dict[str, Any], dim: int, name: str = "rope_parameters", **entries: Any
) -> tuple[Rope, int]:
    rope, context = read_rope(Fields({name: section, **entries}), dim, CONTEXT)
    assert rope is not None
    return rope, context


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("section", SECTIONS, ids=str)
@pytest.mark.parametrize("dim", [4, 6, 10, 128])
def test_frequencies(section: dict[str, Any], name: str, dim: int) -> None:
    for theta in (10000.0, 500_000.0, 7.5):
        rope, _ = read(section, dim, name, rope_theta=theta)
        assert rope.attention == pytest.approx(reference.attention(section, CONTEXT), rel=1e-15)
        for length in (0, 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT):
            got = rope.frequencies(length)
            want = reference.frequencies(section, theta, dim, CONTEXT, length)
            assert got.dtype == np.float64
            np.testing.assert_allclose(got, want, rtol=1e-13, atol=0)


@pytest.mark.promise("A3")
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("section", SECTIONS[2:], ids=str)
def test_frequencies_are_those_of_transformers(section: dict[str, Any], name: str) -> None:
    """Theirs are float32; both read the same entries, of old and of new files."""
    requires("torch")
    transformers = requires("transformers")
    rules = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
    shape = {"hidden_size": 96, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
    theirs = transformers.LlamaConfig(**shape, rope_theta=5000.0, **{name: dict(section)})
    rope, _ = read(section, 24, name, rope_theta=5000.0)
    for length in (CONTEXT, 3 * CONTEXT):
        want, growth = rules[theirs.rope_parameters["rope_type"]](theirs, "cpu", seq_len=length)
        np.testing.assert_allclose(rope.frequencies(length), want.numpy(), rtol=2e-6)
        assert rope.attention == pytest.approx(growth, rel=1e-12)


def test_a_base_next_to_one() -> None:
    """Whose ramp would begin far beyond all channels, or beyond the integers."""
    for beta in ({}, {"beta_fast": 1e-3, "beta_slow": 1e-3}):
        rope, _ = read({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1 + 2**-52, **beta}, 128)
        assert set(rope.frequencies().round(9)) <= {1.0, 0.25}


def test_sections_differ() -> None:
    """The formulas tell the kinds apart, so that the tests above can fail for each."""
    tables = []
    for section in (SECTIONS[i] for i in (0, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 16, 17, 18)):
        w = reference.frequencies(section, 1e4, 64, CONTEXT, 3 * CONTEXT)
        tables.append(w * reference.attention(section, CONTEXT))
    for i, a in enumerate(tables):
        for b in tables[:i]:
            assert np.abs(a / b - 1).max() > 1e-3


def test_the_fast_channels_stay_and_the_slow_ones_are_squeezed() -> None:
    """To the bit: yarn and llama3 change nothing where a channel turns often enough."""
    plain = Rope(1e4, 64).frequencies()
    turns = plain * 400 / (2 * math.pi)
    yarn = Rope(1e4, 64, "yarn", 4.0, 400, beta_fast=16.0).frequencies()
    llama3 = Rope(1e4, 64, "llama3", 4.0, 400).frequencies()
    for scaled, fast in ((yarn, turns > 32), (llama3, turns > 4)):
        slow = turns < 0.5
        assert fast.any() and slow.any() and not (fast | slow).all()
        np.testing.assert_array_equal(scaled[fast], plain[fast])
        np.testing.assert_array_equal(scaled[slow], plain[slow] / 4)
        assert (np.diff(scaled) < 0).all()


def test_dynamic_begins_where_the_original_ends() -> None:
    rope = Rope(1e4, 16, "dynamic", 2.0, original=48)
    plain = Rope(1e4, 16).frequencies()
    for length in (0, 1, 48):
        assert not rope.follows_length(length)
        np.testing.assert_array_equal(rope.frequencies(length), plain)
    longer = [rope.frequencies(n) for n in (49, 96, 480)]
    assert all(w[0] == 1.0 for w in longer)  # the fastest channel stays
    # the slowest is squeezed by factor * length / original - (factor - 1)
    for w, stretch in zip(longer, (2 * 49 / 48 - 1, 3.0, 19.0), strict=True):
        assert w[-1] == pytest.approx(plain[-1] / stretch, rel=1e-13)


def test_tables_are_rounded_once() -> None:
    """At position 10^5 a float32 angle is off by up to 4e-3, ours by its rounding."""
    rope = Rope(1e4, 8, "yarn", 4.0, 32, attention_factor=1.5)
    pos = np.array([0, 1, 99_999, 7])
    cos, sin = rope.tables(pos)
    assert cos.dtype == sin.dtype == np.float32 and cos.shape == (4, 4)
    for row, p in enumerate(pos):
        for t, w in enumerate(rope.frequencies()):
            assert abs(cos[row, t] - 1.5 * math.cos(p * w)) <= 1e-7
            assert abs(sin[row, t] - 1.5 * math.sin(p * w)) <= 1e-7


def test_a_part_of_each_head() -> None:
    """An odd number of channels is rounded up, and its frequencies are those of the odd one."""
    known = {"theta": "rotary_emb_base", "share": "rotary_pct", "default_share": 0.25}

    def rotary(head_dim: int, **entries: Any) -> Rope | None:
        return read_rope(Fields(entries), head_dim, 48, partial=True, **known)[0]  # type: ignore[arg-type]

    rope = rotary(12)
    assert rope == Rope(10000.0, 3)
    np.testing.assert_allclose(rope.frequencies(), [1, 10000 ** (-2 / 3)], rtol=1e-15)
    assert rotary(12, rotary_pct=1.0, rotary_emb_base=50) == Rope(50.0, 12)
    assert rotary(12, rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 9.0}) == Rope(
        9.0, 6
    )
    assert rotary(12, rotary_pct=0) is None and rotary(3) is None


@pytest.mark.parametrize(
    ("section", "longest"),
    [
        ({"rope_type": "default"}, 400),
        ({"rope_type": "linear", "factor": 2.5}, 1000),
        ({"rope_type": "dynamic", "factor": 2.0}, 800),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ({"rope_type": "yarn", "factor": 4.0}, 1600),
        ({"rope_type": "llama3", **LLAMA3}, 400),
        ({"rope_type": "linear", "factor": 1e6}, 2**24),
    ],
    ids=str,
)
def test_the_longest_text(section: dict[str, Any], longest: int) -> None:
    """A scaling is for texts longer than max_position_embeddings, where that is the original."""
    assert read(section, 8)[1] == longest


def test_the_original_length_beside_the_section_wins() -> None:
    section = {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 64}
    rope, _ = read(section, 8, original_max_position_embeddings=128)
    assert rope.original == 128


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"rope_type": "longrope"}, "rope_type is 'longrope': known are"),
    ({"type": "su"}, "type is 'su': known are default, dynamic, linear, llama3, yarn"),
    ({"type": 3}, "type is 3: known are"),
    ({"rope_type": {"a": 1}}, "'rope_type' is {'a': 1}: give one set of positions for all layers"),
    ({"full_attention": {"rope_type": "linear"}}, "'full_attention' is {'rope_type': 'linear'}: "),
    ({"rope_type": "linear"}, "factor is missing: add it"),
    ({"rope_type": "linear", "factor": "2"}, "factor is '2': give a number from 1 to 1e+06"),
    ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5: give a number from 1"),
    ({"rope_type": "linear", "factor": True}, "factor is True: give a number from 1"),
    ({"rope_type": "linear", "factor": math.inf}, "factor is inf: give a number from 1"),
    ({"rope_type": "dynamic", "factor": math.nan}, "factor is nan: give a number from 1"),
    ({"rope_type": "dynamic", "factor": [2]}, "factor is [2]: give a number from 1"),
    ({"rope_type": "yarn", "original_max_position_embeddings": 96}, "factor is 0.5: give a number"),
    ({"rope_type": "yarn", "original_max_position_embeddings": 0}, "is 0: give an integer from 1"),
    ({"rope_type": "yarn", "original_max_position_embeddings": 9.5}, "is 9.5: give an integer"),
    ({"rope_type": "yarn", "original_max_position_embeddings": 2**25}, "give an integer from 1 to"),
    ({"rope_type": "yarn", "beta_fast": 0}, "beta_fast is 0: give a number above 0"),
    ({"rope_type": "yarn", "beta_slow": "1"}, "beta_slow is '1': give a number above 0"),
    (
        {"rope_type": "yarn", "beta_fast": 1, "beta_slow": 2},
        "beta_fast is 1: give at least beta_slow, which is 2",
    ),
    ({"rope_type": "yarn", "attention_factor": -1.0}, "attention_factor is -1.0: give a number ab"),
    ({"rope_type": "yarn", "mscale": -0.1}, "mscale is -0.1: give a number from 0"),
    ({"rope_type": "yarn", "mscale_all_dim": "a"}, "mscale_all_dim is 'a': give a number from 0"),
    ({"rope_type": "yarn", "truncate": 1}, "truncate is 1: give true or false"),
    ({"rope_type": "yarn", "rope_theta": 1.0}, "rope_theta is 1: give more than 1, as yarn needs"),
    ({"rope_type": "llama3", **LLAMA3, "factor": None}, "factor is missing"),
    ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is missing"),
    (
        {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0},
        "high_freq_factor is 1: give more than low_freq_factor, which is 1",
    ),
    ({"rope_type": "llama3", **LLAMA3, "low_freq_factor": 0}, "low_freq_factor is 0: give a numb"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0: give a number above 1e-06"),
    ({"rope_theta": 1e-300}, "rope_theta is 1e-300: give a number above 1e-06"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: give a number that is 1"),
]


@pytest.mark.promise("D4")
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("section", "sentence"), HOSTILE, ids=str)
def test_nonsense(section: dict[str, Any], sentence: str, name: str, tmp_path: Path) -> None:
    save_folder(tmp_path, LLAMA_CONFIG | {name: section}, llama_weights(LLAMA_CONFIG))
    with pytest.raises(FileError) as caught:
        Model.from_pretrained(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"config.json: {name}: ") and sentence in message
    assert "\n" not in message and len(message) < 300


@pytest.mark.promise("D4")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rotary_pct": 1.5}, "rotary_pct is 1.5: give a number from 0 to 1"),
        ({"rotary_pct": -0.25}, "rotary_pct is -0.25: give a number from 0 to 1"),
        ({"rotary_pct": "all"}, "rotary_pct is 'all': give a number from 0 to 1"),
        ({"rotary_emb_base": 0}, "rotary_emb_base is 0: give a number above 1e-06"),
        (
            {"rotary_pct": 0.25, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling: type is 'dynamic': it needs heads of 4 turned channels, not 3",
        ),
        ({"rope_scaling": 5}, "rope_scaling is 5: give an object or null"),
        ({"original_max_position_embeddings": "x", "rope_parameters": {"rope_type": "yarn"}},
         "original_max_position_embeddings is 'x': give an integer"),
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_beside_the_section(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NEOX_CONFIG | changes))
    with pytest.raises(FileError) as caught:
        Model.from_pretrained(tmp_path, random_weights=0)
    assert sentence in str(caught.value)
