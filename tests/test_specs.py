"""Specs: their text, their values, what they refuse."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
from conftest import EVERY_SPEC
from hypothesis import given
from hypothesis import strategies as st

import sparseattn as sa
from sparseattn.variants import Variant, variants

EXAMPLES = [(cls, text) for cls in variants().values() for text in cls.examples]


@pytest.mark.parametrize(("cls", "text"), EXAMPLES, ids=[text for _, text in EXAMPLES])
def test_text_round_trip(cls: type[Variant], text: str) -> None:
    spec = sa.parse(text)
    assert type(spec) is cls
    assert sa.parse(str(spec)) == spec
    assert hash(sa.parse(str(spec))) == hash(spec)
    assert str(sa.parse(str(spec))) == str(spec)
    assert sa.parse(spec) is spec
    assert "," not in str(spec) and " " not in str(spec)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert sa.parse(f"  {text.upper()} ") == spec
    with pytest.raises((AttributeError, TypeError)):  # frozen, and nothing to add to
        spec.another = 1


whole = st.integers(0, 2**30 - 1)
plain = st.one_of(
    st.just(sa.Dense()),
    st.builds(sa.TopK, st.integers(1, 2**30), st.sampled_from(["pre", "post"])),
    st.builds(sa.RandomKeys, st.integers(1, 2**30), st.integers(0, 2**53)),
    st.builds(sa.BlockMask, st.integers(1, 2**30)),
    st.builds(sa.Prefix, st.integers(0, 2**30)),
    st.builds(sa.Window, st.integers(1, 2**30), sinks=whole, globals=st.lists(whole, max_size=5)),
    st.builds(
        lambda both, sinks: sa.Window(window_size=both, sinks=sinks),
        st.tuples(st.integers(-1, 2**30), st.integers(-1, 2**30)),
        whole,
    ),
)
joinable = plain.filter(lambda spec: getattr(spec, "placement", "pre") == "pre")
joined = st.recursive(
    joinable,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a + b, inner, inner), st.builds(lambda a, b: a & b, inner, inner)
    ),
    max_leaves=6,
)
headed = st.one_of(
    plain, joined, st.builds(sa.PerHead, st.lists(st.one_of(plain, joined), min_size=1, max_size=6))
)
layered = st.one_of(
    headed, st.builds(sa.PerLayer, st.dictionaries(st.integers(0, 99), headed, max_size=4), headed)
)


@given(layered)
def test_every_spec_is_its_text(spec: Variant) -> None:
    assert sa.parse(str(spec)) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Top-K:16", sa.TopK(16)),
        ("TOP_K:k=16:Placement=POST", sa.TopK(16, "post")),
        ("tree-less", sa.Dense()),
        ("Sliding-Window:64", sa.Window(64)),
        ("local:window-size=3/0", sa.Window(window_size=(3, 0))),
        ("window:64:sinks=4:globals=9/7/9", sa.Window(64, sinks=4, globals=(7, 9))),
        ("random_keys:8:seed=3", sa.RandomKeys(8, 3)),
        ("block-mask", sa.BlockMask(64)),
        ("dense + topk:4 + window:2", sa.Dense() + "topk:4" + sa.Window(2)),
        ("dense & topk:4 + window:2", (sa.Dense() & "topk:4") + "window:2"),
        ("dense & (topk:4 + window:2)", sa.Dense() & (sa.TopK(4) + sa.Window(2))),
        ("per-head(2*dense|topk:3)", sa.PerHead([sa.Dense(), "dense", "topk:3"])),
        ("per_layer(1=topk:3|Other=window:2)", sa.PerLayer({1: "topk:3"}, other="window:2")),
        ("perlayer(0=perhead(dense|topk:2))", sa.PerLayer({0: sa.PerHead(["dense", "topk:2"])})),
    ],
)
def test_what_people_write(text: str, want: Variant) -> None:
    assert sa.parse(text) == want


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("topq:16", ["topq", "topk", "did you mean"]),
        ("dence", ["dense"]),
        ("windov:64", ["window"]),
        ("zzz", ["zzz", "dense", "blockmask", "random", "topk", "window"]),
        ("", ["unknown"]),
        ("topk", ["needs k", "topk:16"]),
        ("topk:", ["integer"]),
        ("topk:x", ["TopK.k", "'x'"]),
        ("topk:1.5", ["TopK.k", "'1.5'"]),
        ("topk:0", ["TopK.k", "[1, ", "got 0"]),
        ("topk:16,placement=post", ["comma", "':'"]),
        ("topk,16", ["comma"]),
        ("topk:16:post", ["name=value", "'post'"]),
        ("topk:16:k=3", ["sets k twice"]),
        ("topk:16:placment=post", ["placment", "placement"]),
        ("topk:16:placement=mid", ["TopK.placement", "pre", "post", "'mid'"]),
        ("dense:3", ["dense", "no settings"]),
        ("window", ["size", "window_size"]),
        ("window:0", ["Window.size", "got 0"]),
        ("window:-3", ["Window.size", "got -3"]),
        ("window:4:window_size=3/0", ["size=4", "window_size=(3, 0)"]),
        ("window:window_size=3", ["2 values"]),
        ("window:window_size=-2/0", ["Window.window_size", "(-2, 0)"]),
        ("window:4:sinks=-1", ["Window.sinks", "got -1"]),
        ("random:3:seed=-1", ["RandomKeys.seed", "got -1"]),
        ("blockmask:0", ["BlockMask.block", "got 0"]),
        ("union:3", ["joins other specs"]),
        ("dense+", ["unknown"]),
        ("(dense", ["'('", "')'"]),
        ("dense)", ["'('", "')'"]),
        ("(" * 10_000 + "dense", ["nests brackets"]),
        ("(dense)x", ["after its closing bracket"]),
        ("topk(16)", ["':'", "topk:16"]),
        ("perhead", ["perhead("]),
        ("perhead(0*dense)", ["from 1 to 4096"]),
        ("perhead(99999999*dense)", ["from 1 to 4096"]),
        ("perhead(x*dense)", ["from 1 to 4096"]),
        ("perhead(perhead(dense))", ["one plain spec"]),
        ("perlayer(dense)", ["layer number", "'other'"]),
        ("perlayer(0=perlayer(0=dense))", ["another PerLayer"]),
        ("dense+topk:3:placement=post", ["placement='pre'"]),
        ("dense&perhead(dense)", ["inside of PerHead"]),
    ],
)
def test_wrong_text_is_answered(text: str, words: list[str]) -> None:
    with pytest.raises(sa.ArgumentError) as error:
        sa.parse(text)
    message = str(error.value)
    assert len(message) < 400 and "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "make",
    [
        lambda: sa.TopK(True),
        lambda: sa.TopK(1.5),
        lambda: sa.TopK("3"),
        lambda: sa.TopK(2**40),
        lambda: sa.TopK(3, "mid"),
        lambda: sa.Window(),
        lambda: sa.Window(window_size=(1, 2, 3)),
        lambda: sa.PerHead([]),
        lambda: sa.PerLayer({-1: "dense"}),
        lambda: sa.PerLayer({"0": "dense"}),
        lambda: sa.Union([sa.Dense()]),
        lambda: sa.parse(3),
        lambda: sa.Dense() + 3,
    ],
)
def test_wrong_values_are_answered(make: Any) -> None:
    with pytest.raises(sa.ArgumentError, match=r"got|needs|takes"):
        make()


def test_values_become_plain() -> None:
    spec = sa.Window(np.int64(5), sinks=np.int32(2), globals=np.array([9, 3]))
    assert spec == sa.Window(5, sinks=2, globals=(3, 9))
    assert {type(x) for x in (spec.size, spec.sinks, *spec.globals)} == {int}
    assert repr(sa.TopK(np.int8(3))) == "TopK(k=3, placement='pre', gradient='selected')"


def test_window_counts_the_query_itself() -> None:
    assert (sa.Window(64).left, sa.Window(64).right) == (63, 0)
    both = sa.Window(window_size=(3, 5))
    assert (both.left, both.right) == (3, 5)
    x = np.zeros((1, 9, 4), np.float32)
    with pytest.raises(sa.ArgumentError) as error:
        sa.attention(x, x, x, "window:4")
    assert "causal=True" in str(error.value) and "window_size=(2, 2)" in str(error.value)
    assert sa.plan(x, x, both).count().kept == 9 * 9 - 15 - 6


def test_layers() -> None:
    spec = sa.PerLayer({0: "dense", 3: "topk:16"}, other="window:64")
    assert [str(spec.layer(i)) for i in range(5)] == [
        *("dense", "window:64", "window:64", "topk:16", "window:64"),
    ]
    assert sa.TopK(3).layer(7) == sa.TopK(3)
    x = np.zeros((1, 9, 4), np.float32)
    with pytest.raises(sa.ArgumentError, match=r"layer\(i\)"):
        sa.attention(x, x, x, spec)


def test_what_is_read() -> None:
    assert sa.TopK(3).reads_keys and not sa.Window(3).reads_keys
    assert (sa.Window(3) + sa.TopK(3)).reads_keys and not (
        sa.Window(3) & sa.RandomKeys(3)
    ).reads_keys
    assert sa.PerHead([sa.Dense(), sa.BlockMask(16)]).arrays == ("layout",)


def test_specs_lists_all() -> None:
    listed = sa.specs()
    assert [one.name for one in listed] == list(variants())
    assert listed[0].name == "dense"
    for one in listed:
        assert one.summary and len(str(one).splitlines()) == 1
        assert sa.parse(one.example).kind == one.name


def test_heads_draw_apart() -> None:
    x = np.zeros((1, 4, 60, 4), np.float32)
    kept = sa.plan(
        x, x, "perhead(random:8|dense|random:8|window:3+random:8)", causal=True
    ).to_mask()
    assert (kept[0, 0] != kept[0, 2]).any() and (kept[0, 2] & ~kept[0, 3]).any()
    seeds = {sa.RandomKeys(1, seed).for_head(h).seed for seed in range(50) for h in range(50)}
    assert len(seeds) == 2500


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
def test_fields_are_scalars_and_short_tuples(spec: Variant) -> None:
    for f in dataclasses.fields(spec):
        value = getattr(spec, f.name)
        assert value is None or isinstance(value, int | float | str | tuple), f.name
