"""Contract checks of the spec as an object: what it is, its text, its place in the registry."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import pickle
import sys
from typing import Any

from sparseattn.attention import attention
from sparseattn.errors import ArgumentError
from sparseattn.testing_subject import Fault, Skip, Subject, check, refused
from sparseattn.variants.base import Variant, field_hints, parse, specs, variants

SCALARS = (bool, int, float, str, type(None), Variant)
MARKS = set(":,+&()|=/ \t\n")  # of the text form


def fields_of(spec: Variant) -> dict[str, Any]:
    """The fields by name; none where it is no dataclass, which a check of its own says."""
    if not dataclasses.is_dataclass(spec):
        return {}
    return {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}


def known(spec: Variant) -> bool:
    return variants().get(spec.kind) is type(spec)


def need_known(spec: Variant) -> None:
    if not known(spec):
        raise Skip("it is not registered")


@check("G1")
def frozen_dataclass(s: Subject) -> None:
    """The spec is a frozen dataclass: its fields cannot be set."""
    cls = type(s.spec)
    if not dataclasses.is_dataclass(cls):
        raise Fault(cls.__name__, "a plain class", "@dataclass(frozen=True, slots=True)")
    for name in fields_of(s.spec):
        value = getattr(s.spec, name)
        try:
            setattr(s.spec, name, value)
        except dataclasses.FrozenInstanceError:
            continue
        raise Fault(f"{cls.__name__}.{name}", "a field that can be set", "frozen=True")


@check("G1")
def plain_fields(s: Subject) -> None:
    """Fields are scalars, specs and tuples of these: arrays come as params."""

    def look(name: str, value: Any) -> None:
        if isinstance(value, tuple):
            for item in value:
                look(name, item)
        elif not isinstance(value, SCALARS):
            raise Fault(name, type(value).__name__, "a scalar, a spec or a tuple of them")

    for name, value in fields_of(s.spec).items():
        look(f"{type(s.spec).__name__}.{name}", value)


@check("G1")
def equal_and_hash(s: Subject) -> None:
    """A spec made of the same fields is equal, with an equal hash, and other objects are not."""
    twin = copy.copy(s.spec)
    if dataclasses.is_dataclass(s.spec):
        twin = type(s.spec)(**fields_of(s.spec))
    if not (twin == s.spec and hash(twin) == hash(s.spec)):
        raise Fault(str(s.spec), "another spec from the same fields", "an equal one, equal in hash")
    others: tuple[object, ...] = (object(), str(s.spec))
    if any(s.spec == other for other in others):
        raise Fault(str(s.spec), "equality with another kind of object", "inequality")


@check("G1")
def repr_round_trip(s: Subject) -> None:
    """``repr`` is Python that makes an equal spec."""
    text, cls = repr(s.spec), type(s.spec)
    names = dict(vars(sys.modules[cls.__module__])) | {cls.__name__: cls}
    names |= {other.__name__: other for other in variants().values()}
    try:
        again = eval(text, names)
    except Exception as error:
        raise Fault("repr", f"{text!r}, which raises {error!r}", "Python for the spec") from None
    if again != s.spec:
        raise Fault("repr", f"{text!r}", f"Python that makes {s.spec}")


@check("G1")
def pickles_and_copies(s: Subject) -> None:
    """Pickles of every protocol and copies are equal specs."""
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        try:
            again = pickle.loads(pickle.dumps(s.spec, protocol))
        except Exception as error:
            raise Fault(f"pickle protocol {protocol}", repr(error), "an equal spec") from None
        if again != s.spec:
            raise Fault(f"pickle protocol {protocol}", repr(again), repr(s.spec))
    for copied in (copy.copy(s.spec), copy.deepcopy(s.spec)):
        if copied != s.spec:
            raise Fault("copy", repr(copied), repr(s.spec))


@check("G1")
def kind_is_a_word(s: Subject) -> None:
    """``kind`` is a word in small letters without the marks of the text form."""
    kind = getattr(s.spec, "kind", None)
    if not isinstance(kind, str) or not kind or kind != kind.lower() or MARKS & set(kind):
        raise Fault("kind", repr(kind), "a word such as 'topk'")


@check("G1")
def registered(s: Subject) -> None:
    """``parse`` and ``specs`` know its kind."""
    if not known(s.spec):
        found = variants().get(s.spec.kind)
        have = found.__name__ if found else "nothing"
        raise Fault(
            f"the registry at {s.spec.kind!r}",
            have,
            f"{type(s.spec).__name__}: put @register above its @dataclass",
        )
    lines = [line for line in specs() if line.name == s.spec.kind]
    if len(lines) != 1:
        raise Fault("sa.specs()", f"{len(lines)} lines", "one")


@check("G1")
def text_round_trip(s: Subject) -> None:
    """``parse(str(spec))`` is the spec again, without commas or spaces in between."""
    need_known(s.spec)
    text = str(s.spec)
    if set(text) & set(", \t\n"):
        raise Fault("str", repr(text), "text without commas and spaces")
    try:
        again = parse(text)
    except ArgumentError as error:
        raise Fault("parse", f"{text!r}: {error}", repr(s.spec)) from None
    if again != s.spec:
        raise Fault(f"parse({text!r})", repr(again), repr(s.spec))


@check("G1")
def text_in_any_case(s: Subject) -> None:
    """Capitals and hyphens in the text do not matter."""
    need_known(s.spec)
    for text in (str(s.spec).upper(), str(s.spec).replace("_", "-")):
        try:
            again = parse(text)
        except ArgumentError as error:
            raise Fault("parse", f"{text!r}: {error}", repr(s.spec)) from None
        if again != s.spec:
            raise Fault(f"parse({text!r})", repr(again), repr(s.spec))


@check("G1")
def examples_parse(s: Subject) -> None:
    """``examples`` holds texts of specs of this class."""
    need_known(s.spec)
    cls = type(s.spec)
    if not cls.examples:
        raise Fault(f"{cls.__name__}.examples", "nothing", "a text or more, for specs() and tests")
    for text in cls.examples:
        if type(parse(text)) is not cls:
            raise Fault(f"{cls.__name__}.examples", repr(text), f"a text of a {cls.__name__}")


@check("G1")
def documented(s: Subject) -> None:
    """The docstring has a summary of one line and a word on each field and array."""
    cls = type(s.spec)
    doc = inspect.cleandoc(cls.__doc__ or "")
    summary = doc.splitlines()[0] if doc else ""
    made = f"{cls.__name__}("  # what a dataclass writes where there is none
    if not summary.endswith(".") or len(summary) > 90 or summary.startswith(made):
        raise Fault(f"{cls.__name__}.__doc__", repr(summary), "a sentence of at most 90 letters")
    if hasattr(cls, "children"):
        return  # a join shows its specs
    for name in (*fields_of(s.spec), *cls.arrays):
        if f"{name} : " not in doc:
            raise Fault(f"{cls.__name__}.__doc__", f"no entry '{name} : '", "one for each field")


@check("G1")
def fields_have_types(s: Subject) -> None:
    """Fields are annotated so that their text can be read and their values checked."""
    hints = field_hints(type(s.spec))
    if set(hints) != set(fields_of(s.spec)):
        raise Fault("annotations", sorted(hints), f"{sorted(fields_of(s.spec))}")
    for name, hint in hints.items():
        if hint is not int:
            continue
        values = fields_of(s.spec) | {name: "a word"}
        make = functools.partial(type(s.spec), **values)
        refused(f"{type(s.spec).__name__}.{name}", make, name)


@check("G1")
def takes_a_call(s: Subject) -> None:
    """Some alignment of causality is taken; others are refused by name."""
    if not s.alignments:
        raise Fault("attention(q, k, v, spec)", "an error for every causal=", "one that is taken")


@check("G1")
def unknown_params(s: Subject) -> None:
    """Arrays that the spec does not take are refused by name, those that it needs are asked for."""
    shape = s.shape(1, 5, 5)
    q, k, v = s.inputs(shape)
    params = {**(s.params(shape) or {}), "no_such_array": q}
    where = s.where(shape)

    def call(given: Any) -> Any:
        return lambda: attention(q, k, v, s.spec, causal=s.causal, params=given)

    refused(where, call(params), "no_such_array")
    for name in s.spec.arrays:
        rest = {other: x for other, x in params.items() if other not in (name, "no_such_array")}
        refused(where, call(rest or None), name)
