"""Entries of config.json, read with their types and ranges checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from sparseattn.errors import FileError
from sparseattn.models.checkpoint import CONFIG_FILE, nearest, show

T = TypeVar("T")

MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HIDDEN = 131_072  # also the width between the two halves of an MLP, times 8
MAX_VOCAB = 4 * 2**20
MAX_CONTEXT = 16 * 2**20

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Fields:
    """config.json's entries, read with their types and ranges checked.

    JSON's null reads as absent. A default of None makes an entry required.
    """

    def __init__(self, values: Mapping[str, Any], source: str = CONFIG_FILE) -> None:
        self.values = values
        self.source = source

    def fail(self, name: str, problem: str) -> FileError:
        return FileError(f"{self.source}: {name} {problem}")

    def get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise self.fail(name, f"is missing: add it, as the family's {self.source} has it")
        return default

    def integer(self, name: str, default: int | None, low: int, high: int) -> int:
        value = self.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.fail(name, f"is {show(value)}: give an integer from {low} to {high}")
        return value

    def number(
        self, name: str, default: float | None, low: float, high: float, *, closed: bool = False
    ) -> float:
        """A number in (low, high], or in [low, high] where `closed`."""
        value = self.get(name, default)
        fits = type(value) in (int, float) and low <= value <= high
        if not fits or (value == low and not closed):
            wanted = f"above {low:g} and at most {high:g}"
            if closed:
                wanted = f"from {low:g} to {high:g}" if low < high else f"that is {low:g}"
            raise self.fail(name, f"is {show(value)}: give a number {wanted}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            raise self.fail(name, f"is {show(value)}: give true or false")
        return value

    def word(self, name: str, default: str | None, known: Mapping[str, T]) -> T:
        """The meaning in `known` of a word."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in known:
            raise self.fail(
                name, f"is {show(value)}: known are {nearest(str(value)[:80], list(known))}"
            )
        return known[value]

    def section(self, name: str) -> Fields:
        """A nested object; an absent one reads as empty."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.fail(name, f"is {show(value)}: give an object or null")
        return Fields(value, f"{self.source}: {name}")

    def tokens(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them; those outside the vocabulary are left out."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [value]
        return tuple(i for i in ids if type(i) is int and 0 <= i < vocab_size)
