"""Damaged model folders, each a function of its number: fields, lengths, names, lines and bytes of
honest files changed so that most of the file stays what a reader expects.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

Files = dict[str, bytes]

DEEP: Any = []
for _ in range(40):
    DEEP = [DEEP]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        64,
        255,
        4096,
        2**31 - 1,
        2**31,
        2**32,
        2**53,
        2**53 + 1,
    ),
    *(
        2**63 - 1,
        2**63,
        -(2**63),
        10**30,
        0.0,
        -0.0,
        0.5,
        1e-300,
        1e300,
        float("inf"),
        float("nan"),
    ),
    *("", "x", "0", "F32", "BF16", "I8", "gpt2", "null", "\0", "\ud800", "é", "../x", "a" * 5000),
    *([], [0], [[]], [0, 0], [1, 2, 3], {}, {"a": 1}, {"": {}}, ["a", "b"], [None] * 1000, DEEP),
]
BYTES = [
    *(b"", b"\0", b"\xff", b"{", b"}", b"[", b'"', b",", b":", b"\n", b"\\", b"NaN", b"9" * 5000),
    *(b"\xef\xbb\xbf", b"[" * 2000, b'{"a":' * 2000, b"\\ud800", b"\xc3\x28", b" " * 70_000),
]


def mutate(files: Files, number: int, seed: int = 0) -> tuple[str, bytes]:
    """The name of one of the files, and what it became."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(sorted(files))
    data = files[name]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = kind_of(name)(rng, data)
    return name, data


def kind_of(name: str) -> Callable[[random.Random, bytes], bytes]:
    if name.endswith(".safetensors"):
        return mutate_safetensors
    return mutate_json if name.endswith(".json") else mutate_lines


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    head, body = data[8 : 8 + size], data[8 + size :]
    what = rng.random()
    if what < 0.7:
        head = mutate_json(rng, head)
    elif what < 0.8:
        body = mutate_bytes(rng, body)
    elif what < 0.9:
        return mutate_bytes(rng, data)
    size = len(head)
    if rng.random() < 0.1:
        size = rng.choice([0, 1, 2, size - 1, size + 1, len(data), 2**24, 2**32, 2**63, 2**64 - 1])
    return (size % 2**64).to_bytes(8, "little") + head + body


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    try:
        tree = json.loads(data)
        changed = mutate_tree(rng, tree)
    except (ValueError, RecursionError):  # damaged before
        return mutate_bytes(rng, data)
    what = rng.random()
    if what < 0.75:
        data = json.dumps(changed).encode()
    elif what < 0.85 and isinstance(tree, dict) and tree:
        key = rng.choice(list(tree))  # twice
        again = json.dumps({key: rng.choice([tree[key], *VALUES])})
        data = (json.dumps(tree)[:-1] + "," + again[1:]).encode()
    else:
        data = mutate_bytes(rng, data)
    return data


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """One node of a copy changed, any depth as likely."""
    tree = copy.deepcopy(tree)
    places: list[tuple[Any, Any]] = []
    stack = [tree] if isinstance(tree, dict | list) else []
    while stack:
        node = stack.pop()
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(child, dict | list):
                stack.append(child)
    if not places or rng.random() < 0.02:
        return rng.choice(VALUES)
    parent, key = rng.choice(places)
    old = parent[key]
    what = rng.randrange(8)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, dict):
        parent[rng.choice([f"{key}x", "", "__metadata__", "a\0b", key.upper(), "x" * 5000])] = old
    elif what == 2:
        other, place = rng.choice(places)
        parent[key] = copy.deepcopy(other[place]) if place in range_of(other) else None
    elif what == 3 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), rng.choice(VALUES))
    elif what in (4, 5) and type(old) in (int, float):
        parent[key] = rng.choice([old + 1, old - 1, old * 2, -old, float(old), str(old), old / 2])
    elif what == 4 and isinstance(old, str):
        parent[key] = rng.choice([old + "x", old[:-1], old.upper(), [old], old + "\0", old * 100])
    else:
        parent[key] = rng.choice(VALUES)
    return tree


def range_of(node: Any) -> Any:
    return node if isinstance(node, dict) else range(len(node))


def mutate_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at, other = (rng.randrange(len(lines)) for _ in range(2))
    what = rng.randrange(6)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(at, lines[other])
    elif what == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif what == 3:
        lines[at] = rng.choice([b"", b" ", b"a", b"a b c", b"\xff", b"x" * 5000, b"a\0 b", b"\r"])
    elif what == 4:
        lines[at] += lines[other]
    else:
        return mutate_bytes(rng, data)
    return b"\n".join(lines)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((0, 1, 1, 2, 8, 100)))
    what = rng.randrange(5)
    if what == 0:
        return data[:at]
    if what == 1 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if what == 2:
        begin = rng.randrange(len(data) + 1)
        return data[:at] + data[begin : begin + 50] + data[at:]
    return data[:at] + rng.choice(BYTES) + data[end:]
