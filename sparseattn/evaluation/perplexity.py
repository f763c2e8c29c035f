"""Perplexity of one spec on a text: the first half of a comparison, alone."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sparseattn.errors import ArgumentError
from sparseattn.evaluation.job import Job, output_folder, prepare
from sparseattn.evaluation.rows import parse_attention, seeded
from sparseattn.evaluation.stats import DRAWS, Interval, bootstrap_mean
from sparseattn.evaluation.table import number, with_interval
from sparseattn.evaluation.tasks import TASKS
from sparseattn.variants import Variant

__all__ = ["Perplexity", "perplexity"]


@dataclass(frozen=True)
class Perplexity:
    """Ground-truth perplexity with everything its definition depends on.

    Attributes
    ----------
    value : float
        ``exp(nll)``.
    nll : Interval
        Mean negative log-likelihood, nats per token, with its 95 % interval over blocks.
    """

    value: float
    nll: Interval
    attention: str
    evaluation: dict[str, Any]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        low, high = (None if math.isnan(x) else x for x in self.nll[1:])
        return {**asdict(self), "nll": [self.nll.value, low, high]}

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    def __repr__(self) -> str:
        e = self.evaluation
        counted = TASKS[e["task"]].counted
        return (
            f"perplexity {number(self.value, 4)}, loss {with_interval(self.nll)} nats a token, "
            f"with {self.attention}\n"
            f"{e['model']} on {e['text']} (sha256 {e['text_sha256'][:12]})\n"
            f"{e['predictions']:,} {counted} in {e['blocks']} blocks of {e['context']}, stride "
            f"{e['stride']}; ± is half the 95 % interval, bootstrap over blocks, {DRAWS:,} draws"
        )


def perplexity(
    model: Any = None,
    text: Any = None,
    attention: str | Variant = "dense",
    tokens: int | None = 20_000,
    *,
    save: str | os.PathLike[str] | None = None,
    context: int | None = None,
    stride: int | None = None,
    seed: int = 0,
    random_weights: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Perplexity:
    """Return the ground-truth perplexity of a model under one spec, at temperature 1.

    Parameters are those of `sparseattn.compare`.

    Examples
    --------
    >>> from sparseattn.evaluation.perplexity import perplexity
    >>> perplexity(attention="window:64", tokens=2000).value < 50
    True
    """
    specs = parse_attention(attention)
    if len(specs) != 1:
        raise ArgumentError(f"attention must be one spec here, got {len(specs)}: use compare")
    folder = output_folder(save)
    job = prepare(
        model,
        text,
        specs,
        tokens=tokens,
        context=context,
        stride=stride,
        seed=seed,
        random_weights=random_weights,
        tokenizer=tokenizer,
        progress=progress,
    )
    if not TASKS[job.task].perplexity:
        raise ArgumentError(
            f"{job.name} is an encoder without a masked-LM head, which has no perplexity: use "
            "compare, which says how far its embeddings move"
        )
    with job.open(folder, "eval", {"attention": str(specs[0])}) as records:
        result = _score(job, specs[0])
        records.write(".json", result.to_json())
    return result


def _score(job: Job, spec: Variant) -> Perplexity:
    """Score every block; no comparison, so dense runs only if it is the spec."""
    job.scorer.dense = seeded(spec, job.seed)
    job.score(spec, 1)
    (blocks,) = job.scores(spec, 1) or [[]]
    sums = np.array([score.nll for score in blocks])
    nll = bootstrap_mean(sums, [score.targets for score in blocks], seed=job.seed)
    evaluation = {**job.describe(), "seed": job.seed, "draws": DRAWS}
    value = math.exp(min(nll.value, 700.0))
    return Perplexity(value, nll, str(spec), evaluation, job.environment)
