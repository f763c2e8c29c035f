"""From tokens to text while they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sparseattn.errors import ArgumentError, DtypeError
from sparseattn.models.checkpoint import show
from sparseattn.models.tokenizer import Tokenizer

BEFORE = 5  # tokens of the prompt that decide how the first new one is written
BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet


class Pieces:
    """The text of tokens that follow a prompt, in pieces that are final.

    A token is decoded together with those before it, because a piece of a word may be written with
    or without a space. What ends in half a character waits for the rest.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(prompt[-BEFORE:])
        self.known = len(self.ids)  # tokens whose text is out
        self.shown = self._decode()

    def add(self, token: int) -> str:
        """What can be said for sure after one more token."""
        self.ids.append(token)
        text = self._decode()
        if text.endswith(BROKEN) or len(text) <= len(self.shown):
            return ""
        return self._out(text)

    def end(self) -> str:
        """What waited for more, as it stands."""
        text = self._decode()
        return self._out(text) if len(text) > len(self.shown) else ""

    def _out(self, text: str) -> str:
        piece = text[len(self.shown) :]
        self.ids = self.ids[self.known :]  # those of this piece are the context of the next one
        self.known = len(self.ids)
        self.shown = self._decode()
        return piece

    def _decode(self) -> str:
        return self.tokenizer.text(self.ids)


class Stops:
    """Cuts a text, given piece by piece, before the first of some strings."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """What is certainly before any stop string; sets `found` when one has come."""
        text = self.held + piece
        ends = [at for at in (text.find(stop) for stop in self.strings) if at >= 0]
        if ends:
            self.found, self.held = True, ""
            return text[: min(ends)]
        keep = max((overlap(text, stop) for stop in self.strings), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back, for no stop string has come of it."""
        text, self.held = self.held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def read_stops(stop: Any) -> tuple[str, ...]:
    """`stop=` as a tuple: one string or several, none of them empty."""
    given = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(given, Iterable):
        raise DtypeError(f"stop is {show(stop)}: give a string or a list of strings")
    strings = tuple(given)
    for string in strings:
        if not isinstance(string, str):
            raise DtypeError(f"stop holds {show(string)}: give strings")
        if not string:
            raise ArgumentError("stop holds an empty string, which ends every text: leave it out")
    return strings
