"""Figures: made of plain results, vector, without pyplot."""

from __future__ import annotations

import json
import sys
from xml.etree import ElementTree

import pytest
from conftest import requires
from fake_lm import FakeModel, fake_ids

import sparseattn as sa
from sparseattn import plots


@pytest.fixture(scope="module")
def data():
    result = sa.compare(
        FakeModel(), fake_ids(200), ["window:5", "topk:4"], None, context=64, time_budget=0
    )
    found = result.to_dict()
    for i, row in enumerate(found["rows"]):  # times as a run would give them
        ratio = [1.0 / (i + 1)] * 3
        row["time"] = {str(n): {"seconds": 1.0, "ratio": ratio} for n in (512, 1024, 65536)}
    return found


@pytest.fixture(autouse=True)
def matplotlib():
    return requires("matplotlib")


def test_quality_against_cost_has_a_labelled_point_a_variant(data):
    left, right = plots.quality_cost(data).axes
    rows = data["rows"][1:]
    read = [50 * (row["k_rows"] + row["v_rows"]) for row in rows]
    for axes, costs in ((left, [100 * row["kept"] for row in rows]), (right, read)):
        assert [text.get_text() for text in axes.texts] == ["window:5", "topk:4"]
        points = [bars.lines[0].get_xydata()[0] for bars in axes.containers]
        assert [x for x, _ in points] == pytest.approx(costs)
        assert [y for _, y in points] == pytest.approx([row["kl"][0] for row in rows])
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert "%" in axes.get_xlabel()
    assert "KL" in left.get_ylabel()


def test_labels_keep_apart(data):
    rows = [{**data["rows"][1], "variant": f"window:{i}"} for i in range(4)]  # all on one point
    figure = plots.quality_cost({**data, "rows": rows})
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_time_against_length_has_a_line_a_variant(data):
    figure = plots.time_ratio(data)
    (axes,), (legend,) = figure.axes, figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["window:5", "topk:4"]
    lines = [bars.lines[0] for bars in axes.containers]
    assert [list(line.get_xdata()) for line in lines] == [[512, 1024, 65536]] * 2
    assert [text.get_text() for text in axes.get_xticklabels()] == ["512", "1k", "64k"]


def test_nothing_timed_is_no_figure(data):
    untimed = {**data, "rows": [{**row, "time": {}} for row in data["rows"]]}
    assert plots.time_ratio(untimed) is None


def test_a_lone_dense_row_still_gives_a_figure(data):
    assert plots.quality_cost({**data, "rows": data["rows"][:1]}).axes


def test_svg_is_vector_text_and_the_same_bytes(data):
    svg = plots.to_svg(plots.quality_cost(data))
    assert svg == plots.to_svg(plots.quality_cost(data))
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "window:5" in [text for node in root.iter() for text in [node.text] if text]
    assert b"<image" not in svg


def test_a_notebook_shows_it_without_pyplot(data):
    figure = plots.quality_cost(data)
    assert figure._repr_svg_().lstrip().startswith("<?xml")
    assert (
        "matplotlib.pyplot" not in sys.modules
        or sys.modules["matplotlib.pyplot"].get_fignums() == []
    )


def test_a_result_plots_and_a_run_saves(tmp_path):
    result = sa.compare(
        FakeModel(), fake_ids(200), "window:5", None, context=64, time_budget=0, save=tmp_path
    )
    assert len(result.plot().axes) == 2
    ElementTree.parse(tmp_path / "compare.svg")
    assert not (tmp_path / "compare-time.svg").exists()
    assert json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))["complete"]


def test_without_the_extra_all_else_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    sa.compare(
        FakeModel(), fake_ids(200), "window:5", None, context=64, time_budget=0, save=tmp_path
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "compare.csv",
        "compare.json",
        "compare.jsonl",
    ]
