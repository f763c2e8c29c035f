"""What a token costs while decoding: attention timed over caches of growing length.

A call appends one key and value to a cache and attends to what it keeps, as a layer of a model does
for each new token. The budget is kept as in `cost`.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparseattn.cache import Cache
from sparseattn.evaluation.cost import Call, HeadShape, Timer, random_heads

__all__ = ["DECODE_SHARE", "DecodeTimer", "decode_lengths"]

DECODE_SHARE = 0.15  # of the time budget, at most; what is left goes to whole sequences
SHORTEST = 1024
TOKENS = 4  # of a repetition: a single one is too short for the clock
MEMORY = 256 * 2**20  # bytes of all caches together: long ones have fewer heads


def decode_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """The lengths at which decoding is timed: those of at least 1,024 keys."""
    return tuple(n for n in lengths if n >= SHORTEST)


class DecodeTimer(Timer):
    """Times `TOKENS` tokens a call; `LengthTiming.seconds` are those of all of them."""

    growth = 2.2  # a cache of twice the length, read once

    def calls(self, shape: HeadShape, length: int, names: list[str]) -> dict[str, Call]:
        q, k, v = random_heads(shape, length, self.seed, TOKENS)
        steps = [tuple(x[:, :, i : i + 1].copy() for x in (q, k, v)) for i in range(TOKENS)]

        def call_of(name: str) -> Call:
            spec = self.specs[name]
            cache = Cache(spec)
            cache.append(k, v)

            def call() -> None:
                for token in steps:
                    self.attend(*token, spec, causal=True, cache=cache)

            return call

        return {name: call_of(name) for name in names}

    def _fit(self, cost: float, share: float) -> HeadShape:
        """As many heads as leave room for a few repetitions, in time and in memory."""
        shape = super()._fit(cost, share)
        length = self.lengths[len(self.done)]
        per_head = 8 * length * shape.dim * len(self.specs)
        fitting = [
            n
            for n in range(1, shape.kv_heads + 1)
            if self.shape.kv_heads % n == 0 and n * per_head <= MEMORY
        ]
        return self.shape.of_size(max(fitting, default=1))
