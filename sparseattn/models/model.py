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
from numpy.typing import ArrayLike

from sparseattn.attention import Plan, run
from sparseattn.errors import ArgumentError, DtypeError, FileError, door
from sparseattn.inputs import make_target, read_operands, read_problem
from sparseattn.models.batch import read_batch
from sparseattn.models.bert import BERT, DISTILBERT, ROBERTA, XLM_ROBERTA
from sparseattn.models.checkpoint import (
    CONFIG_FILE,
    TensorSource,
    nearest,
    read_config,
    read_small_json,
    show,
)
from sparseattn.models.common import F32, Config, Family, Weight, draw, match
from sparseattn.models.embed import Pooling, embed, read_pooling
from sparseattn.models.fields import Fields
from sparseattn.models.generate import KEYWORDS, RENAMED, generate, read_request, stream
from sparseattn.models.gpt2 import GPT2
from sparseattn.models.hub import check_links, find_folder
from sparseattn.models.llama import LLAMA
from sparseattn.models.mistral import MISTRAL
from sparseattn.models.neox import NEOX
from sparseattn.models.network import DeepHead, Linear, Network, by_head, rows_of
from sparseattn.models.objects import ModelObject, is_model, tokenizer_of
from sparseattn.models.qwen import QWEN2, QWEN3
from sparseattn.models.shards import open_weights
from sparseattn.models.tokenizer import Tokenizer, load_tokenizer
from sparseattn.models.windows import band
from sparseattn.plan import refuse_keywords
from sparseattn.variants.base import Variant, parse

FAMILIES = {
    family.name: family
    for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, NEOX, BERT, ROBERTA, XLM_ROBERTA, DISTILBERT)
}

Spec = Variant | str | None
OnAttend = Callable[[int, Plan], None]

CALL_KEYWORDS = ("tokens", "attention", "per_layer", "key_mask", "token_types")
CALL_RENAMED = {  # what transformers calls them
    "attention_mask": "key_mask, of booleans: True for a token",
    "token_type_ids": "token_types",
    "input_ids": "tokens",
    "spec": "attention",
}

EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "tiny"
HASHED = 1 << 20  # parameters widened at a time for the fingerprint


class Model:
    """A language model or encoder whose attention is chosen at each call.

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
    pooling : Pooling
        How an encoder's `embed` makes one vector of a text's states: what the folder says.

    Notes
    -----
    Decoders: GPT-2, LLaMA with every scaling of its positions but longrope, Mistral, Qwen2, Qwen3,
    GPT-NeoX and Pythia. Encoders: BERT (MiniLM and other sentence encoders are such), RoBERTa,
    XLM-RoBERTa, DistilBERT, with a head for masked tokens or labels, or none. A model's own sliding
    window is what its layers see: a spec chooses among its keys, and dense is all of them.

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
        self.pooling = Pooling() if folder is None else read_pooling(folder, config)
        self._values = values
        self._network = Network(family, config, values)

    @classmethod
    def from_pretrained(
        cls,
        folder: Any = None,
        *,
        random_weights: int | None = None,
        tokenizer: Any = None,
        mmap: bool = True,
        dtype: Literal["float32"] | None = None,
        strict_symlinks: bool = False,
    ) -> Model:
        """Load a folder with config.json, safetensors (one file, or several with their index) and,
        where it has one, a tokenizer; or take over a transformers model.

        Parameters
        ----------
        folder : path, str or transformers.PreTrainedModel, optional
            A local folder; with the ``hub`` extra also a Hugging Face id, from the local cache
            where it is there. A model on the CPU, whose memory is used as it stands. None is the
            small model that the package carries.
        random_weights : int, optional
            A seed: read config.json only and draw the parameters as the family initialises them.
        tokenizer : path or transformers.PreTrainedTokenizerFast, optional
            A folder or tokenizer.json to use instead of the folder's own.
        mmap : bool
            False copies the weights instead of mapping the file, or sharing the model's memory.
        dtype : "float32", optional
            Widen float16 and bfloat16 weights at once, to twice their memory; None keeps them.
        strict_symlinks : bool
            Refuse links to files outside the folder, or outside its ``models--...`` folder in a hub
            cache, where every file is a link.

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
        source: TensorSource
        path: Path | None = None
        if is_model(folder):
            if random_weights is not None:
                raise ArgumentError("random_weights is given with a model: give its folder")
            source = ModelObject(folder, copy=not mmap)
            name = f"{source.name}.config"
            family, config = read_family(source.config, source.generation_config, name)
        else:
            path = EMBEDDED if folder is None else find_folder(folder)
            if strict_symlinks:
                check_links(path)
            generation = read_small_json(path, "generation_config.json")
            family, config = read_family(read_config(path), generation)
            if random_weights is None:
                source = open_weights(path, mmap=mmap)
        if random_weights is None:
            config, names = match(family, config, source)
            wide = dtype is not None
            values = {short: source.read(name, wide=wide) for short, name in names.items()}
        else:
            values = draw(family, config, check_seed(random_weights))
        return cls(family, config, values, find_tokenizer(path, tokenizer), path)

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

    @door
    def __call__(
        self,
        tokens: ArrayLike,
        attention: Spec = None,
        per_layer: Mapping[int, Spec] | None = None,
        *,
        key_mask: ArrayLike | None = None,
        token_types: ArrayLike | None = None,
        **wrong: Any,
    ) -> F32:
        """Logits of every position, or of a classifier's labels.

        Parameters
        ----------
        tokens : array_like of int, shape (length,) or (batch, length)
            An encoder's rows may differ in length: they are padded on the right.
        attention : spec or str, optional
            What attends, in every layer; None is the model's `attention`, dense unless it was
            changed. `PerLayer` says it layer by layer.
        per_layer : mapping of int to spec, optional
            Layers that differ from `attention`.
        key_mask : array_like of bool, shape of tokens, optional
            True where there is a token: what is padding changes nothing else. As in transformers,
            places count for positions (in RoBERTa, tokens), and a classifier reads the first
            place, so padding belongs on the right.
        token_types : array_like of int, shape of tokens, optional
            Kinds of segments, where the family knows them; None is 0.

        Returns
        -------
        ndarray of float32, shape (length, vocabulary) or (batch, length, vocabulary)
            Of a classifier (labels,) or (batch, labels); ``config.labels`` names them.

        Raises
        ------
        DtypeError, ArgumentError
            If tokens are not integers, out of the vocabulary or longer than the context, or a
            layer or spec does not exist; if the checkpoint has no head, only states.

        Examples
        --------
        >>> import sparseattn as sa
        >>> model = sa.Model.from_pretrained()
        >>> model([1, 2, 3], attention="topk:16", per_layer={0: "dense"}).shape
        (3, 2048)
        """
        refuse_keywords("model", wrong, CALL_KEYWORDS, CALL_RENAMED)
        self._require_head()
        hidden = self.hidden(
            tokens, attention, per_layer, key_mask=key_mask, token_types=token_types
        )
        return self.head(hidden[..., 0, :] if self.config.head == "classifier" else hidden)

    def hidden(
        self,
        tokens: ArrayLike,
        attention: Spec = None,
        per_layer: Mapping[int, Spec] | None = None,
        on_attend: OnAttend | None = None,
        *,
        key_mask: ArrayLike | None = None,
        token_types: ArrayLike | None = None,
    ) -> F32:
        """States after the final norm: what `head` turns into logits.

        Parameters
        ----------
        tokens, attention, per_layer, key_mask, token_types
            As for calling the model.
        on_attend : callable, optional
            Called with (layer, plan) after each layer's attention.

        Returns
        -------
        ndarray of float32, shape (length, hidden) or (batch, length, hidden)
        """
        read = read_batch(self.config, tokens, key_mask, token_types)
        specs = self._layer_specs(attention, per_layer)
        scales, causal = self.config.scales, self.config.causal

        batch, length = read.ids.shape

        def attend(layer: int, *rows: F32) -> None:
            q, k, v, out = (by_head(a, batch) for a in rows)
            ops = read_operands(q, k, v)
            shown = band(self.config.window(layer), length, length)
            problem = read_problem(
                ops, causal=causal, scale=scales[layer], mask=shown, key_mask=read.mask
            )
            _, plan, _ = run(ops, specs[layer], None, problem, make_target(out, ops), False)
            if on_attend is not None:
                on_attend(layer, plan)

        pos = read.positions(self.config.position_offset)
        types = None if read.types is None else read.types.reshape(-1)
        rows = self._network.forward(read.ids.reshape(-1), pos, attend, types=types)
        return rows.reshape(*read.shape, self.config.hidden)

    def head(self, rows: F32) -> F32:
        """Logits (..., vocabulary) of states (..., hidden) from `hidden`.

        Of a classifier, (..., labels) of the states at each text's first place. Callers that want
        a loss only pass a few rows at a time: logits of a whole text are large.
        """
        head = self._require_head()
        rows = np.asarray(rows)
        if rows.dtype != np.float32:
            raise DtypeError(f"rows is {rows.dtype}: give the float32 states of hidden()")
        if rows.ndim < 1 or rows.shape[-1] != self.config.hidden:
            raise ArgumentError(
                f"rows has shape {rows.shape}: its last axis must be {self.config.hidden} wide"
            )
        flat = np.ascontiguousarray(rows.reshape(-1, self.config.hidden))
        logits = head(flat, np.empty((len(flat), head.n_out), np.float32))
        return logits.reshape(*rows.shape[:-1], head.n_out)

    def embed(
        self,
        texts: Any,
        batch_size: int = 32,
        attention: Spec = None,
        per_layer: Mapping[int, Spec] | None = None,
    ) -> F32:
        """Sentence embeddings of an encoder, as sentence-transformers pools them.

        Parameters
        ----------
        texts : str, token ids, or a list of either
            Of any lengths. A str is encoded with what the tokenizer puts around a text, and cut
            where the folder's sentence_bert_config.json, or the context, ends.
        batch_size : int
            Texts at a time, those of similar length together.
        attention, per_layer
            As for calling the model.

        Returns
        -------
        ndarray of float32, shape (hidden,) for one text or (texts, hidden) for a list
            The mean over tokens, or what the folder's modules.json says; if it joins several
            poolings, as many times as wide.

        Raises
        ------
        ArgumentError, DtypeError
            If the model is no encoder, has no tokenizer for a str, or a text is empty.

        Examples
        --------
        >>> import pathlib, tempfile, sparseattn as sa
        >>> config, folder = '{"model_type": "bert", "hidden_size": 48}', tempfile.mkdtemp()
        >>> _ = pathlib.Path(folder, "config.json").write_text(config)
        >>> sa.Model.from_pretrained(folder, random_weights=0).embed([[7, 8], [9]]).shape
        (2, 48)
        """
        return embed(self, texts, batch_size, attention, per_layer)

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
        self._require_causal("generate")
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
        self._require_causal("stream")
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

    def _require_head(self) -> Linear | DeepHead:
        """What makes logits, where the checkpoint has it."""
        head = self._network.head
        if head is None:
            raise ArgumentError(
                f"this {self.config.family} checkpoint has no head that gives logits: call "
                "model.hidden(tokens) for states, or model.embed(texts) for embeddings"
            )
        return head

    def _require_causal(self, verb: str) -> None:
        if not self.config.causal:
            raise ArgumentError(
                f"{verb} needs a model that reads from left to right, and {self.config.family} is "
                "an encoder: call model(tokens) for logits, or model.embed(texts)"
            )

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


def find_tokenizer(folder: Path | None, given: Any) -> Tokenizer | None:
    """The tokenizer that was asked for, or the folder's own."""
    if given is None:
        return None if folder is None else load_tokenizer(folder)
    if not isinstance(given, str | os.PathLike):
        return tokenizer_of(given)
    found = load_tokenizer(given)
    if found is None:
        raise FileError(
            f"tokenizer {show(str(given))} has neither tokenizer.json nor vocab.json with "
            "merges.txt nor vocab.txt: give another"
        )
    return found


def read_family(
    values: Mapping[str, Any], generation: Mapping[str, Any], source: str = CONFIG_FILE
) -> tuple[Family, Config]:
    """The family that a config.json names, and its configuration with the special tokens."""
    fields = Fields(values, source)
    name = fields.get("model_type", None)
    if not isinstance(name, str) or name not in FAMILIES:
        raise fields.fail(
            "model_type", f"is {show(name)}: known are {nearest(str(name)[:80], list(FAMILIES))}"
        )
    if fields.values.get("quantization_config") is not None:
        raise fields.fail("quantization_config", "is set: save the weights as F32, F16 or BF16")
    family = FAMILIES[name]
    config = family.read_config(fields)
    more = Fields(generation)  # it has the last word
    vocab = config.vocab_size
    bos = more.tokens("bos_token_id", vocab) or fields.tokens("bos_token_id", vocab)
    eos = more.tokens("eos_token_id", vocab) or fields.tokens("eos_token_id", vocab)
    return family, replace(config, bos_token_id=bos[0] if bos else None, eos_token_ids=eos)
