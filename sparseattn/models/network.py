"""The forward pass that all families share, over the parameters of one model.

x = embed[tokens] (+ token types) (+ positions), normed where the family does
for every layer:  x += out(attention(q, k, v));  x += down(act(up))  or  down(act(gate) * up)
logits = head(norm(x))

A norm stands before each of the two halves of a layer, or ("post") after each sum. The second half
reads the first one's sum, or ("parallel") what the first one read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseattn import _core
from sparseattn.half import is_half, widen
from sparseattn.models.common import F32, Config, Family, HeadNames, Weight
from sparseattn.positions import Rope

Turn = tuple[F32, F32, NDArray[np.int32]]  # cos, sin (angles, pairs); the row's angle (rows,)
Attend = Callable[[int, F32, F32, F32, F32], None]  # layer; q, k, v, out: all (rows, heads, dim)


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
class DeepHead:
    """An encoder's logits: out(norm(activation(dense(x))))."""

    dense: Linear
    activation: str
    norm: Norm | None
    out: Linear

    @property
    def n_out(self) -> int:
        return self.out.n_out

    def __call__(self, x: F32, out: F32) -> F32:
        h = self.dense(x, np.empty((len(x), self.dense.n_out), np.float32))
        if self.activation == "tanh":
            np.tanh(h, h)
        else:
            _core.activate(self.activation, h, None, h)
        if self.norm is not None:
            self.norm(h, h)
        return self.out(h, out)


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's parameters."""

    norm1: Norm
    qkv: tuple[Linear, ...]
    qk_norms: tuple[Norm, ...]  # of queries and of keys, or none
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
                qk_norms=tuple(norm(at + name) for name in family.qk_norms or ()),
                out=linear(at + family.out),
                norm2=norm(at + family.norm2),
                gate=None if family.gate is None else linear(at + family.gate),
                up=linear(at + family.up),
                down=linear(at + family.down),
            )

        self.config = config
        self.embed = values[f"{family.embed}.weight"]
        self.positions = None if family.positions is None else values[f"{family.positions}.weight"]
        self.token_types = (
            None if family.token_types is None else values[f"{family.token_types}.weight"]
        )
        self.embed_norm = None if family.embed_norm is None else norm(family.embed_norm)
        self.post, self.by_head = family.order == "post", family.qkv_by_head
        self.layers = [layer(family.layer.format(i)) for i in range(config.n_layers)]
        self.norm = None if family.norm is None else norm(family.norm)

        def head(names: HeadNames | None) -> Linear | DeepHead:
            out, bias = (family.head, None) if names is None else (names.out, values[names.bias])
            tied = config.tied and out == family.head
            last = Linear(self.embed if tied else values[f"{out}.weight"], bias, transposed=True)
            if names is None:
                return last
            normed = None if names.norm is None else norm(names.norm)
            return DeepHead(
                linear(names.dense), names.activation or config.activation, normed, last
            )

        self.head = None if config.head == "none" else head(family.heads.get(config.head))
        self._tables: tuple[F32, F32] | None = None

    def rope_tables(self, rope: Rope, length: int) -> tuple[F32, F32]:
        """cos and sin (positions, pairs) for at least `length` positions."""
        if self._tables is None or len(self._tables[0]) < length:
            length = min(2 * length, self.config.context)  # decoding asks for one more at a time
            self._tables = rope.tables(np.arange(length))
        return self._tables

    def turn(self, pos: NDArray[np.int32], lengths: NDArray[np.int32] | None = None) -> Turn | None:
        """By what rows at positions (R,) turn, of texts of `lengths` (R,) so far; None: all of one
        length, with its last position among `pos`."""
        rope = self.config.rope
        if rope is None or len(pos) == 0:
            return None
        longest = int(pos.max()) + 1
        if not rope.follows_length(longest):
            return (*self.rope_tables(rope, longest), pos)
        if lengths is None:
            return (*rope.tables(np.arange(longest), longest), pos)
        half = len(rope.frequencies())
        cos, sin = (np.empty((len(pos), half), np.float32) for _ in range(2))
        for length in np.unique(lengths):
            rows = lengths == length
            cos[rows], sin[rows] = rope.tables(pos[rows], int(length))
        return cos, sin, np.arange(len(pos), dtype=np.int32)

    def forward(
        self,
        tokens: NDArray[np.int64],
        pos: NDArray[np.int32],
        attend: Attend,
        scratch: Scratch | None = None,
        types: NDArray[np.int64] | None = None,
        lengths: NDArray[np.int32] | None = None,
    ) -> F32:
        """Rows (R, hidden) after the final norm, of checked tokens (R,) at positions (R,).

        Which rows are whose, `attend` knows. The result lies in `scratch`: the next call that is
        given the same one writes over it. `types` (R,): of segments; None is 0. `lengths` (R,): of
        the rows' texts so far; None: all of one length, with its last position among `pos`.
        """
        rows, scratch = len(tokens), scratch or Scratch()
        turn = self.turn(pos, lengths)
        x = rows_of(self.embed, tokens)
        if self.token_types is not None:
            kinds = np.zeros(rows, np.int64) if types is None else types
            _core.add(x, rows_of(self.token_types, kinds), x)
        if self.positions is not None:
            _core.add(x, rows_of(self.positions, pos), x)
        if self.embed_norm is not None:
            self.embed_norm(x, x)
        h = scratch.get("h", rows, self.config.hidden)
        side = scratch.get("side", rows, self.config.hidden) if self.config.parallel else h
        for i, layer in enumerate(self.layers):
            q, k, v = self._project(layer, x if self.post else layer.norm1(x, h), turn, scratch)
            y = scratch.get("y", rows, self.config.n_heads * self.config.head_dim)
            attend(i, q, k, v, self._split(y))
            first = layer.out(y, side)
            if self.config.parallel:
                before = layer.norm2(x, h)
                _core.add(x, first, x)
            else:
                _core.add(x, first, x)
                before = layer.norm1(x, x) if self.post else layer.norm2(x, h)
            _core.add(x, self._mlp(layer, before, h, scratch), x)
            if self.post:
                layer.norm2(x, x)
        return x if self.norm is None else self.norm(x, h)

    def _split(self, a: F32) -> F32:
        """(rows, heads * dim) as (rows, heads, dim): splitting an axis never copies."""
        return a.reshape(len(a), -1, self.config.head_dim)

    def _project(
        self, layer: Layer, h: F32, turn: Turn | None, scratch: Scratch
    ) -> tuple[F32, F32, F32]:
        """q, k and v as (rows, heads, dim), normed and turned."""
        q, k, v = self._read_qkv(layer, h, scratch)
        if len(layer.qkv) == 1 and (turn is not None or layer.qk_norms):  # which want them apart
            q, k = (self._copy(a, name, scratch) for a, name in ((q, "q"), (k, "k")))
        for a, norm in zip((q, k), layer.qk_norms, strict=False):
            flat = a.reshape(-1, self.config.head_dim)
            norm(flat, flat)
        if turn is not None:
            for a in (q, k):
                _core.rope(a, *turn)
        return q, k, v

    def _copy(self, a: F32, name: str, scratch: Scratch) -> F32:
        copy = self._split(scratch.get(name, len(a), a.shape[1] * a.shape[2]))
        np.copyto(copy, a)
        return copy

    def _read_qkv(self, layer: Layer, h: F32, scratch: Scratch) -> Sequence[F32]:
        """The projections of h as (rows, heads, dim)."""
        if len(layer.qkv) == 3:
            return [
                self._split(linear(h, scratch.get(f"qkv{i}", len(h), linear.n_out)))
                for i, linear in enumerate(layer.qkv)
            ]
        (fused,) = layer.qkv
        both = self._split(fused(h, scratch.get("qkv", len(h), fused.n_out)))
        if self.by_head:
            return [both[:, i::3] for i in range(3)]
        c = self.config
        ends = (0, c.n_heads, c.n_heads + c.n_kv_heads, both.shape[1])
        return [both[:, begin:end] for begin, end in itertools.pairwise(ends)]

    def _mlp(self, layer: Layer, h: F32, out: F32, scratch: Scratch) -> F32:
        """down(act(up(h))), or down(act(gate(h)) * up(h)); `out` may be `h`."""
        up = layer.up(h, scratch.get("up", len(h), layer.up.n_out))
        if layer.gate is None:
            _core.activate(self.config.activation, up, None, up)
        else:
            gate = layer.gate(h, scratch.get("gate", len(h), layer.up.n_out))
            _core.activate(self.config.activation, gate, up, up)
        return layer.down(up, out)


def by_head(a: F32, batch: int) -> F32:
    """(batch * length, heads, dim) seen as (batch, heads, length, dim)."""
    return a.reshape(batch, -1, *a.shape[1:]).transpose(0, 2, 1, 3)
