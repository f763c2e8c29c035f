"""Figures from plain results: functions return a matplotlib Figure and touch no global state.

matplotlib comes with the ``plot`` extra and is imported when a figure is made.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any

from sparseattn.evaluation.tasks import TASKS, Task, distance

__all__ = ["available", "quality_cost", "time_ratio", "to_svg"]

MARKERS = {"baseline": "D", "given": "o", "matched": "s", "bound": "^"}
LINES = ("-", "--", ":", "-.")
COLORS = ("#1f4e79", "#b5541c", "#3d7a3a", "#7a3d73", "#8a6d1f", "#2b8a8a", "#9c2f45", "#555555")


def available() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def quality_cost(data: Mapping[str, Any]) -> Any:
    """Return KL to dense (of embeddings, 1 - cosine) against counted cost, a point a variant.

    On the left the cost is the share of visible pairs kept, on the right the share of key and
    value rows read: a selector keeps few pairs and still reads every key.

    Parameters
    ----------
    data : mapping
        `Comparison.data`.

    Returns
    -------
    matplotlib.figure.Figure
        Bars are 95 % intervals; the axes are logarithmic where the values allow it.
    """
    rows = [row for row in data["rows"] if row["role"] != "baseline"]
    figure = _figure(9.6, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    _points_of_cost(left, rows, [100 * row["kept"] for row in rows])
    _points_of_cost(right, rows, [50 * (row["k_rows"] + row["v_rows"]) for row in rows])
    left.set_xlabel("visible pairs kept (%)")
    right.set_xlabel("key and value rows read (% of the visible)")
    left.set_ylabel(_task(data).distance)
    figure.suptitle(_title(data), fontsize=9)
    return figure


def time_ratio(data: Mapping[str, Any]) -> Any:
    """Return attention time over dense's against length, a line a variant; None if not timed.

    Parameters
    ----------
    data : mapping
        `Comparison.data`.

    Returns
    -------
    matplotlib.figure.Figure or None
        Bars are 95 % intervals; below the line at 1 the variant is faster.
    """
    rows = [row for row in data["rows"] if row["role"] != "baseline" and _ratios(row)]
    if not rows:
        return None
    figure = _figure(7.2, 4.0)
    axes = figure.add_subplot()
    for i, row in enumerate(rows):
        ratios = _ratios(row)
        axes.errorbar(
            [n for n, _ in ratios],
            [ratio[0] for _, ratio in ratios],
            yerr=_bars([ratio for _, ratio in ratios]),
            marker=MARKERS[row["role"]],
            markersize=4,
            color=COLORS[i % len(COLORS)],
            linestyle=LINES[i // len(COLORS) % len(LINES)],
            capsize=2,
            label=row["variant"],
        )
    axes.axhline(1.0, color="#999999", linewidth=0.8)
    ticks = sorted({n for row in rows for n, _ in _ratios(row)})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [_length(n) for n in ticks])
    axes.set_xlabel("sequence length N")
    axes.set_ylabel("attention time / dense")
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def to_svg(figure: Any) -> bytes:
    """Return a figure as SVG; the same figure gives the same bytes."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sparseattn", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        """A figure that a notebook shows although pyplot was never set up."""

        def _repr_svg_(self) -> str:
            return to_svg(self).decode()

    figure = ShownFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _points_of_cost(axes: Any, rows: Sequence[Any], costs: Sequence[float]) -> None:
    """Draw one point a row, and a thin line through those of a family."""
    families = [row["variant"].partition(":")[0] for row in rows]
    names = list(dict.fromkeys(families))
    colors = [COLORS[names.index(family) % len(COLORS)] for family in families]
    values = [distance(row)[0] or 0.0 for row in rows]
    for i, row in enumerate(rows):
        axes.errorbar(
            [costs[i]],
            [values[i]],
            yerr=_bars([distance(row)]),
            marker=MARKERS[row["role"]],
            markersize=5,
            color=colors[i],
            capsize=3,
            linestyle="none",
        )
    for name in names:
        line = sorted((c, v) for c, v, f in zip(costs, values, families, strict=True) if f == name)
        axes.plot(*zip(*line, strict=True), color=COLORS[names.index(name) % len(COLORS)], lw=0.6)
    if values and min(values) > 0:
        axes.set_yscale("log")
    least = min([50.0, *costs])
    axes.set_xscale("log")
    axes.set_xlim(least / 1.6, 160)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if t >= least / 1.6]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes.margins(y=0.15)
    _label(axes, [_name(row) for row in rows], costs, values, colors)


def _label(
    axes: Any,
    names: Sequence[str],
    x: Sequence[float],
    y: Sequence[float],
    colors: Sequence[str],
) -> None:
    """Write each name beside its point, where no other name or point is."""
    axes.get_figure().canvas.draw()  # settles the layout, so that points have places
    places = axes.transData.transform(list(zip(x, y, strict=True))) if x else []
    points_a_pixel = 72 / axes.get_figure().dpi
    spots = [(px * points_a_pixel, py * points_a_pixel) for px, py in places]
    edge = axes.get_window_extent().x1 * points_a_pixel
    taken = [(px - 3, py - 3, px + 3, py + 3) for px, py in spots]
    for name, at, spot, color in zip(names, zip(x, y, strict=True), spots, colors, strict=True):
        wide = 4.3 * len(name)
        choices = [(side, up) for up in (4, -12, 13, -21, 22, -30) for side in (6, -6 - wide)]
        boxes = [
            (spot[0] + dx, spot[1] + dy, spot[0] + dx + wide, spot[1] + dy + 8)
            for dx, dy in choices
        ]
        clashes = [sum(_overlap(box, other) for other in taken) + (box[2] > edge) for box in boxes]
        best = clashes.index(min(clashes))
        taken.append(boxes[best])
        axes.annotate(
            name, at, xytext=choices[best], textcoords="offset points", fontsize=7.5, color=color
        )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _bars(intervals: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """Lengths of the bars below and above each value."""
    whole = [(v or 0.0, v if low is None else low, v if high is None else high)
             for v, low, high in intervals]  # fmt: skip
    below = [max(0.0, v - (low or 0.0)) for v, low, _ in whole]
    return [below, [max(0.0, (high or 0.0) - v) for v, _, high in whole]]


def _name(row: Any) -> str:
    return f"{row['variant']} ({row['bound']})" if row["bound"] else str(row["variant"])


def _title(data: Mapping[str, Any]) -> str:
    e = data["evaluation"]
    counted = f"{e['predictions']:,} {_task(data).counted}"
    return f"{e['model']} on {e['text']}\n{counted}, context {e['context']}"


def _task(data: Mapping[str, Any]) -> Task:
    return TASKS[data["evaluation"].get("task", "next")]


def _ratios(row: Any) -> list[tuple[int, list[float]]]:
    return [(int(n), cell["ratio"]) for n, cell in row["time"].items() if cell.get("ratio")]


def _length(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)
