"""Sentence embeddings: states of a text's tokens become one vector, as the folder's files say.

Reimers, Gurevych, "Sentence-BERT", 2019, arXiv:1908.10084; the files are those of
sentence-transformers: modules.json, the Pooling module's config.json, and where texts are cut.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparseattn.errors import ArgumentError, DtypeError, FileError
from sparseattn.models.batch import Ids, check_tokens
from sparseattn.models.checkpoint import (
    AGAIN,
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    MAX_CONFIG_DEPTH,
    parse_json,
    read_small_json,
    read_text,
    show,
)
from sparseattn.models.common import F32, Config
from sparseattn.models.fields import MAX_CONTEXT, MAX_HIDDEN, Fields
from sparseattn.models.tokenizer import SETTINGS_FILE

if TYPE_CHECKING:
    from sparseattn.models.model import Model, Spec

MODULES_FILE = "modules.json"
TEXT_FILE = "sentence_bert_config.json"
PROMPT_FILE = "config_sentence_transformers.json"
MODULE_FOLDER = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)

# The modes, by the flags of older Pooling modules, in the order in which these join several.
MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
KNOWN_MODES = {mode: mode for mode in MODES.values()}
LEAST_NORM = 1e-12  # as PyTorch's normalize


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a text becomes tokens, and the states of its tokens one vector.

    Attributes
    ----------
    modes : tuple of str
        Of "cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean" (by place, from 1),
        "lasttoken"; the vectors of several are joined.
    normalize : bool
        Divide by the Euclidean norm.
    max_tokens : int or None
        Where a str is cut; None is the context.
    lower : bool
        Texts are lowered before the tokenizer sees them.
    prompt : str
        What stands before every text.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_tokens: int | None = None
    lower: bool = False
    prompt: str = ""

    def __call__(self, states: F32) -> F32:
        """One vector of the states (tokens, hidden) of one text."""
        wide = np.concatenate([pooled(mode, states) for mode in self.modes])
        if self.normalize:
            wide /= max(float(np.linalg.norm(wide)), LEAST_NORM)
        return wide.astype(np.float32)


def pooled(mode: str, states: F32) -> NDArray[np.float64]:
    """One mode's vector (hidden,) of states (tokens, hidden)."""
    wide = states.astype(np.float64)
    if mode in ("cls", "lasttoken"):
        one: NDArray[np.float64] = wide[0 if mode == "cls" else -1]
        return one
    if mode == "max":
        return np.asarray(wide.max(0))
    weights = np.arange(1.0, len(wide) + 1) if mode == "weightedmean" else np.ones(len(wide))
    total = weights.sum()
    return np.asarray(weights @ wide / (math.sqrt(total) if "sqrt" in mode else total))


def read_pooling(folder: Path, config: Config) -> Pooling:
    """What the folder's files say; without them, the mean over tokens."""
    path = folder / MODULES_FILE
    if config.causal or not os.path.lexists(path):
        return Pooling()
    text = read_text(path, MAX_CONFIG_BYTES)
    whole = parse_json(f'{{"modules": {text}}}', MODULES_FILE, MAX_CONFIG_DEPTH)  # it is a list
    modules = whole["modules"]
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise FileError(f"{MODULES_FILE} is not a list of modules: {AGAIN}")
    prompt = read_prompt(folder)
    pooling = Pooling(max_tokens=read_limit(folder), lower=read_lower(folder), prompt=prompt)
    for module in modules:
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            modes = read_modes(folder, module.get("path"), config, prompt)
            pooling = replace(pooling, modes=modes)
        elif kind == "Normalize":
            pooling = replace(pooling, normalize=True)
        elif kind != "Transformer":
            raise FileError(
                f"{MODULES_FILE} asks for a module {show(kind)}: known are Transformer, Pooling "
                "and Normalize; without the file, embeddings are means over tokens"
            )
    return pooling


def read_limit(folder: Path) -> int | None:
    """Where a str is cut, in whichever file this generation of folders says it."""
    own = Fields(read_small_json(folder, TEXT_FILE), TEXT_FILE)
    if own.values.get("max_seq_length") is not None:
        return own.integer("max_seq_length", None, 1, MAX_CONTEXT)
    most = read_small_json(folder, SETTINGS_FILE).get("model_max_length")  # 1e30: no limit
    return most if type(most) is int and 1 <= most <= MAX_CONTEXT else None


def read_lower(folder: Path) -> bool:
    return Fields(read_small_json(folder, TEXT_FILE), TEXT_FILE).flag("do_lower_case", False)


def read_prompt(folder: Path) -> str:
    """The default prompt, where the folder names one."""
    fields = Fields(read_small_json(folder, PROMPT_FILE), PROMPT_FILE)
    name = fields.values.get("default_prompt_name")
    if name is None:
        return ""
    prompt = fields.section("prompts").values.get(str(name))
    if not isinstance(prompt, str):
        raise fields.fail("default_prompt_name", f"is {show(name)}, which is none of its prompts")
    return prompt


def read_modes(folder: Path, path: Any, config: Config, prompt: str) -> tuple[str, ...]:
    """The modes of a Pooling module's config.json."""
    if not isinstance(path, str) or not MODULE_FOLDER.fullmatch(path):
        raise FileError(
            f"{MODULES_FILE} names the folder {show(path)}: give the name of a folder inside the "
            "model's, such as 1_Pooling"
        )
    fields = Fields(read_small_json(folder / path, CONFIG_FILE), f"{path}/{CONFIG_FILE}")
    for name in ("word_embedding_dimension", "embedding_dimension"):
        width = fields.integer(name, config.hidden, 1, MAX_HIDDEN)
        if width != config.hidden:
            raise fields.fail(name, f"is {width}, but the model is {config.hidden} wide")
    if prompt and not fields.flag("include_prompt", True):
        raise fields.fail("include_prompt", "is false: prompts are always pooled here")
    named = fields.values.get("pooling_mode")
    if named is not None:
        names = named if isinstance(named, list) and named else [named]
        ones = [Fields({"pooling_mode": name}, fields.source) for name in names]
        return tuple(one.word("pooling_mode", None, KNOWN_MODES) for one in ones)
    flags = {key: fields.flag(key, False) for key in fields.values if key.startswith("pooling_")}
    unknown = [key for key, on in flags.items() if on and key not in MODES]
    if unknown:
        raise fields.fail(unknown[0], f"is true: known are {', '.join(MODES)}")
    return tuple(mode for key, mode in MODES.items() if flags.get(key)) or ("mean",)


def embed(
    model: Model,
    texts: Any,
    batch_size: int,
    attention: Spec,
    per_layer: Mapping[int, Spec] | None,
) -> F32:
    """`Model.embed`."""
    if model.config.causal:
        raise ArgumentError(
            f"embed needs an encoder, and {model.config.family} reads from left to right: call "
            "model.hidden(tokens) for its states"
        )
    try:
        size = operator.index(batch_size)
    except TypeError:
        raise DtypeError(f"batch_size is {show(batch_size)}: give an integer") from None
    if size < 1:
        raise ArgumentError(f"batch_size is {size}: give a number from 1 on")
    rows, many = read_texts(model, texts)
    model._layer_specs(attention, per_layer)  # a wrong one is known before anything is computed
    vectors = np.empty((len(rows), model.config.hidden * len(model.pooling.modes)), np.float32)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # the most memory comes first
    for begin in range(0, len(order), size):
        part = order[begin : begin + size]
        states = model.hidden([rows[i].tolist() for i in part], attention, per_layer)
        for i, state in zip(part, states, strict=True):
            vectors[i] = model.pooling(state[: len(rows[i])])
    return vectors if many else vectors[0]


def read_texts(model: Model, texts: Any) -> tuple[list[Ids], bool]:
    """Checked ids of every text, and whether a list of them came."""
    if isinstance(texts, Mapping):
        raise DtypeError("texts is a mapping: give its ids, as in texts['input_ids']")
    if isinstance(texts, bytes) or not hasattr(texts, "__len__"):
        raise DtypeError(f"texts is a {type(texts).__name__}: give a str, token ids, or a list")
    if isinstance(texts, str):
        return [encode(model, texts)], False
    items = list(texts)
    if any(isinstance(item, str) for item in items):
        if not all(isinstance(item, str) for item in items):
            raise DtypeError("texts mixes strings and ids: give one kind")
        return [encode(model, text) for text in items], True
    if items and not any(hasattr(item, "__len__") for item in items):
        return [check_tokens(model.config, texts)], False
    return [check_tokens(model.config, one_axis(item)) for item in items], True


def one_axis(row: Any) -> Any:
    if np.ndim(row) != 1:
        raise ArgumentError(f"texts holds {show(row)}: give lists of token ids, one a text")
    return row


def encode(model: Model, text: str) -> Ids:
    """A text's ids with what the tokenizer puts around it, cut to what the model reads."""
    if model.tokenizer is None:
        raise ArgumentError(
            "texts is a str, but this model has no tokenizer: give token ids, or load it with "
            "tokenizer="
        )
    most = min(model.pooling.max_tokens or model.config.context, model.config.context)
    plain = model.pooling.prompt + text
    plain = plain.lower() if model.pooling.lower else plain
    ids = model.tokenizer.encode(plain, special=True, limit=most)
    if not ids:
        raise ArgumentError("texts holds an empty text: this tokenizer puts nothing around it")
    return check_tokens(model.config, ids)
