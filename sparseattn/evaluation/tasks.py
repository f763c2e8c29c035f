"""What a model is scored by: the next token, masked tokens, or the embeddings of texts.

A task is words and columns; `scores` and `encoders` do the scoring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["TASKS", "Measure", "Task", "distance", "task_of"]


class Measure(NamedTuple):
    """A column of quality: the name of what a row holds, an interval ``[value, low, high]``."""

    head: str
    name: str
    sign: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Task:
    """What is counted, which columns say it, and how these are explained."""

    counted: str
    measures: tuple[Measure, ...]
    legend: str
    perplexity: str  # what it is of; empty: there is none
    distance: str  # from dense: the axis of a plot
    near: str  # the advice's words for a distance of at most {0}; {1} is 1 - {0}
    shown: str  # the column that they are about
    call: str  # how the advised spec is used
    reference: str  # transformers' class for the dense run
    compared: str  # what is compared with it


KL = "KL: KL(dense || variant), nats a token. top-1: share of tokens with the same likeliest {}."
SEGMENT = "loss minus dense's on the same tokens, nats a token"

TASKS = {
    "next": Task(
        counted="predictions",
        measures=(
            Measure("Δnll", "dnll", sign=True),
            Measure("Δnll tail", "dnll_tail", sign=True),
            Measure("KL", "kl"),
            Measure("top-1 %", "top1", scale=100.0),
        ),
        legend=f"Δnll: {SEGMENT}; tail: in the last quarter of a block. {KL.format('next one')}",
        perplexity="perplexity",
        distance="KL(dense || variant), nats per token",
        near="KL at most {0:g} nats",
        shown="kl",
        call='model(tokens, attention="{}")',
        reference="AutoModelForCausalLM",
        compared="logit",
    ),
    "masked": Task(
        counted="masked tokens",
        measures=(
            Measure("Δnll", "dnll", sign=True),
            Measure("KL", "kl"),
            Measure("top-1 %", "top1", scale=100.0),
        ),
        legend=(
            "15 % of the tokens are masked, the same ones for every variant, and scored. "
            f"Δnll: {SEGMENT}. {KL.format('one')}"
        ),
        perplexity="perplexity of the masked tokens",
        distance="KL(dense || variant), nats per masked token",
        near="KL at most {0:g} nats",
        shown="kl",
        call='model(tokens, attention="{}")',
        reference="AutoModelForMaskedLM",
        compared="logit",
    ),
    "embedding": Task(
        counted="texts",
        measures=(
            Measure("cosine", "cosine"),
            Measure("1-cosine", "distance"),
            Measure("token cosine", "cosine_tokens"),
        ),
        legend=(
            "every block is a text. cosine: between a text's embedding and dense's, 1-cosine: the "
            "same from 1. token cosine: between the states of a token and dense's, all tokens."
        ),
        perplexity="",
        distance="1 - cosine of a text's embedding to dense's",
        near="cosine to dense at least {1:g}",
        shown="cosine",
        call='model.embed(texts, attention="{}")',
        reference="AutoModel",
        compared="state",
    ),
}


def task_of(config: Any) -> str:
    """The task of a model with this configuration; one that says nothing is causal."""
    if getattr(config, "causal", True):
        return "next"
    return "masked" if config.head == "masked_lm" else "embedding"


def distance(row: Mapping[str, Any]) -> list[float | None]:
    """How far a row is from dense, with its interval: what advice and plots go by."""
    found: list[float | None] = row["kl"] if "kl" in row else row["distance"]
    return found
