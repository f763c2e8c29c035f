"""`Model`: a checkpoint folder as a function from token ids to logits."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparseattn.attention import Plan, run
from sparseattn.errors import ArgumentError, DtypeError, FileError
from sparseattn.inputs import make_target, read_operands, read_problem
from sparseattn.models.checkpoint import (
    Checkpoint,
    find_folder,
    find_weights,
    nearest,
    read_config,
    read_small_json,
    show,
)
from sparseattn.models.common import F32, Config, Family, Weight, draw, match
from sparseattn.models.fields import Fields
from sparseattn.models.generate import KEYWORDS, RENAMED, generate, read_request, stream
from sparseattn.models.gpt2 import GPT2
from sparseattn.models.llama import LLAMA
from sparseattn.models.network import Network, by_head, rows_of
from sparseattn.models.tokenizer import Tokenizer, load_tokenizer
from sparseattn.plan import refuse_keywords
from sparseattn.variants.base import Variant, parse

FAMILIES = {family.name: family for family in (GPT2, LLAMA)}

Spec = Variant | str | None
OnAttend = Callable[[int, Plan], None]

EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "tiny"
HASHED = 1 << 20  # parameters widened at a time for the fingerprint


class Model:
    """A causal language model whose attention is chosen at each call.

    Attributes
    ----------
    config : Config
        Shape and switches, the same words for every family.
    tokenizer : Tokenizer or None
        None where the folder has none.
    fingerprint : str
        SHA-256 over `config` and the parameters as float32.
    folder : Path or None
        Where it was loaded from.
    attention : spec, str or None
        What attends where a call names nothing; None is dense. `sa.use` sets it for a while.

    Notes
    -----
    Everything is computed in float32. Files are mapped read-only, and float16 and bfloat16 matrices
    stay so: a product widens the block that it is at, to the same logits as from float32 weights.
    """

    def __init__(
        self,
        family: Family,
        config: Config,
        values: Mapping[str, Weight],
        tokenizer: Tokenizer | None = None,
        folder: Path | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.folder = folder
        self.attention: Spec = None
        self._values = values
        self._network = Network(family, config, values)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str] | None = None,
        *,
        random_weights: int | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        mmap: bool = True,
        dtype: Literal["float32"] | None = None,
    ) -> Model:
        """Load a folder with config.json, model.safetensors and, where it has one, a tokenizer.

        Parameters
        ----------
        folder : path or str, optional
            A local folder; with the ``hub`` extra also a Hugging Face id. None is the small model
            that the package carries.
        random_weights : int, optional
            A seed: read config.json only and draw the parameters as the family initialises them.
        tokenizer : path, optional
            A folder or tokenizer.json to use instead of the folder's own.
        mmap : bool
            False copies the weights instead of mapping the file.
        dtype : "float32", optional
            Widen float16 and bfloat16 weights at once, to twice their memory; None keeps them.

        Raises
        ------
        ArgumentError
            If an argument is none of these.
        FileError
            If a file is missing, damaged, larger than its limit, a pickle, or in contradiction
            to config.json; nothing is allocated before all shapes agree.

        Examples
        --------
        >>> import sparseattn as sa
        >>> model = sa.Model.from_pretrained()
        >>> model([[1, 2, 3]], attention="window:64").shape
        (1, 3, 2048)
        """
        if dtype not in (None, "float32"):
            raise ArgumentError(
                f"dtype is {show(dtype)}: give 'float32', or None for the weights as stored"
            )
        path = EMBEDDED if folder is None else find_folder(folder)
        family, config = read_family(path)
        if random_weights is None:
            file = Checkpoint(find_weights(path), mmap=mmap)
            config, names = match(family, config, file)
            wide = dtype is not None
            values = {short: file.read(name, wide=wide) for short, name in names.items()}
        else:
            values = draw(family, config, check_seed(random_weights))
        found = load_tokenizer(path if tokenizer is None else tokenizer)
        if found is None and tokenizer is not None:
            raise FileError(
                f"tokenizer {show(str(tokenizer))} has neither tokenizer.json nor vocab.json "
                "with merges.txt: give another"
            )
        return cls(family, config, values, found, path)

    def __repr__(self) -> str:
        c = self.config
        heads = f"{c.n_heads} heads" + (f" over {c.n_kv_heads}" if c.n_kv_heads < c.n_heads else "")
        return (
            f"Model({c.family}, {self.n_parameters:,} parameters, {c.n_layers} layers of "
            f"{c.hidden}, {heads} of {c.head_dim}, {c.vocab_size} tokens, context {c.context})"
        )

    @property
    def n_parameters(self) -> int:
        """Number of parameters, a tied matrix counted once."""
        return sum(math.prod(value.shape) for value in self._values.values())

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name in sorted(self._values):
            digest.update(name.encode() + b"\0")
            value = np.ascontiguousarray(self._values[name]).reshape(-1)
            for start in range(0, value.size, HASHED):
                digest.update(rows_of(value, slice(start, start + HASHED)).data)
        return digest.hexdigest()

    def __call__(
        self,
        tokens: ArrayLike,
        attention: Spec = None,
        per_layer: Mapping[int, Spec] | None = None,
    ) -> F32:
        """Logits of every position.

        Parameters
        ----------
        tokens : array_like of int, shape (length,) or (batch, length)
        attention : spec or str, optional
            What attends, in every layer; None is the model's `attention`, dense unless it was
            changed. `PerLayer` says it layer by layer.
        per_layer : mapping of int to spec, optional
            Layers that differ from `attention`.

        Returns
        -------
        ndarray of float32, shape (length, vocabulary) or (batch, length, vocabulary)

        Raises
        ------
        DtypeError, ArgumentError
            If tokens are not integers, out of the vocabulary or longer than the context, or a
            layer or spec does not exist.

        Examples
        --------
        >>> import sparseattn as sa
        >>> model = sa.Model.from_pretrained()
        >>> model([1, 2, 3], attention="topk:16", per_layer={0: "dense"}).shape
        (3, 2048)
        """
        hidden = self.hidden(tokens, attention, per_layer)
        return self.head(hidden)

    def hidden(
        self,
        tokens: ArrayLike,
        attention: Spec = None,
        per_layer: Mapping[int, Spec] | None = None,
        on_attend: OnAttend | None = None,
    ) -> F32:
        """States after the final norm: what `head` turns into logits.

        Parameters
        ----------
        tokens, attention, per_layer
            As for calling the model.
        on_attend : callable, optional
            Called with (layer, plan) after each layer's attention.

        Returns
        -------
        ndarray of float32, shape (length, hidden) or (batch, length, hidden)
        """
        ids = self._check_tokens(tokens)
        specs = self._layer_specs(attention, per_layer)
        scales = self.config.scales

        batch, length = np.atleast_2d(ids).shape

        def attend(layer: int, *rows: F32) -> None:
            q, k, v, out = (by_head(a, batch) for a in rows)
            ops = read_operands(q, k, v)
            problem = read_problem(ops, causal=True, scale=scales[layer])
            _, plan, _ = run(ops, specs[layer], None, problem, make_target(out, ops), False)
            if on_attend is not None:
                on_attend(layer, plan)

        pos = np.tile(np.arange(length, dtype=np.int32), batch)
        rows = self._network.forward(ids.reshape(-1), pos, attend)
        return rows.reshape(*ids.shape, self.config.hidden)

    def head(self, rows: F32) -> F32:
        """Logits (..., vocabulary) of states (..., hidden) from `hidden`.

        Callers that want a loss only pass a few rows at a time: logits of a whole text are large.
        """
        rows = np.asarray(rows)
        if rows.dtype != np.float32:
            raise DtypeError(f"rows is {rows.dtype}: give the float32 states of hidden()")
        if rows.ndim < 1 or rows.shape[-1] != self.config.hidden:
            raise ArgumentError(
                f"rows has shape {rows.shape}: its last axis must be {self.config.hidden} wide"
            )
        flat = np.ascontiguousarray(rows.reshape(-1, self.config.hidden))
        head = self._network.head
        logits = head(flat, np.empty((len(flat), head.n_out), np.float32))
        return logits.reshape(*rows.shape[:-1], head.n_out)

    def generate(
        self,
        prompt: Any,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = 0,
        stop: str | Sequence[str] | None = None,
        *,
        attention: Spec = None,
        per_layer: Mapping[int, Spec] | None = None,
        **wrong: Any,
    ) -> Any:
        """Continue a prompt, or several together.

        Parameters
        ----------
        prompt : str, token ids, or a list of either
            A str is encoded with what the tokenizer puts around a text; an empty one becomes the
            configuration's beginning.
        max_new_tokens : int
            Tokens at most; ``eos_token_id`` and the context's length end a generation before.
        temperature : float, optional
            Divides the logits before the softmax that tokens are drawn from; 0 and None take the
            likeliest token.
        top_k, top_p : int and float, optional
            Keep the k largest logits, then the likeliest tokens that have this share of what is
            left, as in transformers.
        seed : int, optional
            The same seed gives the same text, whatever other prompts run beside; copies of one
            prompt in a list differ. None draws a seed.
        stop : str or list of str, optional
            Ends the text before the first of these.
        attention, per_layer
            As for calling the model.

        Returns
        -------
        str, ndarray of int64, or a list
            What follows the prompt: text for text, ids for ids (without the end token), a list for
            a list.

        Raises
        ------
        ArgumentError, DtypeError
            Before anything is computed: see the message.

        Examples
        --------
        >>> import sparseattn as sa
        >>> model = sa.Model.from_pretrained()
        >>> text = model.generate("The list of", max_new_tokens=8, temperature=0.8)
        """
        refuse_keywords("generate", wrong, KEYWORDS, RENAMED)
        return generate(
            read_request(
                *(self, prompt),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stop=stop,
                attention=attention,
                per_layer=per_layer,
            )
        )

    def stream(
        self,
        prompt: Any,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = 0,
        stop: str | Sequence[str] | None = None,
        *,
        attention: Spec = None,
        per_layer: Mapping[int, Spec] | None = None,
        **wrong: Any,
    ) -> Iterator[Any]:
        """Continue one prompt, piece by piece: what :meth:`generate` returns, as it comes.

        Takes what `generate` takes but a list of prompts. Pieces are whole characters, and nothing
        of a stop string is among them. Arguments are checked at once.

        Examples
        --------
        >>> import sparseattn as sa
        >>> model = sa.Model.from_pretrained()
        >>> "".join(model.stream("The list of", 8)) == model.generate("The list of", 8)
        True
        """
        refuse_keywords("stream", wrong, KEYWORDS, RENAMED)
        return stream(
            read_request(
                *(self, prompt),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stop=stop,
                attention=attention,
                per_layer=per_layer,
            )
        )

    def _check_tokens(self, tokens: ArrayLike) -> NDArray[np.int64]:
        """Token ids as int64, known to be in range."""
        if isinstance(tokens, str):
            raise DtypeError("tokens is a str: give model.tokenizer.encode(text)'s ids")
        try:
            ids = np.asarray(tokens)
        except ValueError:
            raise ArgumentError("tokens has rows of different lengths: pad or split them") from None
        if ids.ndim not in (1, 2) or ids.size == 0:
            raise ArgumentError(
                f"tokens has shape {ids.shape}: give (length,) or (batch, length), not empty"
            )
        if not np.issubdtype(ids.dtype, np.integer):
            raise DtypeError(f"tokens is {ids.dtype}: give integers, such as tokenizer.encode's")
        for bad in (ids.min(), ids.max()):
            if not 0 <= bad < self.config.vocab_size:
                raise ArgumentError(
                    f"tokens holds {bad}: this model's ids are 0 to {self.config.vocab_size - 1}"
                )
        if ids.shape[-1] > self.config.context:
            raise ArgumentError(
                f"tokens has length {ids.shape[-1]}, but this model has {self.config.context} "
                "positions: give shorter blocks"
            )
        return ids.astype(np.int64)

    def _layer_specs(self, attention: Spec, per_layer: Mapping[int, Spec] | None) -> list[Variant]:
        """The spec of each layer."""
        n = self.config.n_layers
        every = as_spec(self.attention if attention is None else attention)
        specs = [every.layer(i) for i in range(n)]
        if not isinstance(per_layer, Mapping | None):
            raise ArgumentError(
                f"per_layer is {show(per_layer)}: give specs by layer, as in {{0: 'dense'}}"
            )
        for i, spec in (per_layer or {}).items():
            if type(i) is not int or not 0 <= i < n:
                raise ArgumentError(f"per_layer names layer {i!r}: layers are 0 to {n - 1}")
            specs[i] = as_spec(spec).layer(i)
        return specs


def as_spec(spec: Spec) -> Variant:
    return parse("dense" if spec is None else spec)


def check_seed(seed: object) -> int:
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ArgumentError(f"random_weights is {show(seed)}: give a seed from 0 to 2^63 - 1")
    return seed


def read_family(folder: Path) -> tuple[Family, Config]:
    """The family that config.json names, and its configuration with the special tokens."""
    fields = Fields(read_config(folder))
    name = fields.get("model_type", None)
    if not isinstance(name, str) or name not in FAMILIES:
        raise fields.fail(
            "model_type", f"is {show(name)}: known are {nearest(str(name)[:80], list(FAMILIES))}"
        )
    if fields.values.get("quantization_config") is not None:
        raise fields.fail("quantization_config", "is set: save the weights as F32, F16 or BF16")
    family = FAMILIES[name]
    config = family.read_config(fields)
    more = Fields(read_small_json(folder, "generation_config.json"))  # it has the last word
    vocab = config.vocab_size
    bos = more.tokens("bos_token_id", vocab) or fields.tokens("bos_token_id", vocab)
    eos = more.tokens("eos_token_id", vocab) or fields.tokens("eos_token_id", vocab)
    return family, replace(config, bos_token_id=bos[0] if bos else None, eos_token_ids=eos)
