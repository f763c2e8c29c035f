"""What a variant is to Python: a spec, its string form, and the plan it builds.

The string form (``parse`` reads it, ``str`` gives it back)::

    dense        topk:16        topk:16:placement=post        window:window_size=63/0:sinks=4
    a+b          keys of either        a&b          keys of both; & binds closer, ( ) group
    perhead(4*window:64|2*dense)       one spec a query head
    perlayer(0=dense|3=topk:16|other=window:64)

Case, ``-`` and ``_`` of names and words do not matter. There is no comma in it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np

from sparseattn import _core
from sparseattn.errors import ArgumentError, door

if TYPE_CHECKING:  # importing numpy.typing takes longer than all of this package
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]
    Params: TypeAlias = Mapping[str, Any]

MAX_DEPTH = 16  # of brackets in a spec's text, so that hostile text meets a sentence
PAST = "past"  # the number among params that says how many rows came before the first of this call
SEEDS = 1 << 63  # one more than the largest seed of dropout
HEAD_STEP = 0x9E3779B97F4A7C15 // 2  # large: heads of neighbouring seeds do not meet


class Problem(NamedTuple):
    """What an attention call is besides q, k, v and the spec; ``_core`` takes it as it stands."""

    causal: int = 0  # 0 no, 1 bottom-right, 2 top-left
    scale: float = 1.0
    softcap: float = 0.0
    mask: Array | None = None  # bool, broadcast to (batch, heads, n_q, n_k)
    bias: Array | None = None  # in the type of q, broadcast likewise
    key_mask: Array | None = None  # bool (batch, n_k)
    dropout_p: float = 0.0
    seed: int = 0  # of the dropout
    sink: Array | None = None  # (heads,) in the type of q: score of one more key, of value 0
    cu_seqlens: tuple[Array, Array] | None = None  # offsets of packed queries and keys, (n + 1,)

    def of_heads(self, begin: int, end: int) -> Problem:
        """The same call for query heads [begin, end)."""
        mask = None if self.mask is None else self.mask[:, begin:end]
        bias = None if self.bias is None else self.bias[:, begin:end]
        sink = None if self.sink is None else self.sink[begin:end]
        seed = (self.seed + begin * HEAD_STEP) % SEEDS  # the core counts these heads from 0
        return self._replace(mask=mask, bias=bias, sink=sink, seed=seed)

    def of_block(self, rows: slice, keys: slice) -> Problem:
        """The same call for some query rows and some keys."""
        mask = None if self.mask is None else self.mask[:, :, rows, keys]
        bias = None if self.bias is None else self.bias[:, :, rows, keys]
        key_mask = None if self.key_mask is None else self.key_mask[:, keys]
        return self._replace(mask=mask, bias=bias, key_mask=key_mask)


class Piece(NamedTuple):
    """The plan of query heads [begin, end), made over those heads alone."""

    core: _core.Plan
    begin: int
    end: int
    full_row: bool = False  # weights are normalised over all visible keys (selection after softmax)
    straight_through: bool = False  # gradients of scores are those of all visible keys

    def kv_range(self, group: int) -> tuple[int, int]:
        """The kv heads that these query heads read, ``group`` query heads to each."""
        return self.begin // group, max(self.begin // group, (self.end - 1) // group + 1)


class Ops(Protocol):
    """The operators a variant may compose; arrays are (batch, heads, length, dim)."""

    def attend(
        self, q: Array, k: Array, v: Array, spec: Variant, params: Params | None
    ) -> tuple[Array, Array]:
        """out and log-sum-exp of softmax attention over the plan of ``spec``."""
        ...


class Variant:
    """Base of all specs: frozen, hashable dataclasses of scalars and short tuples.

    Ranges of fields stand in the core's table of the same name and are checked here, when a spec
    is made.
    """

    __slots__ = ()

    kind: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[str, ...]] = ()  # string forms; tests run every one of them
    arrays: ClassVar[tuple[str, ...]] = ()  # names of the arrays that it takes through params
    reads_keys: ClassVar[bool] = False  # True: keys are chosen by reading q and k

    def __post_init__(self) -> None:
        hints = field_hints(type(self))
        for name, hint in hints.items():
            value = coerce(hint, getattr(self, name), f"{type(self).__name__}.{name}")
            object.__setattr__(self, name, value)
        check_ranges(self, hints)

    def __str__(self) -> str:
        items = [self.kind]
        for at, f in enumerate(spec_fields(type(self))):
            value = getattr(self, f.name)
            if f.default is dataclasses.MISSING or value != f.default:
                text = write_value(value)
                items.append(text if at == 0 else f"{f.name}={text}")
        return ":".join(items)

    def __add__(self, other: Variant | str) -> Variant:
        return compose("union", self, other)

    def __and__(self, other: Variant | str) -> Variant:
        return compose("intersection", self, other)

    def layer(self, index: int) -> Variant:
        """The spec of layer ``index`` of a model; only ``PerLayer`` differs by layer."""
        return self

    def for_head(self, head: int) -> Variant:
        """The spec for a call over heads from ``head`` on; only what is drawn by head differs."""
        return self

    def keep(self) -> tuple[int, int] | None:
        """What a causal cache keeps for rows to come: the first keys, and those before a row.

        ``(pinned, left)``: no row sees a key that is neither among the first ``pinned`` nor among
        the ``left`` before its own. None: rows may see any key, so all are kept.
        """
        return None

    def build(
        self, q: Array, k: Array, problem: Problem, params: Params | None
    ) -> tuple[Piece, ...]:
        """The plan for q (batch, heads, n_q, dim) and k (batch, kv_heads, n_k, dim)."""
        mine = {name: np.asarray(params[name]) for name in self.arrays} if params else None
        core = _core.plan_build(self.kind, self, mine, q, k, problem)
        return (Piece(core, 0, q.shape[1]),)

    def apply(
        self, ops: Ops, q: Array, k: Array, v: Array, params: Params | None
    ) -> tuple[Array, Array]:
        """The compose rule: out and log-sum-exp."""
        return ops.attend(q, k, v, self, params)


# ---- registry -----------------------------------------------------------------------------------

_by_kind: dict[str, type[Variant]] = {}
_by_name: dict[str, type[Variant]] = {}

V = TypeVar("V", bound=type[Variant])


def register(cls: V) -> V:
    """Class decorator: makes a variant known to ``parse`` and ``specs``."""
    parse_text.cache_clear()
    cls.__init__ = door(cls.__init__)  # type: ignore[method-assign]
    _by_kind[cls.kind] = cls
    for name in (cls.kind, cls.__name__, *cls.aliases):
        _by_name[normal(name)] = cls
    return cls


def variants() -> dict[str, type[Variant]]:
    """All variants by kind: dense, the others by name, then what joins specs."""
    kinds = sorted(_by_kind, key=lambda kind: (joins(_by_kind[kind]), kind != "dense", kind))
    return {kind: _by_kind[kind] for kind in kinds}


def joins(cls: type[Variant]) -> bool:
    """A spec of specs, which the core has no record of."""
    return "children" in dir(cls)


class SpecInfo(NamedTuple):
    """One line about a variant."""

    name: str
    example: str
    summary: str

    def __str__(self) -> str:
        return f"{self.name:<14}{self.example:<38}{self.summary}"


def specs() -> list[SpecInfo]:
    """All variants, one line each: name, an example of the string form, what it does.

    >>> import sparseattn as sa
    >>> [s.name for s in sa.specs()][:2]
    ['dense', 'blockmask']
    """
    return [
        SpecInfo(kind, cls.examples[0], (cls.__doc__ or "").strip().splitlines()[0])
        for kind, cls in variants().items()
    ]


def compose(kind: str, *parts: Variant | str) -> Variant:
    cls: Callable[[Iterable[Variant]], Variant] = _by_kind[kind]
    return cls([parse(part) for part in parts])


# ---- fields -------------------------------------------------------------------------------------


_hints: dict[type[Variant], dict[str, Any]] = {}


def field_hints(cls: type[Variant]) -> dict[str, Any]:
    """Types of the fields, resolved once."""
    if cls not in _hints:
        hints = typing.get_type_hints(cls)
        _hints[cls] = {f.name: hints[f.name] for f in spec_fields(cls)}
    return _hints[cls]


def spec_fields(cls: type[Variant]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)  # type: ignore[arg-type]  # every registered spec is a dataclass


@functools.cache
def field_table(kind: str) -> tuple[tuple[Any, ...], ...]:
    """The core's fields of a variant: (name, type, min, max, words)."""
    return tuple(_core.describe(kind)) if kind in _core.variants() else ()


def check_ranges(spec: Variant, hints: Mapping[str, Any]) -> None:
    for name, _, low, high, _ in field_table(spec.kind):
        value = getattr(spec, name) if name in hints else None
        if value is None or low is None:
            continue
        for item in value if isinstance(value, tuple) else (value,):
            if not low <= item <= high:
                where = f"{type(spec).__name__}.{name}"
                raise ArgumentError(f"{where} must be in [{low}, {high}], got {item}")


def coerce(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the plain Python value that the field's type hint asks for."""
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        found = [word for word in choices if normal(word) == normal(str(value))]
        if not found:
            raise ArgumentError(f"{where} must be one of {', '.join(choices)}, got {value!r}")
        return found[0]
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else coerce(choices[0], value, where)
    if typing.get_origin(hint) is tuple:
        items = tuple(value) if isinstance(value, Iterable) else (value,)
        if choices[-1] is not Ellipsis and len(items) != len(choices):
            raise ArgumentError(f"{where} must be {len(choices)} values, got {value!r}")
        return tuple(coerce(choices[0], item, where) for item in items)
    if hint is int and not isinstance(value, bool | np.bool_):
        try:
            return operator.index(value)
        except TypeError:
            pass
    if hint is int:
        raise ArgumentError(f"{where} must be an integer, got {value!r}")
    return value


def write_value(value: Any) -> str:
    return "/".join(map(write_value, value)) if isinstance(value, tuple) else str(value)


def read_value(hint: Any, text: str, where: str) -> Any:
    choices = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return read_value(choices[0], text, where)
    if typing.get_origin(hint) is tuple:
        return tuple(read_value(choices[0], item, where) for item in text.split("/") if item)
    if hint is int:
        try:
            return int(text)
        except ValueError:
            raise ArgumentError(f"{where} must be an integer, got {text!r}") from None
    return text


# ---- text ---------------------------------------------------------------------------------------


def normal(name: str) -> str:
    return name.strip().lower().replace("-", "").replace("_", "")


@door
def parse(text: str | Variant) -> Variant:
    """The spec that ``text`` says; a spec is given back as it is.

    Parameters
    ----------
    text : str
        ``name``, ``name:value`` or ``name:key=value:key=value``, joined by ``+`` and ``&``.

    Raises
    ------
    ArgumentError
        If the name is unknown (the nearest ones are offered) or a value does not fit.

    >>> import sparseattn as sa
    >>> sa.parse("Top-K:16:placement=post")
    TopK(k=16, placement='post', gradient='selected')
    """
    if isinstance(text, Variant):
        return text
    if not isinstance(text, str):
        raise ArgumentError(
            f"a spec is an object such as sa.TopK(16) or text such as 'topk:16', got {text!r:.80}"
        )
    return parse_text(text)


@functools.lru_cache(maxsize=256)  # specs cannot change, and reading takes longer than a short call
def parse_text(text: str) -> Variant:
    for kind, mark in (("union", "+"), ("intersection", "&")):
        terms = split(text, mark)
        if len(terms) > 1:
            return compose(kind, *terms)
    text = text.strip()
    head, bracket, body = text.partition("(")
    if bracket:
        if not body.endswith(")"):
            raise ArgumentError(f"spec {text!r:.80} has text after its closing bracket")
        return parse_bracket(head, body[:-1])
    name, *items = text.split(":")
    cls = find(name, text)
    if joins(cls):
        raise ArgumentError(f"{name!r} joins other specs: write it as {cls.examples[0]!r}")
    return cls(**read_fields(cls, items, text))


def parse_bracket(head: str, body: str) -> Variant:
    if not head.strip():
        return parse(body)
    cls = find(head, head)
    from_body: Callable[[list[str]], Variant] | None = getattr(cls, "from_body", None)
    if from_body is None:
        raise ArgumentError(f"{head!r} takes its values after ':' as in {cls.examples[0]!r}")
    return from_body(split(body, "|"))


def split(text: str, mark: str) -> list[str]:
    """Cut at marks outside of brackets."""
    terms, depth, begin = [], 0, 0
    for at, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth < 0 or depth > MAX_DEPTH:
            break
        if c == mark and depth == 0:
            terms.append(text[begin:at])
            begin = at + 1
    if depth > MAX_DEPTH:
        raise ArgumentError(f"spec {text!r:.80} nests brackets deeper than {MAX_DEPTH}")
    if depth != 0:
        raise ArgumentError(f"spec {text!r:.80} has unequal numbers of '(' and ')'")
    return [*terms, text[begin:]]


def find(name: str, text: str) -> type[Variant]:
    cls = _by_name.get(normal(name))
    if cls is not None:
        return cls
    if "," in text:
        raise ArgumentError(f"spec {text!r:.80} has a comma: separate settings by ':'")
    near = nearest(name, _by_name, count=5, cutoff=0.5)
    kinds = list(dict.fromkeys(_by_name[n].kind for n in near))[:3]
    offer = f"did you mean {' or '.join(kinds)}? " if kinds else ""
    known = ", ".join(k for k, c in variants().items() if not joins(c))
    raise ArgumentError(f"unknown attention variant {name.strip()!r:.80}: {offer}There are {known}")


def nearest(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.0) -> list[str]:
    import difflib  # slow to import, and for mistakes only

    return difflib.get_close_matches(normal(name), list(known), n=count, cutoff=cutoff)


def read_fields(cls: type[Variant], items: list[str], text: str) -> dict[str, Any]:
    hints = field_hints(cls)
    names = {normal(name): name for name in hints}
    values: dict[str, Any] = {}
    if items and not names:
        raise ArgumentError(f"{cls.kind} takes no settings, got {text!r:.80}")
    for at, item in enumerate(items):
        key, equals, value = item.partition("=")
        if "," in item:
            raise ArgumentError(f"spec {text!r:.80} has a comma: set apart by ':', numbers by '/'")
        if not equals and at == 0:
            key, value = next(iter(hints)), item
        elif not equals:
            raise ArgumentError(f"spec {text!r:.80}: {item!r} is not of the form name=value")
        name = names.get(normal(key))
        if name is None:
            near = nearest(key, names, cutoff=0.5)
            offer = f"did you mean {names[near[0]]}?" if near else f"it has {', '.join(hints)}"
            raise ArgumentError(f"{cls.kind} has no setting {key.strip()!r:.40}; {offer}")
        if name in values:
            raise ArgumentError(f"spec {text!r:.80} sets {name} twice")
        values[name] = read_value(hints[name], value.strip(), f"{cls.__name__}.{name}")
    for f in spec_fields(cls):
        if f.default is dataclasses.MISSING and f.name not in values:
            example = cls.examples[0]
            raise ArgumentError(f"{cls.kind} needs {f.name}, as in {example!r}; got {text!r:.80}")
    return values
