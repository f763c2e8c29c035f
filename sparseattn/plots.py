"""Figures from plain results: functions return a matplotlib Figure and touch no global state.

matplotlib comes with the ``plot`` extra and is imported when a figure is made.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping
from typing import Any

__all__ = ["available", "quality_cost", "time_ratio", "to_svg"]

MARKERS = {"baseline": "D", "given": "o", "matched": "s", "floor": "v", "ceiling": "^"}
COLORS = ("#1f4e79", "#b5541c", "#3d7a3a", "#7a3d73", "#8a6d1f", "#2b8a8a", "#9c2f45", "#555555")


def available() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def quality_cost(data: Mapping[str, Any]) -> Any:
    """Return KL to dense against the share of visible pairs kept, a point a variant.

    Parameters
    ----------
    data : mapping
        `Comparison.data`.

    Returns
    -------
    matplotlib.figure.Figure
        Bars are 95 % intervals; both axes are logarithmic where the values allow it.
    """
    rows = [row for row in data["rows"] if row["role"] != "baseline"]
    figure, axes = _figure(6.4, 4.4)
    for row, color in zip(rows, _colors(rows), strict=True):
        value, low, high = (x or 0.0 for x in row["kl"])
        below, above = max(0.0, value - (low or value)), max(0.0, (high or value) - value)
        axes.errorbar(
            [100 * row["kept"]],
            [value],
            yerr=[[below], [above]],
            marker=MARKERS[row["role"]],
            color=color,
            capsize=3,
            linestyle="none",
        )
        axes.annotate(
            _label(row),
            (100 * row["kept"], value),
            xytext=(7, 4),
            textcoords="offset points",
            fontsize=8,
            color=color,
        )
    if rows and all((row["kl"][0] or 0) > 0 for row in rows):
        axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_xlabel("visible pairs kept (%)")
    axes.set_ylabel("KL(dense || variant), nats per token")
    axes.set_title(_title(data), fontsize=9)
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes.margins(0.15)
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
    rows = [row for row in data["rows"] if row["role"] != "baseline" and _points(row)]
    if not rows:
        return None
    figure, axes = _figure(6.4, 4.0)
    for row, color in zip(rows, _colors(rows), strict=True):
        points = _points(row)
        lengths = [n for n, _ in points]
        values = [ratio[0] for _, ratio in points]
        below = [max(0.0, v - (r[1] or v)) for v, (_, r) in zip(values, points, strict=True)]
        above = [max(0.0, (r[2] or v) - v) for v, (_, r) in zip(values, points, strict=True)]
        axes.errorbar(
            lengths,
            values,
            yerr=[below, above],
            marker=MARKERS[row["role"]],
            markersize=4,
            color=color,
            capsize=2,
            label=row["variant"],
        )
    axes.axhline(1.0, color="#999999", linewidth=0.8)
    ticks = sorted({n for row in rows for n, _ in _points(row)})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [_length(n) for n in ticks])
    axes.set_xlabel("sequence length N")
    axes.set_ylabel("attention time / dense")
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes.legend(fontsize=8, frameon=False)
    return figure


def to_svg(figure: Any) -> bytes:
    """Return a figure as SVG; the same figure gives the same bytes."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sparseattn", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        """A figure that a notebook shows although pyplot was never set up."""

        def _repr_svg_(self) -> str:
            return to_svg(self).decode()

    figure = ShownFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _colors(rows: list[Any]) -> list[str]:
    """One colour for each family."""
    families = list(dict.fromkeys(row["variant"].partition(":")[0] for row in rows))
    found = {f: COLORS[i % len(COLORS)] for i, f in enumerate(families)}
    return [found[row["variant"].partition(":")[0]] for row in rows]


def _label(row: Any) -> str:
    bound = f" ({row['role']})" if row["role"] in ("floor", "ceiling") else ""
    return f"{row['variant']}{bound}"


def _title(data: Mapping[str, Any]) -> str:
    e = data["evaluation"]
    return f"{e['model']} on {e['text']}, {e['predictions']:,} predictions, context {e['context']}"


def _points(row: Any) -> list[tuple[int, list[float]]]:
    return [(int(n), cell["ratio"]) for n, cell in row["time"].items() if cell.get("ratio")]


def _length(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)
