"""SentencePiece BPE as llama2.c runs it, from its ``tok*.bin`` file: merge the best score first."""

from __future__ import annotations

import struct
from pathlib import Path

BYTES_FROM = 3  # ids 3 .. 258 are the bytes


def read_pieces(path: Path) -> list[tuple[bytes, float]]:
    """Piece and score of every id."""
    data = path.read_bytes()
    at, pieces = 4, []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        pieces.append((data[at : at + length], score))
        at += length
    return pieces


def encode(pieces: list[tuple[bytes, float]], text: str) -> list[int]:
    """Ids of `text` after a space, without the beginning token."""
    known = {piece: i for i, (piece, _) in reversed(list(enumerate(pieces)))}
    ids: list[int] = []
    for letter in " " + text if text else "":
        raw = letter.encode()
        ids += [known[raw]] if raw in known else [b + BYTES_FROM for b in raw]
    while True:
        best: tuple[float, int, int] | None = None
        for i in range(len(ids) - 1):
            merged = known.get(pieces[ids[i]][0] + pieces[ids[i + 1]][0])
            if merged is not None and (best is None or pieces[merged][1] > best[0]):
                best = pieces[merged][1], i, merged
        if best is None:
            return ids
        _, i, merged = best
        ids[i : i + 2] = [merged]
