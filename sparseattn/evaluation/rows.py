"""The rows of a comparison: the specs given, and those matched to a budget with their bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparseattn.attention import plan
from sparseattn.errors import ArgumentError
from sparseattn.variants import Dense, RandomKeys, TopK, Variant, Window, parse

__all__ = ["DENSE", "Row", "given_rows", "is_random", "matched_rows", "parse_attention", "seeded"]

DENSE = Dense()


@dataclass(frozen=True)
class Row:
    """One line of the table.

    `role` is ``baseline``, ``given``, ``matched`` to a budget, or ``bound``: there only for the
    comparison. `bound` is ``floor`` (random keys), ``ceiling`` (best keys) or empty.
    """

    spec: Variant
    role: str = "given"
    budget: float | None = None
    bound: str = ""

    @property
    def name(self) -> str:
        """The spec as text, which is also what its measurements are kept under."""
        return str(self.spec)


def parse_attention(attention: str | Variant | Iterable[str | Variant]) -> list[Variant]:
    """Return specs of one spec or several; a str may hold several, separated by commas."""
    if not isinstance(attention, Iterable):
        attention = parse(attention)  # a spec, or the error that says what one is
    items = [attention] if isinstance(attention, str | Variant) else list(attention)
    specs: list[Variant] = []
    for item in items:
        parts = item.split(",") if isinstance(item, str) else [item]
        specs += [parse(part) for part in parts if part]
    return list(dict.fromkeys(specs))


def given_rows(specs: Sequence[Variant]) -> list[Row]:
    """Return one row a spec, dense first whether it was named or not."""
    return [Row(DENSE, "baseline"), *(Row(spec) for spec in specs if spec != DENSE)]


def matched_rows(
    specs: Sequence[Variant], budgets: Sequence[float], length: int, causal: bool = True
) -> list[Row]:
    """Return, for each budget, each family's spec that keeps this share, and the two bounds.

    Parameters
    ----------
    specs : sequence of Variant
        Their families are matched, by the field that sets how many keys they keep.
    budgets : sequence of float
        Shares of the visible pairs, between 0 and 1.
    length : int
        Of a full block.
    causal : bool
        False where queries see keys on both sides.
    """
    rows = []
    for budget in budgets:
        if not 0 < budget < 1:
            raise ArgumentError(f"budgets must lie between 0 and 1 (0.1 keeps 10 %), got {budget}")
        floor = match_share(RandomKeys(1), budget, length, causal)
        ceiling = match_share(TopK(1), budget, length, causal)
        bounds = {floor: "floor", ceiling: "ceiling"}
        matched = dict.fromkeys(match_share(s, budget, length, causal) for s in specs if sizable(s))
        for spec in matched:
            rows.append(Row(spec, "matched", budget, bounds.get(spec, "")))
        rows += [Row(s, "bound", budget, b) for s, b in bounds.items() if s not in matched]
    return rows


def sizable(spec: Variant) -> bool:
    """Whether one number says how many keys the spec keeps; dense has none to match."""
    if isinstance(spec, Window | TopK | RandomKeys):
        return True
    if spec == DENSE:
        return False
    raise ArgumentError(
        f"budgets cannot be matched for {spec}: there is no single size to change; "
        f"give window, topk or random specs with budgets"
    )


def match_share(spec: Variant, share: float, length: int, causal: bool = True) -> Variant:
    """Return `spec` resized to keep the share of visible pairs nearest to `share`."""
    low, high = 1, length
    while low < high:  # the smallest size that keeps at least the share
        middle = (low + high) // 2
        if kept_share(resize(spec, middle), length, causal) < share:
            low = middle + 1
        else:
            high = middle
    near = [resize(spec, size) for size in (low - 1, low) if size >= 1]
    return min(near, key=lambda s: abs(kept_share(s, length, causal) - share))


def resize(spec: Variant, size: int) -> Variant:
    """Return `spec` keeping `size` keys a row."""
    if isinstance(spec, Window):
        if spec.size is not None:
            return dataclasses.replace(spec, size=size)
        if spec.left == spec.right > 0:  # as wide on both sides
            return dataclasses.replace(spec, window_size=(size // 2, (size - 1) // 2))
        return dataclasses.replace(spec, window_size=(size - 1, spec.right))
    if isinstance(spec, TopK | RandomKeys):
        return dataclasses.replace(spec, k=size)
    raise TypeError(f"{spec} has no size")


def kept_share(spec: Variant, length: int, causal: bool = True) -> float:
    """Return the share of visible pairs kept in a block; no score changes a count."""
    x = np.zeros((1, 1, length, 8), dtype=np.float32)
    return float(plan(x, x, spec, causal=causal).kept_share)


def seeded(spec: Variant, offset: int) -> Variant:
    """Return `spec` with `offset` added to every seed inside of it."""

    def change(value: Any) -> Any:
        if isinstance(value, Variant):
            return seeded(value, offset)
        return tuple(map(change, value)) if isinstance(value, tuple) else value

    changes = {}
    for field in dataclasses.fields(spec):  # type: ignore[arg-type]  # every spec is a dataclass
        value = getattr(spec, field.name)
        changes[field.name] = value + offset if field.name == "seed" else change(value)
    changed: Variant = type(spec)(**changes)
    return changed


def is_random(spec: Variant) -> bool:
    """Whether a seed decides what the spec keeps."""
    return seeded(spec, 1) != spec


def check_specs(specs: Iterable[Variant], config: Any) -> None:
    """Refuse specs that cannot run in this model, before anything is computed."""
    q = np.zeros((1, config.n_heads, 2, config.head_dim), dtype=np.float32)
    for spec in specs:
        for layer in range(config.n_layers):
            keys = q[:, : config.n_kv_heads]
            plan(q, keys, spec.layer(layer), causal=getattr(config, "causal", True))
