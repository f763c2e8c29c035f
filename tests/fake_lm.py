"""A one-layer language model without a folder, for tests of evaluation."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np

from sparseattn.attention import attend_with_plan
from sparseattn.variants import parse

HEADS, KV_HEADS, DIM, VOCAB = 4, 2, 8, 50


class FakeTokenizer:
    """One id a character; `<s>` in front of a text where asked for."""

    def __init__(self, begin: bool = False, separator: int | None = None) -> None:
        self.begin, self.separator, self.calls = begin, separator, []

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        self.calls.append(len(text))
        return [1] * (special and self.begin) + [2 + ord(c) % (VOCAB - 2) for c in text]

    def token_id(self, token: str) -> int | None:
        return self.separator if token == "<|endoftext|>" else None


class FakeModel:
    """Embedding, one attention layer, output matrix: all random, all float32."""

    def __init__(self, seed: int = 0, context: int = 64, vocab: int = VOCAB) -> None:
        rng = np.random.default_rng(seed)
        width = HEADS * DIM
        self.config = SimpleNamespace(
            family="fake",
            n_layers=1,
            n_heads=HEADS,
            n_kv_heads=KV_HEADS,
            head_dim=DIM,
            hidden=width,
            vocab_size=vocab,
            context=context,
        )
        self.tokenizer = FakeTokenizer()
        self.fingerprint = hashlib.sha256(bytes([seed])).hexdigest()
        self.embed = rng.standard_normal((vocab, width), dtype=np.float32)
        self.wk, self.wv = (
            rng.standard_normal((width, KV_HEADS * DIM), dtype=np.float32) / 2 for _ in range(2)
        )
        self.out = rng.standard_normal((width, vocab), dtype=np.float32) / 20
        self.calls: list[str] = []
        self.largest_head = 0

    def hidden(
        self, tokens: Any, attention: Any = None, per_layer: Any = None, on_attend: Any = None
    ) -> np.ndarray:
        spec = parse(attention or "dense")
        self.calls.append(str(spec))
        x = self.embed[np.asarray(tokens)]
        batch, length, width = x.shape

        def heads(y: np.ndarray, count: int) -> np.ndarray:
            return y.reshape(batch, length, count, DIM).swapaxes(1, 2)

        out, _, plan = attend_with_plan(
            heads(x, HEADS),
            heads(x @ self.wk, KV_HEADS),
            heads(x @ self.wv, KV_HEADS),
            spec.layer(0),
            causal=True,
        )
        if on_attend is not None:
            on_attend(0, plan)
        return np.ascontiguousarray(x + out.swapaxes(1, 2).reshape(batch, length, width))

    def head(self, rows: np.ndarray) -> np.ndarray:
        self.largest_head = max(self.largest_head, len(rows))
        return np.ascontiguousarray(rows @ self.out)


def fake_ids(count: int, seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, count)
