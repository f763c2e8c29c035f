"""What `compare` and `perplexity` share: a model, a text in blocks, a folder, and the scoring."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparseattn.errors import ArgumentError
from sparseattn.evaluation.cost import Counter
from sparseattn.evaluation.encoders import make_scorer, read_around
from sparseattn.evaluation.results import Records, check_writable
from sparseattn.evaluation.rows import DENSE, check_specs, is_random, seeded
from sparseattn.evaluation.scores import BlockScore, LanguageModel
from sparseattn.evaluation.tasks import task_of
from sparseattn.evaluation.text import Block, Text, cut_blocks, load_text, require_length
from sparseattn.evaluation.trust import environment
from sparseattn.progress import Bar, progress
from sparseattn.variants import Variant

__all__ = ["Job", "checked_int", "checked_numbers", "load_model", "output_folder", "prepare"]

MAX_CONTEXT = 1024  # unless asked for more: enough blocks for an interval


@dataclass
class Job:
    """One model on one text, scored block by block under any spec.

    Attributes
    ----------
    specs : sequence of Variant
        What was asked for.
    records : Records
        Finished blocks; those that an interrupted run has left are not computed again.
    """

    model: LanguageModel
    name: str
    text: Text
    context: int
    stride: int
    seed: int
    environment: dict[str, Any]
    progress: bool | None = None
    specs: Sequence[Variant] = ()

    def __post_init__(self) -> None:
        self.records = Records(None, "", {})
        self.blocks = cut_blocks(len(self.text.ids), self.context, self.stride)
        self.scorer = make_scorer(self.model, self.text.ids, self.context, DENSE, self.seed)

    @property
    def task(self) -> str:
        """What the model is scored by: a name in `tasks.TASKS`."""
        return task_of(self.model.config)

    def open(self, folder: Path | None, verb: str, settings: Mapping[str, Any]) -> Records:
        """Keep records in `folder` from now on, and take up those of an interrupted run."""
        env = {k: self.environment[k] for k in ("sparseattn", "cpu", "threads", "isa")}
        everything = {
            "verb": verb,
            "model": self.model.fingerprint,
            "text": self.text.sha256,
            "tokens": len(self.text.ids),
            "context": self.context,
            "stride": self.stride,
            "seed": self.seed,
            **settings,
            **env,
        }
        self.records = Records(folder, verb, everything)
        return self.records

    def seeds(self, spec: Variant, seeds: int) -> list[int]:
        """Return the seeds that a spec runs with: one where no seed matters to it."""
        return [self.seed + i for i in range(seeds if is_random(spec) else 1)]

    def score(self, spec: Variant, seeds: int) -> None:
        """Score all blocks of a spec that have no record yet."""
        todo = [
            (seed, block)
            for seed in self.seeds(spec, seeds)
            for block in self.blocks
            if self.records.get(block_key(spec, seed, block)) is None
        ]
        with progress(sum(b.targets for _, b in todo), str(spec), "token", self.progress) as bar:
            self._score(spec, todo, bar)
        if todo:
            self.records.sync()

    def _score(self, spec: Variant, todo: Iterable[tuple[int, Block]], bar: Bar) -> None:
        for seed, block in todo:
            counter = Counter()
            score = self.scorer.block(block, seeded(spec, seed), counter)
            self.records.add(block_key(spec, seed, block), asdict(score))
            bar.update(block.targets)

    def scores(self, spec: Variant, seeds: int) -> list[list[BlockScore]] | None:
        """Return a list of blocks for each seed, or None where some are missing."""
        found = [
            [self.records.get(block_key(spec, seed, block)) for block in self.blocks]
            for seed in self.seeds(spec, seeds)
        ]
        if any(record is None for records in found for record in records):
            return None
        names = BlockScore.__dataclass_fields__
        return [
            [BlockScore(**{k: v for k, v in (r or {}).items() if k in names}) for r in records]
            for records in found
        ]

    def describe(self) -> dict[str, Any]:
        """Return what was evaluated, in plain values."""
        config = self.model.config
        return {
            "model": self.name,
            "task": self.task,
            "family": config.family,
            "layers": config.n_layers,
            "heads": config.n_heads,
            "kv_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "vocabulary": config.vocab_size,
            "fingerprint": self.model.fingerprint,
            "text": self.text.name,
            "text_sha256": self.text.sha256,
            "tokens": len(self.text.ids),
            "documents": self.text.documents,
            "predictions": sum(self.scorer.targets(block) for block in self.blocks),
            "context": self.context,
            "stride": self.stride,
            "blocks": len(self.blocks),
        }


def prepare(
    model: Any,
    text: Any,
    specs: Sequence[Variant],
    *,
    tokens: int | None,
    context: int | None,
    stride: int | None,
    seed: int,
    random_weights: int | None,
    tokenizer: str | os.PathLike[str] | None,
    progress: bool | None,
    both_ways: Sequence[Variant] | None = None,
) -> Job:
    """Load model and text, and check everything that can be checked before any work.

    `both_ways` replaces `specs` where the model is an encoder.
    """
    seed = checked_int("seed", seed, 0, 2**31)
    loaded, name = load_model(model, random_weights, tokenizer)
    task = task_of(loaded.config)
    specs = specs if both_ways is None or task == "next" else both_ways
    check_specs(specs, loaded.config)
    limit = longest_text(loaded, task)
    context = min(limit, MAX_CONTEXT) if context is None else context
    context = checked_int("context", context, 2, limit)
    stride = checked_int("stride", context if stride is None else stride, 1, context)
    if tokens is not None:
        checked_int("tokens", tokens, context + 2, 2**31 - 1)
    content = load_text(text, loaded.tokenizer, tokens, special=task == "next")
    require_length(content, context)
    check_ids(content, loaded.config.vocab_size)
    return Job(loaded, name, content, context, stride, seed, environment(), progress, specs)


def longest_text(model: Any, task: str) -> int:
    """The most tokens that a block may have; an encoder reads more around them."""
    limit: int = model.config.context
    if task == "next":
        return limit
    if task == "embedding":
        limit = min(limit, model.pooling.max_tokens or limit)
    return max(limit - sum(map(len, read_around(model.tokenizer))), 1)


def load_model(
    model: Any, random_weights: int | None, tokenizer: str | os.PathLike[str] | None
) -> tuple[LanguageModel, str]:
    """Return a model and its name: a folder's, an object's, or the embedded default."""
    from sparseattn.models import Model
    from sparseattn.models.objects import is_model

    if is_model(model):
        loaded = Model.from_pretrained(model, random_weights=random_weights, tokenizer=tokenizer)
        return loaded, type(model).__name__
    if model is not None and not isinstance(model, str | os.PathLike):
        if not hasattr(model, "hidden") or not hasattr(model, "head"):
            raise ArgumentError(
                "model must be a folder, a sparseattn.Model or a model of transformers, got "
                f"{type(model).__name__}"
            )
        given = {"random_weights": random_weights, "tokenizer": tokenizer}
        for name, value in given.items():
            if value is not None:
                raise ArgumentError(f"{name} applies to a model folder, not to a loaded Model")
        return model, str(getattr(model, "folder", None) or type(model).__name__)
    name = "the embedded default" if model is None else Path(model).resolve().name
    loaded = Model.from_pretrained(model, random_weights=random_weights, tokenizer=tokenizer)
    if random_weights is not None:
        name += f" with random weights (seed {random_weights})"
    return loaded, name


def output_folder(save: str | os.PathLike[str] | None) -> Path | None:
    """Return the folder to save to, known to be writable."""
    if save is None:
        return None
    if not os.fspath(save):
        raise ArgumentError("save is empty: name a folder")
    folder = Path(save)
    check_writable(folder)
    return folder


def checked_int(name: str, value: Any, low: int, high: int) -> int:
    """Return an integer argument, known to be in range."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name} must be an integer, got {value!r:.80}") from None
    if not low <= number <= high:
        raise ArgumentError(f"{name} must be from {low:,} to {high:,}, got {number:,}")
    return number


def checked_numbers(name: str, values: Any) -> tuple[float, ...]:
    """Return an argument of one number or several as a tuple of finite numbers."""
    items = values if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    try:
        numbers = tuple(float(v) for v in items)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name} must be numbers, got {values!r:.80}") from None
    if not all(np.isfinite(numbers)):
        raise ArgumentError(f"{name} must be finite numbers, got {values!r:.80}")
    return numbers


def check_ids(text: Text, vocab_size: int) -> None:
    """Refuse ids that the model does not know: its tokenizer is another model's."""
    top = int(text.ids.max())
    if top >= vocab_size or text.ids.min() < 0:
        raise ArgumentError(
            f"text gave token id {top}, but the model knows 0 to {vocab_size - 1}: "
            f"use the tokenizer that belongs to it"
        )


def block_key(spec: Variant, seed: int, block: Block) -> str:
    """Return the id of a block's record."""
    return f"block|{spec}|{seed}|{block.begin}"
