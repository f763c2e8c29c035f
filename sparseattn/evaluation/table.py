"""Numbers with sensible digits, and tables of them as text, HTML and CSV."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparseattn.evaluation.stats import Interval

__all__ = ["Column", "Table", "lengths_word", "number", "percent", "to_csv", "with_interval"]

GAP = "  "


def number(value: float | None, digits: int = 3) -> str:
    """Return `value` to so many significant digits, thousands set apart; None is a dash."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(0, places)}f}" if -5 < places < 9 else f"{value:.1e}"


def percent(share: float | None) -> str:
    """Return a share in percent, one decimal; never rounded to 0 or to 100."""
    if share is None or math.isnan(share):
        return "-"
    if share == 1:
        return "100"
    return f"{min(share * 100, 99.9):.1f}" if share >= 0.001 else f"{share * 100:.1g}"


def with_interval(interval: Interval | None, *, sign: bool = False, scale: float = 1.0) -> str:
    """Return value ± half of the interval, to the digits that the interval leaves meaning."""
    if interval is None or math.isnan(interval.value):
        return "-"
    value, half = interval.value * scale, interval.half * scale
    plus = "+" if sign and value > 0 else ""
    if math.isnan(half) or half <= 0:
        return plus + number(value)
    lead = math.floor(math.log10(half))
    places = 1 - lead if half / 10**lead < 3 else -lead
    places = max(0, places)
    if places > 6:
        return f"{plus}{value:.1e}±{half:.0e}"
    if round(value, places) == 0:
        plus, value = "", 0.0
    return f"{plus}{value:,.{places}f}±{half:,.{places}f}"


def lengths_word(length: int) -> str:
    """Return 512, 1k, 64k, or the number itself."""
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)


@dataclass(frozen=True)
class Column:
    """A heading over one cell a row; columns of a `group` stay together where a line is full."""

    head: str
    cells: Sequence[str]
    group: str = ""


@dataclass(frozen=True)
class Table:
    """Rows named by the first column, wrapped by columns where a line would be too long."""

    name: Column
    columns: Sequence[Column]

    def text(self, width: int = 120) -> str:
        """Return the table in lines of at most `width`, where single columns allow it."""
        parts = []
        for columns in self._wrapped(width):
            widths = [_width(c) for c in columns]
            lines = []
            for row in range(-1, len(self.name.cells)):
                cells = [_cell(c, row) for c in columns]
                first = cells[0].ljust(widths[0])
                rest = [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
                lines.append(GAP.join([first, *rest]).rstrip())
            lines.insert(1, "-" * max(map(len, lines)))
            parts.append("\n".join(lines))
        return "\n\n".join(parts)

    def html(self) -> str:
        """Return the table as HTML."""
        columns = [self.name, *self.columns]
        head = "".join(f"<th>{html.escape(c.head)}</th>" for c in columns)
        body = []
        for row in range(len(self.name.cells)):
            cells = "".join(f"<td>{html.escape(_cell(c, row))}</td>" for c in columns)
            body.append(f"<tr>{cells}</tr>")
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"

    def _wrapped(self, width: int) -> list[list[Column]]:
        """Cut the columns between groups, or inside a group that is too wide by itself."""
        lines: list[list[Column]] = []
        groups = list(dict.fromkeys(c.group for c in self.columns))
        for group in groups:
            members = [c for c in self.columns if c.group == group]
            if lines and self._width([*lines[-1], *members]) <= width:
                lines[-1].extend(members)
                continue
            lines.append([self.name])
            for column in members:
                if len(lines[-1]) > 1 and self._width([*lines[-1], column]) > width:
                    lines.append([self.name])
                lines[-1].append(column)
        return lines

    @staticmethod
    def _width(columns: Sequence[Column]) -> int:
        return sum(map(_width, columns)) + len(GAP) * (len(columns) - 1)


def to_csv(rows: Sequence[dict[str, object]]) -> str:
    """Return rows of plain values as CSV; the columns are the union of the rows' names."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
    return out.getvalue()


def _cell(column: Column, row: int) -> str:
    return column.head if row < 0 else column.cells[row]


def _width(column: Column) -> int:
    return max(len(column.head), *(len(c) for c in column.cells))
