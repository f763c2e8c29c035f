"""Text for the default model, built from the documentation inside the user's own Python.

The embedded model is trained on the standard library's documentation strings and on most of
`pydoc_data.topics` (the text behind ``help("topics")``), and judged on the remaining topics.
Nothing of this text is shipped: every Python carries it, so it is built at run time.

- `evaluation_text` needs the topics only. A topic is held out when the first byte of the MD5
  digest of its name lies in the lowest third, so the choice is the same for every Python.
- `training_text` parses the library's sources and imports no module of them but `pydoc_data`.
  Paragraphs that share wording with the evaluation text are left out of it.

The texts differ a little between versions of Python; `text_hash` tells them apart.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

__all__ = [
    "MissingTextError",
    "evaluation_text",
    "evaluation_topics",
    "text_hash",
    "training_documents",
    "training_text",
]

HELD_OUT_BELOW = 256 // 3  # of the first byte of a topic name's MD5 digest
SHORT = 3  # words up to which a repeated paragraph may stay
SHINGLE = 6  # words in a row that count as shared wording
SHARED = 0.2  # share of a paragraph's shingles that makes it a near copy
SKIPPED = frozenset({"__pycache__", "lib-dynload", "pydoc_data", "site-packages", "test", "tests"})

_WORD = re.compile(r"\w+")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")

_Words = tuple[str, ...]


class MissingTextError(LookupError):
    """This Python lacks `pydoc_data.topics`."""


def evaluation_text() -> str:
    """Return the held-out topics in alphabetical order, parted by two blank lines.

    Raises
    ------
    MissingTextError
        If this Python lacks `pydoc_data.topics`.
    """
    return "\n\n\n".join(text for _, text in evaluation_topics())


def training_text() -> str:
    """Return the training documents, topics first, parted by two blank lines.

    Where the library's sources are stripped, only the topics remain.

    Raises
    ------
    MissingTextError
        If this Python lacks `pydoc_data.topics`.
    """
    return "\n\n\n".join(text for _, text in training_documents())


def text_hash(text: str) -> str:
    """Return the SHA-256 digest of `text` in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def evaluation_topics() -> list[tuple[str, str]]:
    """Return ``(name, text)`` of each held-out topic, without repeated paragraphs."""
    topics = _topics()
    seen: set[_Words] = set()
    named = ((name, _fresh(topics[name], seen)) for name in sorted(topics) if _held_out(name))
    return [(name, text) for name, text in named if text]


def training_documents() -> list[tuple[str, str]]:
    """Return ``(name, text)`` of each training topic, then of each module with docstrings.

    A topic's name is ``topic:NAME``, a module's its path below the standard library.
    """
    topics = _topics()
    held_out = {p for _, text in evaluation_topics() for p in map(_words, _paragraphs(text))}
    shingles = {s for words in held_out for s in _shingles(words)}
    seen = {words for words in held_out if len(words) > SHORT}
    trained = ((f"topic:{name}", topics[name]) for name in sorted(topics) if not _held_out(name))
    documents = []
    for source in (trained, _library_docstrings()):
        for name, text in source:
            kept = _fresh(text, seen, shingles)
            if kept:
                documents.append((name, kept))
    return documents


@cache
def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise MissingTextError(
            "this Python is too bare to carry the default texts (pydoc_data.topics is missing): "
            "pass a text of your own"
        ) from None
    return dict(topics)


def _held_out(name: str) -> bool:
    return hashlib.md5(name.encode(), usedforsecurity=False).digest()[0] < HELD_OUT_BELOW


def _paragraphs(text: str) -> list[str]:
    text = "\n".join(line.rstrip() for line in text.expandtabs().splitlines())
    return [p for p in _BLANK_LINES.split(text.strip("\n")) if p.strip()]


def _words(paragraph: str) -> _Words:
    return tuple(_WORD.findall(paragraph.lower()))


def _shingles(words: _Words) -> Iterator[_Words]:
    return (words[i : i + SHINGLE] for i in range(len(words) - SHINGLE + 1))


def _fresh(text: str, seen: set[_Words], shingles: Iterable[_Words] = frozenset()) -> str:
    """Drop paragraphs met before (which `seen` collects) and near copies of `shingles`."""
    kept = []
    for paragraph in _paragraphs(text):
        words = _words(paragraph)
        if words in seen:
            continue
        own = list(_shingles(words))
        if sum(s in shingles for s in own) > SHARED * len(own):
            continue
        if len(words) > SHORT:
            seen.add(words)
        kept.append(paragraph)
    return "\n\n".join(kept)


def _library_docstrings() -> Iterator[tuple[str, str]]:
    """Yield each module's docstrings in the order of its source."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED.isdisjoint(parts) and not parts[0].startswith("config-"):
            text = "\n\n".join(_docstrings(path))
            if text:
                yield "/".join(parts), text


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    yield from _docstrings_below(tree)


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):  # only statements hold definitions
            yield from _docstrings_below(child)
