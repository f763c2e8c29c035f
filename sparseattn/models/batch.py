"""What a call of a model reads: token ids, which of them are padding, and kinds of segments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparseattn.errors import ArgumentError, DtypeError
from sparseattn.inputs import read_bool
from sparseattn.models.common import Config

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Checked arrays (batch, length)."""

    ids: Ids
    shape: tuple[int, ...]  # as the caller gave the tokens: (length,) or (batch, length)
    mask: NDArray[np.bool_] | None  # True: a token; False: padding; None: all are tokens
    types: Ids | None

    def positions(self, offset: int | None) -> NDArray[np.int32]:
        """A learned position for every row: its place, or its count among tokens from `offset`."""
        batch, length = self.ids.shape
        if offset is None or self.mask is None:
            place = np.tile(np.arange(length, dtype=np.int32), batch)
            return place if offset is None else place + np.int32(offset)
        count = np.cumsum(self.mask, 1, dtype=np.int32) * self.mask
        return (count + np.int32(offset - 1)).reshape(-1)


def read_batch(config: Config, tokens: Any, key_mask: Any, token_types: Any) -> Batch:
    """The arrays of a call; an encoder's rows of different lengths are padded on the right."""
    mask: NDArray[np.bool_] | None = None
    lengths = uneven(tokens)
    if lengths and not config.causal:
        if key_mask is not None:
            raise ArgumentError(
                "tokens has rows of different lengths, which are padded here: leave key_mask out"
            )
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        tokens = padded("tokens", tokens, mask)
        token_types = None if token_types is None else padded("token_types", token_types, mask)
    ids = check_tokens(config, tokens)
    whole = np.atleast_2d(ids)
    if key_mask is not None:
        mask = read_bool("key_mask", key_mask, "it says which tokens are there: True for a token")
        if mask.shape != ids.shape:
            raise ArgumentError(
                f"key_mask must have the shape of tokens, {ids.shape}: got {mask.shape}"
            )
        mask = mask.reshape(whole.shape)
    types = None if token_types is None else check_types(config, token_types, ids.shape)
    return Batch(whole, ids.shape, mask, None if types is None else types.reshape(whole.shape))


def uneven(tokens: Any) -> list[int] | None:
    """The lengths of rows that differ in length, none of them empty."""
    if not isinstance(tokens, list | tuple) or not all(hasattr(row, "__len__") for row in tokens):
        return None
    lengths = [0 if isinstance(row, str) else len(row) for row in tokens]
    return lengths if len(set(lengths)) > 1 and all(lengths) else None


def padded(name: str, rows: Any, mask: NDArray[np.bool_]) -> NDArray[Any]:
    """Rows side by side, with zeros where `mask` is False."""
    if not isinstance(rows, list | tuple) or [len(row) for row in rows] != mask.sum(1).tolist():
        raise ArgumentError(f"{name} must have rows as long as those of tokens")
    whole = [np.asarray(row) for row in rows]
    for row in whole:
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise DtypeError(f"{name} has a row that is {row.dtype} of {row.ndim} axes: give ids")
    out = np.zeros(mask.shape, np.int64)
    out[mask] = np.concatenate(whole)
    return out


def check_tokens(config: Config, tokens: ArrayLike) -> Ids:
    """Token ids as int64, known to be in range."""
    if isinstance(tokens, str):
        raise DtypeError("tokens is a str: give model.tokenizer.encode(text)'s ids")
    try:
        ids = np.array(tokens)  # ours alone: what is checked is what is read
    except ValueError:
        raise ArgumentError("tokens has rows of different lengths: pad or split them") from None
    if ids.ndim not in (1, 2) or ids.size == 0:
        raise ArgumentError(
            f"tokens has shape {ids.shape}: give (length,) or (batch, length), not empty"
        )
    if not np.issubdtype(ids.dtype, np.integer):
        raise DtypeError(f"tokens is {ids.dtype}: give integers, such as tokenizer.encode's")
    for bad in (ids.min(), ids.max()):
        if not 0 <= bad < config.vocab_size:
            raise ArgumentError(
                f"tokens holds {bad}: this model's ids are 0 to {config.vocab_size - 1}"
            )
    if ids.shape[-1] > config.context:
        raise ArgumentError(
            f"tokens has length {ids.shape[-1]}, but this model has {config.context} "
            "positions: give shorter blocks"
        )
    return ids.astype(np.int64, copy=False)


def check_types(config: Config, token_types: Any, shape: tuple[int, ...]) -> Ids:
    """Kinds of segments as int64, known to be in range."""
    if not config.token_types:
        raise ArgumentError(f"token_types is given, but {config.family} knows none: leave it out")
    types = np.array(token_types)  # ours alone, as the tokens are
    if types.shape != shape:
        raise ArgumentError(
            f"token_types must have the shape of tokens, {shape}: got {types.shape}"
        )
    if not np.issubdtype(types.dtype, np.integer):
        raise DtypeError(f"token_types is {types.dtype}: give integers")
    if types.min() < 0 or types.max() >= config.token_types:
        bad = int(types.min() if types.min() < 0 else types.max())
        raise ArgumentError(f"token_types holds {bad}: give 0 to {config.token_types - 1}")
    return types.astype(np.int64, copy=False)
