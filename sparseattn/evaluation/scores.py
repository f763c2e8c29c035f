"""Ground-truth loss and the agreement of a variant with dense attention, per block.

``PPL = exp(-(1/M) sum log p(x[i+1] | x[..i]))`` at temperature 1, natural log, over the M
ground-truth tokens predicted (`text.cut_blocks`). Hidden states are kept, logits are made in
chunks of rows: nothing of size tokens x vocabulary ever exists.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sparseattn import _core
from sparseattn.attention import Plan
from sparseattn.evaluation.cost import Counter
from sparseattn.evaluation.text import Block, Tokenizer
from sparseattn.variants.base import Variant

__all__ = ["BlockScore", "LanguageModel", "Scorer"]

CHUNK = 1 << 23  # logits held at once, of each of the two models
KEEP = 1 << 29  # bytes of dense hidden states kept; beyond, they are computed again


class LanguageModel(Protocol):
    """What evaluation needs of a model; `sparseattn.Model` is one."""

    config: Any

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What reads text; None where the folder has none."""

    @property
    def fingerprint(self) -> str:
        """A digest of configuration and parameters."""

    def hidden(
        self,
        tokens: Any,
        attention: Any = None,
        per_layer: Any = None,
        on_attend: Callable[[int, Plan], None] | None = None,
    ) -> NDArray[np.float32]:
        """Return the states after the final norm, (batch, length, hidden)."""

    def head(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits (rows, vocabulary)."""


@dataclass
class BlockScore:
    """Sums over the scored targets of one block; `tail` is the last quarter of the context.

    Of embeddings, `cosine` to dense's; `cosine_tokens` is the sum over the block's `tokens`.
    """

    targets: int = 0
    tail: int = 0
    nll: float = 0.0
    nll_tail: float = 0.0
    kl: float = 0.0
    agree: int = 0
    seconds: float = 0.0
    tokens: int = 0
    sha256: str = ""
    cosine: float = 0.0
    cosine_tokens: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)


class Scorer:
    """Score blocks of one text under dense attention and under variants.

    Parameters
    ----------
    model : LanguageModel
    ids : ndarray of int32, shape (tokens,)
    context : int
        Length of a full block: positions from ``3 * context / 4`` on are its tail.
    """

    def __init__(
        self, model: LanguageModel, ids: NDArray[np.int32], context: int, dense: Variant
    ) -> None:
        self.model, self.ids, self.context, self.dense = model, ids, context, dense
        self._kept: dict[int, NDArray[np.float32]] = {}

    def scored(self, block: Block) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Places of a block that are scored, and the ids that are true there."""
        places = np.arange(block.first, block.end - block.begin)
        return places, self.ids[block.begin + 1 + places]

    def targets(self, block: Block) -> int:
        """How many places are scored."""
        return len(self.scored(block)[0])

    def block(self, block: Block, spec: Variant, counter: Counter | None = None) -> BlockScore:
        """Score one block; KL and agreement are against dense on the same tokens."""
        places, targets = self.scored(block)
        score = BlockScore(targets=len(places), tokens=block.end - block.begin)
        is_dense = spec == self.dense
        begin = time.perf_counter()
        hidden = self._hidden(block, spec, counter)
        score.seconds = time.perf_counter() - begin - (counter.seconds if counter else 0.0)
        if is_dense:
            self._keep(block, hidden)
        base = None if is_dense else self._dense_hidden(block)
        digest = hashlib.sha256()
        for part in self._chunks(len(places)):
            self._rows(score, places[part], targets[part], hidden, base, digest.update)
        score.sha256 = digest.hexdigest()
        if counter:
            score.counts = counter.counts()
        return score

    def _rows(
        self,
        score: BlockScore,
        rows: NDArray[np.int64],
        target: NDArray[np.int32],
        hidden: NDArray[np.float32],
        base: NDArray[np.float32] | None,
        digest: Callable[[bytes], None],
    ) -> None:
        """Add a chunk of rows (places of the block) with their true ids to `score`."""
        begin = time.perf_counter()
        logits = self.model.head(hidden[rows])
        score.seconds += time.perf_counter() - begin
        nll, best = _core.nll(logits, np.ascontiguousarray(target, dtype=np.int32))
        tail = rows >= self.context * 3 // 4
        score.nll += float(nll.sum())
        score.nll_tail += float(nll[tail].sum())
        score.tail += int(tail.sum())
        digest(nll.astype("<f8").tobytes())
        if base is None:
            score.agree += len(nll)
            return
        dense = self.model.head(base[rows])
        score.kl += float(_core.kl(dense, logits).sum())
        score.agree += int((_core.nll(dense, best)[1] == best).sum())

    def _chunks(self, count: int) -> Iterator[slice]:
        step = max(1, CHUNK // self.model.config.vocab_size)
        for begin in range(0, count, step):
            yield slice(begin, begin + step)

    def _hidden(
        self, block: Block, spec: Variant, counter: Counter | None = None
    ) -> NDArray[np.float32]:
        tokens = self.ids[None, block.begin : block.end]
        hidden: NDArray[np.float32] = self.model.hidden(tokens, spec, on_attend=counter)[0]
        return hidden

    def _dense_hidden(self, block: Block) -> NDArray[np.float32]:
        hidden = self._kept.get(block.begin)
        if hidden is None:
            hidden = self._hidden(block, self.dense)
            self._keep(block, hidden)
        return hidden

    def _keep(self, block: Block, hidden: NDArray[np.float32]) -> None:
        if sum(h.nbytes for h in self._kept.values()) + hidden.nbytes <= KEEP:
            self._kept[block.begin] = hidden
