"""How the next token is chosen: checked settings, and the random numbers of each prompt."""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseattn import _core
from sparseattn.errors import ArgumentError
from sparseattn.models.checkpoint import show

STREAM = 0x746F6B656E  # "token": keeps these streams apart from others of the same seed


@dataclass(frozen=True)
class Sampling:
    """What `Model.generate` was told about choosing; `make` checks it."""

    temperature: float  # 0: the likeliest
    top_k: int  # 0: all
    top_p: float  # 1: all
    seed: int | None

    @classmethod
    def make(cls, temperature: Any, top_k: Any, top_p: Any, seed: Any) -> Sampling:
        """Raise an ArgumentError for what makes no sense."""
        if temperature is None:
            for name, value in (("top_k", top_k), ("top_p", top_p)):
                if value is not None:
                    raise ArgumentError(
                        f"{name}={show(value)} chooses among tokens drawn, and without a "
                        "temperature none is drawn: pass temperature=1.0 with it"
                    )
        heat = number("temperature", 0.0 if temperature is None else temperature)
        if not 0 <= heat < math.inf:
            raise ArgumentError(
                f"temperature is {heat:g}: give 0 or None for the likeliest token, or a finite "
                "number above 0"
            )
        k = 0 if top_k is None else integer("top_k", top_k, "None keeps all")
        if top_k is not None and not 1 <= k < 2**31:
            raise ArgumentError(f"top_k is {k}: give a number of tokens from 1 on, or None for all")
        p = number("top_p", 1.0 if top_p is None else top_p)
        if not 0 < p <= 1:
            raise ArgumentError(f"top_p is {p:g}: give a share above 0 and at most 1, or None")
        if seed is not None and not 0 <= (seed := integer("seed", seed, "None draws one")) < 2**63:
            raise ArgumentError(f"seed is {seed}: give a number from 0 to 2^63 - 1, or None")
        return cls(heat, k, p, seed)


class Sampler:
    """Draws tokens for several prompts, each from random numbers of its own.

    The n-th token of a prompt is drawn by the n-th number of its stream, whatever else runs beside
    it. A stream is addressed by the seed and by how often the same prompt stood in the list
    before: copies of a prompt get different continuations.
    """

    def __init__(self, how: Sampling, prompts: Sequence[Sequence[int]]) -> None:
        self.how = how
        self.streams: list[np.random.Generator] = []
        if how.temperature > 0:
            seed = secrets.randbits(63) if how.seed is None else how.seed
            seen: dict[tuple[int, ...], int] = {}
            for prompt in map(tuple, prompts):
                seen[prompt] = seen.get(prompt, -1) + 1
                self.streams.append(stream(seed, seen[prompt]))

    def __call__(self, logits: NDArray[np.float32], prompts: Sequence[int]) -> list[int]:
        """A token for each row of logits, the rows being those of these prompts."""
        how = self.how
        u = np.array([self.streams[p].random() if self.streams else 0.0 for p in prompts])
        tokens: list[int] = _core.sample(logits, u, how.temperature, how.top_k, how.top_p).tolist()
        return tokens


def stream(seed: int, copy: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, STREAM], counter=[0, copy, 0, 0]))


def number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(f"{name} is {show(value)}: give a number, or None") from None


def integer(name: str, value: Any, otherwise: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name} is {show(value)}: give an integer; {otherwise}") from None
