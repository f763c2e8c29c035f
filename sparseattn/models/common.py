"""What model families share: the configuration, the parameter table and the forward pass.

A family is a `Family`: a table of tensor names and switches over the blocks of this file, and one
function that reads its config.json. Adding one is one file.

    x = embed[tokens] (+ positions)
    for every layer:  x += out(attention(q, k, v));  x += down(act(up))  or  down(act(gate) * up)
    logits = head(norm(x))
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparseattn import _core
from sparseattn.errors import FileError
from sparseattn.half import is_half, widen
from sparseattn.models.checkpoint import AGAIN, CONFIG_FILE, Checkpoint, nearest, show

F32 = NDArray[np.float32]
Weight = NDArray[Any]  # float32, float16, or the bits of bfloat16 as uint16
Attend = Callable[[int, F32, F32, F32, F32], None]  # layer; q, k, v, out: all (rows, heads, dim)

MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HIDDEN = 131_072  # also the width between the two halves of an MLP, times 8
MAX_VOCAB = 4 * 2**20
MAX_CONTEXT = 16 * 2**20
MAX_RANDOM_PARAMETERS = 2**31  # 8 GiB of float32: what a config.json alone may ask for

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Fields:
    """config.json's entries, read with their types and ranges checked.

    JSON's null reads as absent. A default of None makes an entry required.
    """

    def __init__(self, values: Mapping[str, Any], source: str = CONFIG_FILE) -> None:
        self.values = values
        self.source = source

    def fail(self, name: str, problem: str) -> FileError:
        return FileError(f"{self.source}: {name} {problem}")

    def get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise self.fail(name, f"is missing: add it, as the family's {self.source} has it")
        return default

    def integer(self, name: str, default: int | None, low: int, high: int) -> int:
        value = self.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.fail(name, f"is {show(value)}: give an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float | None, low: float, high: float) -> float:
        """A number in (low, high]."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not low < value <= high:
            raise self.fail(
                name, f"is {show(value)}: give a number above {low:g} and at most {high:g}"
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            raise self.fail(name, f"is {show(value)}: give true or false")
        return value

    def word(self, name: str, default: str | None, known: Mapping[str, str]) -> str:
        """The meaning in `known` of a word."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in known:
            raise self.fail(
                name, f"is {show(value)}: known are {nearest(str(value)[:80], list(known))}"
            )
        return known[value]

    def section(self, name: str) -> Fields:
        """A nested object; an absent one reads as empty."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.fail(name, f"is {show(value)}: give an object or null")
        return Fields(value, f"{self.source}: {name}")

    def tokens(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them; those outside the vocabulary are left out."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [value]
        return tuple(i for i in ids if type(i) is int and 0 <= i < vocab_size)


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
    attention_bias: bool
    mlp_bias: bool
    tied: bool  # the head is the embedding
    rope_theta: float | None  # None: no rotation
    scales: tuple[float, ...]  # what multiplies q.k, per layer
    init_std: float
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


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
    norm: str
    norm_kind: Literal["layer", "rms"]
    weights: Literal["in_out", "out_in"]  # the order of a projection's axes
    scaled_init: bool  # out and down start smaller, by sqrt(2 layers)
    ignored: tuple[str, ...]  # endings of tensors that hold no parameter
    read_config: Callable[[Fields], Config]
    head: str = "lm_head"


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

    yield f"{family.embed}.weight", Parameter((config.vocab_size, config.hidden), std)
    if family.positions is not None:
        yield f"{family.positions}.weight", Parameter((config.context, config.hidden), std)
    widths = (q_width, kv_width, kv_width)
    for i in range(config.n_layers):
        at = family.layer.format(i)
        yield from norm(at + family.norm1)
        for name, width in zip(
            family.qkv, widths if len(family.qkv) == 3 else (sum(widths),), strict=True
        ):
            yield from linear(at + name, config.hidden, width, config.attention_bias)
        yield from linear(at + family.out, q_width, config.hidden, config.attention_bias, small)
        yield from norm(at + family.norm2)
        if family.gate is not None:
            yield from linear(at + family.gate, config.hidden, config.inner, config.mlp_bias)
        yield from linear(at + family.up, config.hidden, config.inner, config.mlp_bias)
        yield from linear(at + family.down, config.inner, config.hidden, config.mlp_bias, small)
    yield from norm(family.norm)
    if not config.tied:
        yield f"{family.head}.weight", Parameter((config.vocab_size, config.hidden), std)


def match(family: Family, config: Config, file: Checkpoint) -> tuple[Config, dict[str, str]]:
    """The file's tensor for every parameter, checked by name and shape before any is read.

    A head in the file is used even where the configuration ties it, as transformers does. A tied
    matrix may be stored under either of its two names.
    """
    found = short_names(family, file)
    embed, head = f"{family.embed}.weight", f"{family.head}.weight"
    if config.tied and head in found:
        if embed in found:
            config = replace(config, tied=False)
        else:
            found[embed] = found.pop(head)
    wanted = dict(parameters(family, config))
    for short, parameter in wanted.items():
        if short not in found:
            name = short if short == head else family.prefix + short
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


def short_names(family: Family, file: Checkpoint) -> dict[str, str]:
    """The file's names by their form without prefix, buffers left out."""
    found: dict[str, str] = {}
    for name in file.tensors:
        if name.endswith(family.ignored):
            continue
        short = name.removeprefix(family.prefix)
        if short in found:
            raise FileError(
                f"{file.name}: tensors {show(found[short])} and {show(name)} are the same "
                "parameter: keep one"
            )
        found[short] = name
    return found


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


class Scratch:
    """Arrays by name, made on first use: every layer of a call runs in the same memory."""

    def __init__(self) -> None:
        self._arrays: dict[str, F32] = {}

    def get(self, name: str, rows: int, width: int) -> F32:
        array = self._arrays.get(name)
        if array is None or array.shape != (rows, width):
            array = self._arrays[name] = np.empty((rows, width), np.float32)
        return array


def rows_of(table: Weight, index: NDArray[np.integer[Any]] | slice) -> F32:
    """Rows of a table in float32."""
    rows = table[index]
    return widen(rows) if is_half(rows) else rows


@dataclass(frozen=True, slots=True)
class Linear:
    """x @ weight (+ bias), or x @ weight.T where `transposed`."""

    weight: Weight
    bias: F32 | None
    transposed: bool

    @property
    def n_out(self) -> int:
        rows, columns = self.weight.shape
        return int(rows if self.transposed else columns)

    def __call__(self, x: F32, out: F32) -> F32:
        _core.linear(x, self.weight, self.bias, out, self.transposed)
        return out


@dataclass(frozen=True, slots=True)
class Norm:
    """Layer norm where there is a bias, else RMS norm."""

    weight: F32
    bias: F32 | None
    eps: float

    def __call__(self, x: F32, out: F32) -> F32:
        if self.bias is None:
            _core.rms_norm(x, self.weight, self.eps, out)
        else:
            _core.layer_norm(x, self.weight, self.bias, self.eps, out)
        return out


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's parameters."""

    norm1: Norm
    qkv: tuple[Linear, ...]
    out: Linear
    norm2: Norm
    gate: Linear | None
    up: Linear
    down: Linear


class Network:
    """A family's parameters in the places of the shared forward pass."""

    def __init__(self, family: Family, config: Config, values: Mapping[str, Weight]) -> None:
        def linear(name: str) -> Linear:
            return Linear(
                values[f"{name}.weight"], values.get(f"{name}.bias"), family.weights == "out_in"
            )

        def norm(name: str) -> Norm:
            return Norm(values[f"{name}.weight"], values.get(f"{name}.bias"), config.eps)

        def layer(at: str) -> Layer:
            return Layer(
                norm1=norm(at + family.norm1),
                qkv=tuple(linear(at + name) for name in family.qkv),
                out=linear(at + family.out),
                norm2=norm(at + family.norm2),
                gate=None if family.gate is None else linear(at + family.gate),
                up=linear(at + family.up),
                down=linear(at + family.down),
            )

        self.config = config
        self.embed = values[f"{family.embed}.weight"]
        self.positions = None if family.positions is None else values[f"{family.positions}.weight"]
        self.layers = [layer(family.layer.format(i)) for i in range(config.n_layers)]
        self.norm = norm(family.norm)
        head = self.embed if config.tied else values[f"{family.head}.weight"]
        self.head = Linear(head, None, transposed=True)
        self._tables: tuple[F32, F32] | None = None

    def rope_tables(self, length: int) -> tuple[F32, F32] | None:
        """cos and sin (positions, head_dim / 2) for `length` positions; angles in float64."""
        theta = self.config.rope_theta
        if theta is None:
            return None
        if self._tables is None or len(self._tables[0]) < length:
            length = min(2 * length, self.config.context)  # decoding asks for one more at a time
            half = self.config.head_dim // 2
            angle = np.outer(np.arange(length), theta ** (-np.arange(half) / half))
            self._tables = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        return self._tables

    def forward(
        self,
        tokens: NDArray[np.int64],
        pos: NDArray[np.int32],
        attend: Attend,
        scratch: Scratch | None = None,
    ) -> F32:
        """Rows (R, hidden) after the final norm, of checked tokens (R,) at positions (R,).

        Which rows are whose, `attend` knows. The result lies in `scratch`: the next call that is
        given the same one writes over it.
        """
        rows, scratch = len(tokens), scratch or Scratch()
        tables = self.rope_tables(int(pos.max(initial=0)) + 1)
        x = rows_of(self.embed, tokens)
        if self.positions is not None:
            _core.add(x, rows_of(self.positions, pos), x)
        h = scratch.get("h", rows, self.config.hidden)
        for i, layer in enumerate(self.layers):
            layer.norm1(x, h)
            q, k, v = self._project(layer, h, scratch)
            if tables is not None:
                for a in (q, k):
                    _core.rope(a, *tables, pos)
            y = scratch.get("y", rows, self.config.n_heads * self.config.head_dim)
            attend(i, q, k, v, self._split(y))
            _core.add(x, layer.out(y, h), x)
            self._mlp(layer, layer.norm2(x, h), scratch)
            _core.add(x, h, x)
        return self.norm(x, h)

    def _split(self, a: F32) -> F32:
        """(rows, heads * dim) as (rows, heads, dim): splitting an axis never copies."""
        return a.reshape(len(a), -1, self.config.head_dim)

    def _project(self, layer: Layer, h: F32, scratch: Scratch) -> list[F32]:
        """q, k and v as (rows, heads, dim)."""
        if len(layer.qkv) == 3:
            return [
                self._split(linear(h, scratch.get(f"qkv{i}", len(h), linear.n_out)))
                for i, linear in enumerate(layer.qkv)
            ]
        (fused,) = layer.qkv
        both = self._split(fused(h, scratch.get("qkv", len(h), fused.n_out)))
        c = self.config
        ends = (0, c.n_heads, c.n_heads + c.n_kv_heads, both.shape[1])
        return [both[:, begin:end] for begin, end in itertools.pairwise(ends)]

    def _mlp(self, layer: Layer, h: F32, scratch: Scratch) -> None:
        """h becomes down(act(up(h))), or down(act(gate(h)) * up(h))."""
        up = layer.up(h, scratch.get("up", len(h), layer.up.n_out))
        if layer.gate is None:
            _core.activate(self.config.activation, up, None, up)
        else:
            gate = layer.gate(h, scratch.get("gate", len(h), layer.up.n_out))
            _core.activate(self.config.activation, gate, up, up)
        layer.down(up, h)


def by_head(a: F32, batch: int) -> F32:
    """(batch * length, heads, dim) seen as (batch, heads, length, dim)."""
    return a.reshape(batch, -1, *a.shape[1:]).transpose(0, 2, 1, 3)
