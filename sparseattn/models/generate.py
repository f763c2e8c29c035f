"""Text from a model: prompts read, tokens chosen one by one, until something ends each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparseattn.errors import ArgumentError, DtypeError
from sparseattn.models.checkpoint import show
from sparseattn.models.incremental import Incremental
from sparseattn.models.pieces import Pieces, Stops, read_stops
from sparseattn.models.sampling import Sampler, Sampling, integer
from sparseattn.variants import Variant

if TYPE_CHECKING:
    from sparseattn.models.model import Model, Spec

Ids = NDArray[np.int64]

KEYWORDS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "attention"),
    "per_layer",
)
# What people type elsewhere, and what it is called here.
RENAMED = {
    "max_length": "max_new_tokens, which does not count the prompt",
    "max_tokens": "max_new_tokens",
    "do_sample": "temperature: None takes the likeliest token, a number above 0 draws",
    "num_beams": "temperature, top_k and top_p: there is no beam search",
    "generator": "seed",
    "stop_strings": "stop",
    "eos_token_id": "stop, or change the id in config.json",
    "spec": "attention",
}


@dataclass(frozen=True)
class Prompts:
    """What `prompt=` came to."""

    ids: list[Ids]
    text: bool  # strings came: strings are given back
    many: bool  # a list came: a list is given back


@dataclass(frozen=True)
class Request:
    """A checked call of generate or stream."""

    model: Model
    prompts: Prompts
    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    specs: list[Variant]


def read_request(
    model: Model,
    prompt: Any,
    *,
    max_new_tokens: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    seed: Any,
    stop: Any,
    attention: Spec,
    per_layer: Mapping[int, Spec] | None,
) -> Request:
    """Check everything before anything is computed."""
    count = integer("max_new_tokens", max_new_tokens, "the context ends a generation in any case")
    if not 1 <= count < 2**31:
        raise ArgumentError(f"max_new_tokens is {count}: give a number from 1 on")
    sampling = Sampling.make(temperature, top_k, top_p, seed)
    stops = read_stops(stop)
    specs = model._layer_specs(attention, per_layer)
    prompts = read_prompts(model, prompt)
    if stops and model.tokenizer is None:
        raise ArgumentError(f"stop is {show(stop)}, but this model has no tokenizer: leave it out")
    return Request(model, prompts, count, sampling, stops, specs)


def read_prompts(model: Model, prompt: Any) -> Prompts:
    """A string or token ids, or a list of either."""
    if isinstance(prompt, str):
        return Prompts([check_ids(model, encode(model, prompt), "prompt")], True, False)
    if isinstance(prompt, Mapping):
        raise DtypeError("prompt is a mapping: give its ids, as in prompt['input_ids']")
    if isinstance(prompt, bytes) or not hasattr(prompt, "__len__"):
        raise DtypeError(f"prompt is a {type(prompt).__name__}: give a str, token ids, or a list")
    items = list(prompt)
    if items and all(isinstance(item, str) for item in items):
        return Prompts(
            [check_ids(model, encode(model, s), f"prompt {i}") for i, s in enumerate(items)],
            True,
            True,
        )
    if items and all(hasattr(item, "__len__") and not isinstance(item, str) for item in items):
        rows = [check_ids(model, item, f"prompt {i}") for i, item in enumerate(items)]
        return Prompts(rows, False, True)
    if any(isinstance(item, str) or hasattr(item, "__len__") for item in items):
        raise DtypeError("prompt mixes strings, ids and lists of ids: give one kind")
    if isinstance(prompt, list) and not items:
        raise ArgumentError("prompt is an empty list: give at least one prompt, or token")
    return Prompts([check_ids(model, prompt, "prompt")], False, False)


def encode(model: Model, text: str) -> Sequence[int]:
    """The ids of a prompt, with what the tokenizer puts around a text."""
    if model.tokenizer is None:
        raise ArgumentError(
            "prompt is a str, but this model has no tokenizer: give token ids, or load it with "
            "tokenizer="
        )
    ids = model.tokenizer.encode(text, special=True)
    begin = model.config.bos_token_id
    if ids or begin is None:
        return ids
    return [begin]  # nothing but the beginning, as transformers does


def check_ids(model: Model, ids: Any, name: str) -> Ids:
    """Ids that the model can read and continue."""
    array = np.array(ids)  # ours alone: what is checked is what is read
    config = model.config
    if array.size == 0:
        raise ArgumentError(
            f"{name} is empty, and this model's configuration names no beginning to start from: "
            "give at least one token"
        )
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DtypeError(
            f"{name} is {array.dtype} of shape {array.shape}: give integers of shape (length,)"
        )
    for bad in (array.min(), array.max()):
        if not 0 <= bad < config.vocab_size:
            raise ArgumentError(
                f"{name} holds token {bad}: this model's ids are 0 to {config.vocab_size - 1}"
            )
    if len(array) >= config.context:
        raise ArgumentError(
            f"{name} has {len(array)} tokens, and this model's context of {config.context} must "
            "hold at least one more: shorten it"
        )
    return array.astype(np.int64, copy=False)


# ---- the loop ------------------------------------------------------------------------------------


def tokens(request: Request, ended: set[int]) -> Iterator[list[tuple[int, int]]]:
    """(prompt, token) of every prompt that goes on, step by step.

    Ends a prompt at an end token, which is not given, at `max_new_tokens` and at the context's
    end; and those that the caller puts into `ended`.
    """
    ids, config = request.prompts.ids, request.model.config
    sampler = Sampler(request.sampling, [prompt.tolist() for prompt in ids])
    running = Incremental(request.model, request.specs, ids)
    most = [min(request.max_new_tokens, config.context - len(prompt)) for prompt in ids]
    ends = frozenset(config.eos_token_ids)
    logits, count = running.read(), 0
    while True:
        count += 1
        prompts = running.prompts
        chosen = dict(zip(prompts, sampler(logits, prompts), strict=True))
        found = [(p, token) for p, token in chosen.items() if token not in ends]
        yield found
        going = {p for p, _ in found if p not in ended and count < most[p]}
        if not going:
            return
        if len(going) < len(prompts):
            running.keep(going)
        logits = running.step([chosen[p] for p in running.prompts])


class Writer:
    """One prompt's text as it comes."""

    def __init__(self, request: Request, prompt: Ids) -> None:
        assert request.model.tokenizer is not None
        self.pieces = Pieces(request.model.tokenizer, prompt.tolist())
        self.stops = Stops(request.stops)

    def add(self, token: int) -> str:
        return self.stops.add(self.pieces.add(token))

    @property
    def stopped(self) -> bool:
        return self.stops.found

    def end(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        last = self.stops.add(self.pieces.end())
        return last if self.stopped else last + self.stops.end()


def texts(request: Request) -> Iterator[list[tuple[int, str]]]:
    """(prompt, piece) of every prompt that has one, step by step."""
    writers = [Writer(request, prompt) for prompt in request.prompts.ids]
    stopped: set[int] = set()
    for found in tokens(request, stopped):
        pieces = [(p, writers[p].add(token)) for p, token in found]
        stopped.update(p for p, _ in found if writers[p].stopped)
        yield [(p, piece) for p, piece in pieces if piece]
    yield [(p, piece) for p, writer in enumerate(writers) if (piece := writer.end())]


def numbers(request: Request) -> Iterator[list[tuple[int, int]]]:
    """(prompt, token) step by step; a prompt ends with the token that completes a stop string."""
    stopped: set[int] = set()
    if not request.stops:
        yield from tokens(request, stopped)
        return
    writers = [Writer(request, prompt) for prompt in request.prompts.ids]
    for found in tokens(request, stopped):
        for prompt, token in found:
            writers[prompt].add(token)
            if writers[prompt].stopped:
                stopped.add(prompt)
        yield found


def generate(request: Request) -> Any:
    """All of it: text for text, ids for ids, a list for a list."""
    prompts = request.prompts
    if prompts.text:
        written: list[list[str]] = [[] for _ in prompts.ids]
        for found in texts(request):
            for prompt, piece in found:
                written[prompt].append(piece)
        whole = ["".join(pieces) for pieces in written]
        return whole if prompts.many else whole[0]
    chosen: list[list[int]] = [[] for _ in prompts.ids]
    for counted in numbers(request):
        for prompt, token in counted:
            chosen[prompt].append(token)
    arrays = [np.array(ids, np.int64) for ids in chosen]
    return arrays if prompts.many else arrays[0]


def stream(request: Request) -> Iterator[Any]:
    """Pieces of one prompt's continuation."""
    if request.prompts.many:
        raise ArgumentError(
            f"prompt is a list of {len(request.prompts.ids)}, and a stream has one: loop over "
            "them, or call generate()"
        )
    steps: Iterator[list[tuple[int, Any]]] = (
        texts(request) if request.prompts.text else numbers(request)
    )
    return (piece for found in steps for _, piece in found)
