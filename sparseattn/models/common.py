"""What model families share: the configuration and the table of parameters.

A family is a `Family`: a table of tensor names and switches over the blocks of ``network.py``, and
one function that reads its config.json. Adding one is one file.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparseattn.errors import FileError
from sparseattn.models.checkpoint import AGAIN, CONFIG_FILE, TensorSource, show
from sparseattn.models.fields import Fields
from sparseattn.positions import Rope

F32 = NDArray[np.float32]
Weight = NDArray[Any]  # float32, float16, or the bits of bfloat16 as uint16

MAX_RANDOM_PARAMETERS = 2**31  # 8 GiB of float32: what a config.json alone may ask for


@dataclass(frozen=True, slots=True)
class Config:
    """A model's shape and switches, in one vocabulary for every family."""

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    inner: int  # width between the two halves of an MLP
    vocab_size: int
    context: int  # most positions
    eps: float
    activation: str  # a kind of _core.activate
    qkv_bias: bool
    out_bias: bool  # of attention's last projection
    mlp_bias: bool
    tied: bool  # the head is the embedding
    rope: Rope | None  # None: no rotation
    scales: tuple[float, ...]  # what multiplies q.k, per layer
    init_std: float
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    causal: bool = True
    position_offset: int | None = None  # unpadded tokens count from here; None: places, from 0
    token_types: int = 0  # kinds of segments; 0: none
    head: str = "lm"  # from states to logits: "lm", "none", or a name in the family's `heads`
    labels: tuple[str, ...] = ()  # of a classifier
    parallel: bool = False  # both halves of a layer read the same state
    windows: tuple[int | None, ...] = ()  # keys a row sees, itself among them, per layer

    def window(self, layer: int) -> int | None:
        """How many keys a row of the layer sees, itself among them; None: all before it."""
        return self.windows[layer] if self.windows else None


@dataclass(frozen=True, slots=True)
class HeadNames:
    """out(norm(activation(dense(state)))), without `prefix`."""

    dense: str
    activation: str | None  # None: the configuration's
    norm: str | None
    out: str  # equal to the family's `head`: may be tied to the embedding
    bias: str  # of `out`, the whole name
    first: bool  # reads the first token's state only


@dataclass(frozen=True, slots=True)
class Family:
    """Tensor names of a family, without `prefix`, and its switches. `layer` holds "{}"."""

    name: str  # config.json's model_type
    prefix: str
    embed: str
    positions: str | None  # learned positions
    layer: str
    norm1: str
    qkv: tuple[str, ...]  # one name: fused, q before k before v; or three
    out: str
    norm2: str
    gate: str | None
    up: str
    down: str
    norm: str | None  # after the last layer
    norm_kind: Literal["layer", "rms"]
    weights: Literal["in_out", "out_in"]  # the order of a projection's axes
    scaled_init: bool  # out and down start smaller, by sqrt(2 layers)
    ignored: tuple[str, ...]  # endings of tensors that hold no parameter
    read_config: Callable[[Fields], Config]
    head: str = "lm_head"
    order: Literal["pre", "post"] = "pre"  # norms before the two halves of a layer, or after
    token_types: str | None = None
    embed_norm: str | None = None
    heads: Mapping[str, HeadNames] = field(default_factory=dict)  # of encoders; in order of trial
    renamed: tuple[tuple[str, str], ...] = ()  # endings of old files, and what they are now
    unused: tuple[str, ...] = ()  # beginnings of tensors that nothing reads
    qkv_by_head: bool = False  # a fused projection's rows: q, k, v of a head, then of the next
    qk_norms: tuple[str, str] | None = None  # RMS norms of each head's queries and keys


@dataclass(frozen=True, slots=True)
class Parameter:
    """What a family's configuration says of one tensor."""

    shape: tuple[int, ...]
    std: float  # of the initial normal distribution; 0: constant
    mean: float = 0.0


def parameters(family: Family, config: Config) -> Iterator[tuple[str, Parameter]]:
    """Name (without prefix) and shape of every parameter, layer by layer."""
    std = config.init_std
    small = std / math.sqrt(2 * config.n_layers) if family.scaled_init else std
    q_width = config.n_heads * config.head_dim
    kv_width = config.n_kv_heads * config.head_dim

    def norm(name: str) -> Iterator[tuple[str, Parameter]]:
        yield f"{name}.weight", Parameter((config.hidden,), 0.0, 1.0)
        if family.norm_kind == "layer":
            yield f"{name}.bias", Parameter((config.hidden,), 0.0)

    def linear(
        name: str, n_in: int, n_out: int, bias: bool, std: float = std
    ) -> Iterator[tuple[str, Parameter]]:
        shape = (n_in, n_out) if family.weights == "in_out" else (n_out, n_in)
        yield f"{name}.weight", Parameter(shape, std)
        if bias:
            yield f"{name}.bias", Parameter((n_out,), 0.0)

    def layer(at: str) -> Iterator[tuple[str, Parameter]]:
        yield from norm(at + family.norm1)
        widths = (q_width, kv_width, kv_width)
        for name, width in zip(
            family.qkv, widths if len(family.qkv) == 3 else (sum(widths),), strict=True
        ):
            yield from linear(at + name, config.hidden, width, config.qkv_bias)
        for name in family.qk_norms or ():
            yield f"{at}{name}.weight", Parameter((config.head_dim,), 0.0, 1.0)
        yield from linear(at + family.out, q_width, config.hidden, config.out_bias, small)
        yield from norm(at + family.norm2)
        if family.gate is not None:
            yield from linear(at + family.gate, config.hidden, config.inner, config.mlp_bias)
        yield from linear(at + family.up, config.hidden, config.inner, config.mlp_bias)
        yield from linear(at + family.down, config.inner, config.hidden, config.mlp_bias, small)

    yield f"{family.embed}.weight", Parameter((config.vocab_size, config.hidden), std)
    if family.positions is not None:
        rows = config.context + (config.position_offset or 0)
        yield f"{family.positions}.weight", Parameter((rows, config.hidden), std)
    if family.token_types is not None:
        yield f"{family.token_types}.weight", Parameter((config.token_types, config.hidden), std)
    if family.embed_norm is not None:
        yield from norm(family.embed_norm)
    for i in range(config.n_layers):
        yield from layer(family.layer.format(i))
    if family.norm is not None:
        yield from norm(family.norm)
    out, n_out = family.head, config.vocab_size
    head = family.heads.get(config.head)
    if head is not None:
        out, n_out = head.out, len(config.labels) if head.first else n_out
        yield from linear(head.dense, config.hidden, config.hidden, True)
        if head.norm is not None:
            yield from norm(head.norm)
        yield head.bias, Parameter((n_out,), 0.0)
    if config.head != "none" and not (config.tied and out == family.head):
        yield f"{out}.weight", Parameter((n_out, config.hidden), std)


def match(family: Family, config: Config, file: TensorSource) -> tuple[Config, dict[str, str]]:
    """The file's tensor for every parameter, checked by name and shape before any is read.

    A head in the file is used even where the configuration ties it, as transformers does. A tied
    matrix may be stored under either of its two names.
    """
    found = short_names(family, file)
    config = find_head(family, config, found)
    embed, head = f"{family.embed}.weight", f"{family.head}.weight"
    if config.tied and head in found:
        if embed in found:
            config = replace(config, tied=False)
        else:
            found[embed] = found.pop(head)
    wanted = dict(parameters(family, config))
    body = dict(parameters(family, replace(config, head="none")))
    for short, parameter in wanted.items():
        if short not in found:
            name = family.prefix + short if short in body else short
            raise FileError(
                f"{file.name}: tensor {show(name)} of a {family.name} model is missing: {AGAIN}, "
                f"or correct {CONFIG_FILE}"
            )
        shape = file.tensors[found[short]].shape
        if shape != parameter.shape:
            raise FileError(
                f"{file.name}: tensor {show(found[short])} has shape {show(list(shape))} where "
                f"{CONFIG_FILE} makes it {show(list(parameter.shape))}: correct {CONFIG_FILE}"
            )
    for short, name in found.items():
        if short not in wanted:
            raise FileError(
                f"{file.name}: tensor {show(name)} has no place in a {family.name} model of this "
                f"{CONFIG_FILE}: correct its switches, or remove the tensor"
            )
    return config, found


def short_names(family: Family, file: TensorSource) -> dict[str, str]:
    """The file's names by their form without prefix, buffers left out."""
    found: dict[str, str] = {}
    for name in file.tensors:
        if name.endswith(family.ignored):
            continue
        short = name.removeprefix(family.prefix)
        for old, new in family.renamed:
            if short.endswith(old):
                short = short.removesuffix(old) + new
        if short in found:
            raise FileError(
                f"{file.name}: tensors {show(found[short])} and {show(name)} are the same "
                "parameter: keep one"
            )
        found[short] = name
    return found


def find_head(family: Family, config: Config, found: dict[str, str]) -> Config:
    """The configuration with the head that the file holds; what no head reads leaves `found`."""
    if not family.heads:
        return config
    kind = "none"
    for name, head in family.heads.items():
        if f"{head.norm or head.out}.weight" in found:
            kind = name
            twin = f"{head.out}.bias"  # transformers may know the bias under two names
            if twin != head.bias and twin in found:
                spare = found.pop(twin)
                if not (config.tied and head.bias in found):
                    found[head.bias] = spare
            break
    kept = f"{family.heads[kind].dense}." if kind != "none" else None
    for short in [name for name in found if name.startswith(family.unused)]:
        if kept is None or not short.startswith(kept):
            del found[short]
    return replace(config, head=kind, labels=config.labels if kind == "classifier" else ())


DRAW = 1 << 20  # entries drawn by one call


def draw(family: Family, config: Config, seed: int) -> dict[str, F32]:
    """Random parameters as the family initialises them, each addressed by seed and name."""
    wanted = dict(parameters(family, config))
    count = sum(math.prod(p.shape) for p in wanted.values())
    if count > MAX_RANDOM_PARAMETERS:
        raise FileError(
            f"{CONFIG_FILE} asks for {count} random parameters, more than the limit of "
            f"{MAX_RANDOM_PARAMETERS}: give a smaller one"
        )
    values: dict[str, F32] = {}
    for name, p in wanted.items():
        if p.std == 0:
            values[name] = np.full(p.shape, p.mean, np.float32)
            continue
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        drawn = np.empty(p.shape, np.float32)
        flat = drawn.reshape(-1)
        for start in range(0, flat.size, DRAW):  # short calls: Ctrl-C is heard between them
            part = flat[start : start + DRAW]
            random.standard_normal(part.shape, np.float32, part)
            part *= np.float32(p.std)
        values[name] = drawn
    return values
