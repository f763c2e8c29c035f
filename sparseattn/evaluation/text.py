"""The text of an evaluation: read, hashed, tokenised once, cut into blocks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sparseattn.errors import ArgumentError, FileError

__all__ = ["Block", "Text", "Tokenizer", "cut_blocks", "load_text"]

SEPARATOR = "<|endoftext|>"
MARGIN = 64  # tokens at the end of a text's beginning that its cut may have changed


class Tokenizer(Protocol):
    """What a model folder's tokenizer offers."""

    def encode(self, text: str, *, special: bool = False) -> Sequence[int]:
        """Return the ids of `text`, with what the tokenizer puts around one where `special`."""

    def token_id(self, token: str) -> int | None:
        """Return the id of one piece, if it is one."""


@dataclass(frozen=True)
class Text:
    """Token ids with the hash and the name of what they were made of."""

    ids: NDArray[np.int32]
    sha256: str
    name: str
    documents: int = 1


@dataclass(frozen=True)
class Block:
    """Inputs ``ids[begin:end]``; targets ``ids[begin + 1:end + 1]``, scored from `first` on."""

    begin: int
    end: int
    first: int

    @property
    def targets(self) -> int:
        """Number of targets scored."""
        return self.end - self.begin - self.first


def cut_blocks(n_tokens: int, context: int, stride: int) -> list[Block]:
    """Cut ``n_tokens`` tokens into blocks of `context`, each `stride` after the one before.

    The first block scores all its targets, a later one those that no block before it scored
    (the last `stride`; the last block may hold fewer), so that every token but the first is
    predicted once: ``n_tokens - 1`` predictions for any stride.
    """
    blocks: list[Block] = []
    scored = 0
    begin = 0
    while scored < n_tokens - 1:
        end = min(begin + context, n_tokens - 1)
        blocks.append(Block(begin, end, scored - begin))
        scored = end
        begin += stride
    return blocks


def load_text(
    text: Any, tokenizer: Tokenizer | None, tokens: int | None, *, special: bool = True
) -> Text:
    """Return at most `tokens` token ids (None: all) of `text`.

    Parameters
    ----------
    text : None, path, str or sequence of int
        None is the default text; a short str without a line break is a path; any other str is
        the text itself; integers are token ids.
    special : bool
        Documents get what the tokenizer puts around a text.

    Raises
    ------
    FileError
        If a path cannot be read as UTF-8 text.
    ArgumentError
        If there is no tokenizer for a text.
    """
    if text is not None and not isinstance(text, (str, os.PathLike)):
        ids = np.asarray(text)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ArgumentError(
                f"text must be a path, a str or a 1-D sequence of token ids, got "
                f"{type(text).__name__} of shape {ids.shape} and dtype {ids.dtype}"
            )
        ids = ids[:tokens].astype(np.int32)
        return Text(ids, hashlib.sha256(ids.tobytes()).hexdigest(), "token ids")
    content, name = _read(text)
    if tokenizer is None:
        raise ArgumentError(
            "the model folder has no tokenizer to read the text with: name one by "
            "tokenizer=FOLDER (--tokenizer FOLDER)"
        )
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    ids, documents = _encode(tokenizer, content, tokens, special)
    return Text(ids, sha256, name, documents)


def _read(text: str | os.PathLike[str] | None) -> tuple[str, str]:
    if text is None:
        from sparseattn.assets import corpus

        try:
            return corpus.evaluation_text(), "held-out topics of this Python's documentation"
        except corpus.MissingTextError as error:
            raise ArgumentError(str(error)) from None
    if isinstance(text, str) and (len(text) > 4096 or "\n" in text):
        return text, "a str"
    path = Path(text)
    try:
        return path.read_text(encoding="utf-8"), path.name
    except UnicodeDecodeError as error:
        raise FileError(
            f"text file {path} is not UTF-8 (byte {error.start}): convert or unpack it first"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"text file {path} cannot be read: {reason}") from None


def _encode(
    tokenizer: Tokenizer, content: str, tokens: int | None, special: bool
) -> tuple[NDArray[np.int32], int]:
    """Tokenise documents until there are enough ids; return these and the number of documents.

    ``<|endoftext|>`` parts documents. Where it is one of the tokenizer's own pieces it is read as
    such; else each document gets what the tokenizer puts around a text (``<s>`` in LLaMA's),
    where `special`.
    """
    documents = [content]
    if tokenizer.token_id(SEPARATOR) is None and SEPARATOR in content:
        documents = [part.strip() for part in content.split(SEPARATOR) if part.strip()]
    ids: list[int] = []
    used = 0
    for document in documents:
        left = None if tokens is None else tokens - len(ids)
        ids += _encode_beginning(tokenizer, document, left, special)
        used += 1
        if tokens is not None and len(ids) >= tokens:
            break
    return np.asarray(ids[:tokens], dtype=np.int32), used


def _encode_beginning(
    tokenizer: Tokenizer, document: str, tokens: int | None, special: bool
) -> Sequence[int]:
    """Tokenise a document, or as much of its beginning as `tokens` ids need.

    A cut can change only tokens near it, so the last `MARGIN` ids of a beginning are not used.
    """
    length = len(document) if tokens is None else 4 * (tokens + MARGIN)
    while length < len(document):
        ids = tokenizer.encode(document[:length], special=special)
        if tokens is not None and len(ids) >= tokens + MARGIN:
            return ids[:tokens]
        length *= 2
    return tokenizer.encode(document, special=special)


def require_length(text: Text, context: int) -> None:
    """Refuse a text that gives no interval: fewer than two blocks."""
    if len(text.ids) < context + 2:
        raise ArgumentError(
            f"text too short: {text.name} has {len(text.ids)} tokens, two blocks of context "
            f"{context} need at least {context + 2}: give a longer text or a smaller context"
        )
