"""Specs made of specs: union, intersection, one a head, one a layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, ClassVar, Literal

from sparseattn import _core
from sparseattn.errors import ArgumentError
from sparseattn.variants.base import (
    Piece,
    Problem,
    Variant,
    normal,
    parse,
    register,
)
from sparseattn.variants.dense import Dense

if TYPE_CHECKING:
    from sparseattn.variants.base import Array, Params

DENSE = Dense()


class Composition(Variant):
    """A spec whose ``children`` are specs."""

    __slots__ = ()

    @property
    def children(self) -> tuple[Variant, ...]:
        raise NotImplementedError

    @property
    def reads_keys(self) -> bool:  # type: ignore[override]  # a constant of other variants
        return any(child.reads_keys for child in self.children)

    @property
    def arrays(self) -> tuple[str, ...]:  # type: ignore[override]  # a constant of other variants
        return tuple(dict.fromkeys(name for child in self.children for name in child.arrays))

    def keep(self) -> tuple[int, int] | None:
        """Whatever some child keeps, of an intersection as well: each child chooses on its own."""
        kept = [child.keep() for child in self.children]
        if any(one is None for one in kept):
            return None
        return max(one[0] for one in kept if one), max(one[1] for one in kept if one)


class _Joined(Composition):
    """Union and Intersection: at least two parts, nested ones of the same kind opened."""

    __slots__ = ()

    parts: tuple[Variant, ...]

    def __post_init__(self) -> None:
        name = type(self).__name__
        given = (self.parts,) if isinstance(self.parts, str | Variant) else self.parts
        flat: list[Variant] = []
        for part in map(parse, given):
            flat += part.parts if isinstance(part, _Joined) and part.kind == self.kind else [part]
        for part in flat:
            if isinstance(part, PerHead | PerLayer):
                raise ArgumentError(
                    f"{name} joins specs of one layer and head, got {part}: "
                    f"put the {name.lower()} inside of {type(part).__name__}"
                )
            if getattr(part, "placement", "pre") == "post":
                raise ArgumentError(
                    f"{name} cannot hold {part}: weights of the full row belong to one spec alone; "
                    "use placement='pre'"
                )
        if len(flat) < 2:
            raise ArgumentError(f"{name} needs at least two specs, got {len(flat)}")
        object.__setattr__(self, "parts", tuple(flat))

    @property
    def children(self) -> tuple[Variant, ...]:
        return self.parts

    def for_head(self, head: int) -> Variant:
        return replace(self, parts=tuple(part.for_head(head) for part in self.parts))  # type: ignore[type-var]

    def combine(
        self,
        op: Literal["union", "intersection"],
        q: Array,
        k: Array,
        problem: Problem,
        params: Params | None,
    ) -> tuple[Piece, ...]:
        pieces = [part.build(q, k, problem, params)[0] for part in self.parts]
        core = reduce(lambda a, b: _core.plan_combine(a, b, op), (piece.core for piece in pieces))
        through = any(piece.straight_through for piece in pieces)
        return (Piece(core, 0, q.shape[1], straight_through=through),)


@register
@dataclass(frozen=True, slots=True)
class Union(_Joined):
    """``a + b``: the keys that any of the specs keeps.

    >>> import sparseattn as sa
    >>> str(sa.Window(64) + sa.TopK(16))
    'window:64+topk:16'
    """

    kind: ClassVar[str] = "union"
    examples: ClassVar[tuple[str, ...]] = ("window:16+topk:8", "topk:8+random:8+window:4:sinks=2")

    parts: tuple[Variant, ...]

    if TYPE_CHECKING:  # what __post_init__ accepts

        def __init__(self, parts: Iterable[Variant | str]) -> None: ...

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))

    def build(
        self, q: Array, k: Array, problem: Problem, params: Params | None
    ) -> tuple[Piece, ...]:
        return self.combine("union", q, k, problem, params)


@register
@dataclass(frozen=True, slots=True)
class Intersection(_Joined):
    """``a & b``: the keys that all of the specs keep, each choosing on its own.

    >>> import sparseattn as sa
    >>> str(sa.parse("(window:64 + random:8) & topk:16"))
    '(window:64+random:8)&topk:16'
    """

    kind: ClassVar[str] = "intersection"
    examples: ClassVar[tuple[str, ...]] = ("window:32&topk:24", "(window:16+random:8)&topk:24")

    parts: tuple[Variant, ...]

    if TYPE_CHECKING:  # what __post_init__ accepts

        def __init__(self, parts: Iterable[Variant | str]) -> None: ...

    def __str__(self) -> str:
        return "&".join(f"({p})" if isinstance(p, Union) else str(p) for p in self.parts)

    def build(
        self, q: Array, k: Array, problem: Problem, params: Params | None
    ) -> tuple[Piece, ...]:
        return self.combine("intersection", q, k, problem, params)


@register
@dataclass(frozen=True, slots=True)
class PerHead(Composition):
    """One spec a query head: ``perhead(4*window:64|2*dense)`` for six heads.

    Parameters
    ----------
    specs : list of specs
        As many as there are query heads, in their order.

    Raises
    ------
    ArgumentError
        If there is not one spec a query head.

    >>> import sparseattn as sa
    >>> str(sa.PerHead(["window:64", "window:64", "dense"]))
    'perhead(2*window:64|dense)'
    """

    kind: ClassVar[str] = "perhead"
    examples: ClassVar[tuple[str, ...]] = (
        "perhead(4*window:64|2*dense)",
        "perhead(topk:8|3*window:16+random:4|2*topk:8:placement=post)",
    )

    specs: tuple[Variant, ...]

    if TYPE_CHECKING:  # what __post_init__ accepts

        def __init__(self, specs: Iterable[Variant | str]) -> None: ...

    def __post_init__(self) -> None:
        given = (self.specs,) if isinstance(self.specs, str | Variant) else self.specs
        specs = tuple(map(parse, given))
        for spec in specs:
            if isinstance(spec, PerHead | PerLayer):
                raise ArgumentError(f"PerHead holds one plain spec a head, got {spec}")
        if not specs:
            raise ArgumentError("PerHead needs one spec a query head, got an empty list")
        object.__setattr__(self, "specs", specs)

    @classmethod
    def from_body(cls, items: list[str]) -> PerHead:
        specs: list[Variant] = []
        for item in items:
            count, times, text = item.partition("*")
            if not times:
                specs.append(parse(item))
                continue
            if not count.strip().isdecimal() or not 1 <= int(count) <= 4096:
                raise ArgumentError(
                    f"perhead: {item.strip()!r:.80} must begin with a number from 1 to 4096"
                )
            specs += [parse(text)] * int(count)
        return cls(tuple(specs))

    def __str__(self) -> str:
        runs = [(spec, len(list(run))) for spec, run in itertools.groupby(self.specs)]
        return f"perhead({'|'.join(f'{n}*{spec}' if n > 1 else str(spec) for spec, n in runs)})"

    @property
    def children(self) -> tuple[Variant, ...]:
        return tuple(dict.fromkeys(self.specs))

    def build(
        self, q: Array, k: Array, problem: Problem, params: Params | None
    ) -> tuple[Piece, ...]:
        heads, kv_heads = q.shape[1], k.shape[1]
        if len(self.specs) != heads:
            raise ArgumentError(
                f"PerHead has {len(self.specs)} specs and q has {heads} heads: give one spec a head"
            )
        if kv_heads == 0 or heads % kv_heads:
            raise ArgumentError(f"the {kv_heads} heads of k must divide the {heads} heads of q")
        group = heads // kv_heads
        pieces = []
        for begin, end in self.ranges(group):
            span = slice(begin // group, (end - 1) // group + 1)
            (piece,) = (
                self.specs[begin]
                .for_head(begin)
                .build(
                    q[:, begin:end],
                    k[:, span],
                    problem.of_heads(begin, end),
                    of_heads(params, begin, end, heads),
                )
            )
            pieces.append(piece._replace(begin=begin, end=end))
        return tuple(pieces)

    def ranges(self, group: int) -> Iterator[tuple[int, int]]:
        """Runs of heads with one spec, each of whole kv groups or within one."""
        begin = 0
        for _, run in itertools.groupby(self.specs):
            end = begin + len(list(run))
            first, last = -(-begin // group) * group, end // group * group
            cuts = [begin, first, last, end] if first < last else [begin, first, end]
            cuts = sorted(cut for cut in set(cuts) if begin <= cut <= end)
            yield from itertools.pairwise(cuts)
            begin = end


def of_heads(params: Params | None, begin: int, end: int, heads: int) -> Params | None:
    """Arrays that have one entry a query head, cut to heads [begin, end)."""
    if params is None or heads == 1:
        return params
    cut = {}
    for name, value in params.items():
        per_head = getattr(value, "ndim", 0) > 0 and value.shape[0] == heads
        cut[name] = value[begin:end] if per_head else value
    return cut


@register
@dataclass(frozen=True, slots=True)
class PerLayer(Composition):
    """One spec a layer of a model: ``perlayer(0=dense|3=topk:16|other=window:64)``.

    Parameters
    ----------
    layers : mapping of layer number to spec
    other : spec
        For layers that the mapping does not name; dense unless said.

    Models ask for ``.layer(i)``; ``attention`` knows no layers and refuses it.

    >>> import sparseattn as sa
    >>> str(sa.PerLayer({0: "dense", 3: "topk:16"}, other="window:64").layer(3))
    'topk:16'
    """

    kind: ClassVar[str] = "perlayer"
    examples: ClassVar[tuple[str, ...]] = ("perlayer(0=dense|3=topk:16|other=window:64)",)

    layers: tuple[tuple[int, Variant], ...]
    other: Variant = DENSE

    if TYPE_CHECKING:  # what __post_init__ accepts

        def __init__(
            self,
            layers: Mapping[int, Variant | str] | Iterable[tuple[int, Variant | str]],
            other: Variant | str = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        given = self.layers.items() if isinstance(self.layers, Mapping) else self.layers
        layers: dict[int, Variant] = {}
        for index, spec in given:
            if isinstance(index, bool) or not hasattr(index, "__index__") or index < 0:
                raise ArgumentError(f"PerLayer's keys are layer numbers from 0 on, got {index!r}")
            layers[int(index)] = parse(spec)
        object.__setattr__(self, "layers", tuple(sorted(layers.items(), key=lambda item: item[0])))
        object.__setattr__(self, "other", parse(self.other))
        if any(isinstance(child, PerLayer) for child in self.children):
            raise ArgumentError("PerLayer cannot hold another PerLayer: give one spec a layer")

    @classmethod
    def from_body(cls, items: list[str]) -> PerLayer:
        layers: dict[int, Variant] = {}
        other: Variant = DENSE
        for item in items:
            key, equals, text = item.partition("=")
            if equals and key.strip().isdecimal():
                layers[int(key)] = parse(text)
            elif equals and normal(key) == "other":
                other = parse(text)
            else:
                raise ArgumentError(
                    f"perlayer: {item.strip()!r:.80} must be a layer number or 'other', '=', a spec"
                )
        return cls(tuple(layers.items()), other)

    def __str__(self) -> str:
        items = [f"{index}={spec}" for index, spec in self.layers]
        items += [f"other={self.other}"] if self.other != DENSE or not items else []
        return f"perlayer({'|'.join(items)})"

    @property
    def children(self) -> tuple[Variant, ...]:
        return tuple(dict.fromkeys([*(spec for _, spec in self.layers), self.other]))

    def layer(self, index: int) -> Variant:
        return dict(self.layers).get(index, self.other)

    def build(
        self, q: Array, k: Array, problem: Problem, params: Params | None
    ) -> tuple[Piece, ...]:
        raise ArgumentError(
            f"{self} says one spec a layer, and attention() is one layer: pass spec.layer(i)"
        )
