"""Scoring of encoders: loss of masked tokens, or the agreement of embeddings with dense's.

A block of the text is read as a text of its own, with what the tokenizer puts around one. Masks are
drawn once for the whole text, so every variant, and every block that overlaps another, sees the
same ones. [Devlin et al. 2019, arXiv:1810.04805, section 3.1; every chosen token becomes the mask.]
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseattn.errors import ArgumentError
from sparseattn.evaluation.cost import Counter
from sparseattn.evaluation.scores import BlockScore, LanguageModel, Scorer
from sparseattn.evaluation.tasks import task_of
from sparseattn.evaluation.text import Block, Tokenizer
from sparseattn.variants.base import Variant

__all__ = ["EmbeddingScorer", "MaskedScorer", "make_scorer", "read_around"]

MASKED = 0.15  # share of the tokens

Ids = NDArray[np.int32]


def read_around(tokenizer: Tokenizer | None) -> tuple[Ids, Ids]:
    """The ids that a tokenizer puts before and after a text."""
    inner: list[int] = [] if tokenizer is None else list(tokenizer.encode("a"))
    whole = [] if tokenizer is None else list(tokenizer.encode("a", special=True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
    before, after = whole[:at], whole[at + len(inner) :]
    return np.array(before, np.int32), np.array(after, np.int32)


def make_scorer(model: LanguageModel, ids: Ids, context: int, dense: Variant, seed: int) -> Scorer:
    """The scorer of the model's task."""
    task = task_of(model.config)
    if task == "next":
        return Scorer(model, ids, context, dense)
    if task == "embedding":
        return EmbeddingScorer(model, ids, context, dense)
    mask = getattr(model.tokenizer, "mask_token_id", None)
    if mask is None:
        raise ArgumentError(
            "the model is scored by masked tokens, and no tokenizer here names a mask token: name "
            "one that does by tokenizer=FOLDER (--tokenizer FOLDER)"
        )
    return MaskedScorer(model, ids, context, dense, mask, seed)


class EncoderScorer(Scorer):
    """A scorer whose model reads a block as a text of its own."""

    def __init__(self, model: LanguageModel, ids: Ids, context: int, dense: Variant) -> None:
        super().__init__(model, ids, context, dense)
        self.before, self.after = read_around(model.tokenizer)

    def inputs(self, block: Block) -> Ids:
        """The tokens of a block and what stands around them."""
        content = self.ids[block.begin : block.end]
        return np.concatenate([self.before, content, self.after])

    def _hidden(
        self, block: Block, spec: Variant, counter: Counter | None = None
    ) -> NDArray[np.float32]:
        tokens = self.inputs(block)
        hidden: NDArray[np.float32] = self.model.hidden(tokens[None], spec, on_attend=counter)[0]
        return hidden


class MaskedScorer(EncoderScorer):
    """Loss, KL and agreement at the masked tokens of a block.

    Parameters
    ----------
    mask : int
        The id that stands for a masked token.
    seed : int
        Which tokens are masked.
    """

    def __init__(
        self,
        model: LanguageModel,
        ids: Ids,
        context: int,
        dense: Variant,
        mask: int,
        seed: int,
    ) -> None:
        super().__init__(model, ids, context, dense)
        self.chosen = np.random.default_rng(seed).random(len(ids)) < MASKED
        self.hidden_ids = np.where(self.chosen, np.int32(mask), ids).astype(np.int32)

    def inputs(self, block: Block) -> Ids:
        """The tokens of a block, masked, and what stands around them."""
        content = self.hidden_ids[block.begin : block.end]
        return np.concatenate([self.before, content, self.after])

    def _hidden(
        self, block: Block, spec: Variant, counter: Counter | None = None
    ) -> NDArray[np.float32]:
        whole = super()._hidden(block, spec, counter)
        return whole[len(self.before) : len(whole) - len(self.after)]

    def scored(self, block: Block) -> tuple[NDArray[np.int64], Ids]:
        """Places of the block's masked tokens that no block before it scored, and their ids."""
        places = np.flatnonzero(self.chosen[block.begin : block.end])
        places = places[places >= block.first]
        return places, self.ids[block.begin + places]


class EmbeddingScorer(EncoderScorer):
    """Cosines between a block's embedding, and its tokens' states, and those of dense."""

    def targets(self, block: Block) -> int:
        """A block is one text."""
        return 1

    def block(self, block: Block, spec: Variant, counter: Counter | None = None) -> BlockScore:
        """Score one block."""
        tokens = len(self.inputs(block))
        score = BlockScore(targets=1, tokens=tokens)
        begin = time.perf_counter()
        hidden = self._hidden(block, spec, counter)
        vector = self._pool(hidden)
        score.seconds = time.perf_counter() - begin - (counter.seconds if counter else 0.0)
        if spec == self.dense:
            self._keep(block, hidden)
        base = self._dense_hidden(block)
        score.cosine = float(cosines(vector, self._pool(base)))
        score.cosine_tokens = float(cosines(hidden, base).sum())
        score.sha256 = hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()
        if counter:
            score.counts = counter.counts()
        return score

    def _pool(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        model: Any = self.model
        vector: NDArray[np.float32] = model.pooling(hidden)
        return vector


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of the angle between the last axes, in float64; equal vectors give 1, zeros too."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    found: NDArray[np.float64] = (x * y).sum(-1) / np.where(norms == 0, 1.0, norms)
    return np.where((a == b).all(-1), 1.0, found)
