"""The forward pass that all families share, over the parameters of one model.

x = embed[tokens] (+ positions)
for every layer:  x += out(attention(q, k, v));  x += down(act(up))  or  down(act(gate) * up)
logits = head(norm(x))
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseattn import _core
from sparseattn.half import is_half, widen
from sparseattn.models.common import F32, Config, Family, Weight

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
