"""Tokenizers of model folders: tokenizer.json, or vocab.json with merges.txt, or vocab.txt.

The `tokenizers` package does the work; this file checks what strangers may put into its input.
Its regular expressions are run by a backtracking engine that a hostile pattern can stall for
ever, so only patterns of known models are accepted unless the caller asks for more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparseattn.errors import ArgumentError, DtypeError, FileError
from sparseattn.models.checkpoint import (
    AGAIN,
    parse_json,
    read_small_json,
    read_text,
    show,
)
from sparseattn.models.fields import Fields

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine

MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_TOKENIZER_DEPTH = 32
MAX_ENTRIES = 2**20  # pieces, added tokens, merges
MAX_PIECE_BYTES = 4096

FULL_FILE = "tokenizer.json"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
WORDPIECE_FILE = "vocab.txt"
SETTINGS_FILE = "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"

# Special pieces by what tokenizer_config.json calls them; of a vocab.txt, BERT's by default.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BERT_PIECES = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
# Tokenizers whose vocab.txt is read as BERT's; others split words by other rules.
WORDPIECE_CLASSES = tuple(
    f"{name}Tokenizer{fast}" for name in ("Bert", "DistilBert", "Electra") for fast in ("", "Fast")
)
# Of a vocab.json that has them all: RoBERTa's, which stand around every text.
ROBERTA_PIECES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
MAX_WORD = 100  # letters of a word that is looked up; longer ones are unknown

# Splitting patterns of GPT-2, GPT-4 (cl100k), GPT-4o (o200k), LLaMA 3, Qwen2, and the digits and
# spaces rules of GPT-NeoX, Falcon and DeepSeek. Each is linear on any text in practice.
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN_PATTERNS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        _CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
        _CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        + _CASES
        + r"?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        + _CASES
        + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"\p{N}{1,3}",
        r"\p{N}",
        r"[0-9]",
        r"[0-9][0-9][0-9]",
        r"\d",
        r" {2,}",
    }
)

Result = TypeVar("Result")


class Tokenizer:
    """Text to token ids and back.

    Attributes
    ----------
    vocab_size : int
        Number of pieces, added tokens included.
    bos_token_id, eos_token_id, mask_token_id : int or None
        Ids of the tokens that tokenizer_config.json names as beginning, end and mask.
    """

    def __init__(self, engine: Engine, special: dict[str, str]) -> None:
        engine.no_truncation()  # a file may carry a training run's settings
        engine.no_padding()
        self._engine = engine
        self.vocab_size = int(engine.get_vocab_size(with_added_tokens=True))
        self.bos_token_id = self.token_id(special.get("bos_token"))
        self.eos_token_id = self.token_id(special.get("eos_token"))
        self.mask_token_id = self.token_id(special.get("mask_token"))

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size})"

    def token_id(self, token: str | None) -> int | None:
        """The id of one piece, or None where the vocabulary has no such piece."""
        try:
            return None if token is None else self._engine.token_to_id(token)
        except UnicodeEncodeError:  # a lone surrogate is in no vocabulary
            return None

    def encode(self, text: str, *, special: bool = False, limit: int | None = None) -> list[int]:
        """Token ids of `text`; `special` adds what the file's template adds, such as ``<s>``.

        With `limit` a longer text is cut: at most so many ids, the template's among them.

        Raises
        ------
        DtypeError
            If `text` is not a str.
        ArgumentError
            If it holds a lone surrogate, which no UTF-8 text can.
        FileError
            If the tokenizer's own file makes the engine fail on it.
        """
        check_text("text", text)
        engine = self._engine

        def run() -> list[int]:
            encoding = engine.encode(text, add_special_tokens=special)
            if limit is None or len(encoding.ids) <= limit:
                return list(encoding.ids)
            encoding = engine.encode(text, add_special_tokens=False)
            around = engine.num_special_tokens_to_add(False) if special else 0
            encoding.truncate(max(limit - around, 0))
            return list(engine.post_process(encoding, None, special).ids)

        return guarded("encoding", run)

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Token ids of two texts in one, and the token type of each id.

        Raises
        ------
        DtypeError, ArgumentError, FileError
            As `encode`.
        """
        check_text("first", first)
        check_text("second", second)
        engine = self._engine
        encoding = guarded("encoding", lambda: engine.encode(first, second))
        return list(encoding.ids), list(encoding.type_ids)

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """The text of `ids`; without `special`, special tokens are left out.

        Raises
        ------
        ArgumentError
            If an id is outside ``range(vocab_size)``.
        """
        known = [int(i) for i in ids]
        bad = next((i for i in known if not 0 <= i < 2**32), None)
        if bad is None:
            bad = next((i for i in known if self._engine.id_to_token(i) is None), None)
        if bad is not None:
            raise ArgumentError(f"ids holds {bad}: give ids of the {self.vocab_size} tokens")
        engine = self._engine
        text: str = guarded(
            "decoding", lambda: engine.decode(known, skip_special_tokens=not special)
        )
        return text

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated `ids`: special tokens, and ids past the vocabulary, say nothing."""
        engine = self._engine
        text: str = guarded("decoding", lambda: engine.decode(ids, skip_special_tokens=True))
        return text


def load_tokenizer(path: str | os.PathLike[str], *, custom_regex: bool = False) -> Tokenizer | None:
    """The tokenizer of a folder or a tokenizer.json, or None where the folder has none.

    Parameters
    ----------
    path : path
        A folder with tokenizer.json, or with vocab.json and merges.txt (byte-level BPE), or with
        vocab.txt (WordPiece); or the json file itself.
    custom_regex : bool
        Accept splitting patterns that no known model uses.

    Raises
    ------
    FileError
        If a file is too large, is not what it must be, or holds an unknown pattern.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    full = path / FULL_FILE if path.is_dir() else path
    vocab, merges = folder / VOCAB_FILE, folder / MERGES_FILE
    if os.path.lexists(full):
        return Tokenizer(read_full(full, custom_regex), special_tokens(folder))
    if not path.is_dir():
        raise FileError(f"tokenizer {show(str(path))} does not exist: give a folder or its json")
    if os.path.lexists(vocab) and os.path.lexists(merges):
        pieces = read_vocab(vocab)
        roberta = ROBERTA_PIECES if pieces.keys() >= set(ROBERTA_PIECES.values()) else {}
        special = roberta | special_tokens(folder)
        engine = read_pair(f"{vocab.name} with {merges.name}", pieces, read_merges(merges), special)
        return Tokenizer(engine_around(engine, pieces) if roberta else engine, special)
    for here, gone in ((vocab, MERGES_FILE), (merges, VOCAB_FILE)):
        if os.path.lexists(here):
            raise FileError(f"folder {show(str(folder))} has {here.name} but no {gone}: add it")
    lines = folder / WORDPIECE_FILE
    if os.path.lexists(lines):
        special = BERT_PIECES | special_tokens(folder)
        settings = Fields(read_small_json(folder, SETTINGS_FILE), SETTINGS_FILE)
        return Tokenizer(read_wordpieces(lines, special, settings), special)
    return None


def check_text(name: str, text: str) -> None:
    """Refuse what no UTF-8 text can be."""
    if not isinstance(text, str):
        raise DtypeError(f"{name} is a {type(text).__name__}: give a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"{name} has a lone surrogate at {error.start}: decode it with errors='replace'"
        ) from None


def special_tokens(folder: Path) -> dict[str, str]:
    """Special pieces by role, as tokenizer_config.json or special_tokens_map.json names them."""
    config = read_small_json(folder, "special_tokens_map.json")
    config |= read_small_json(folder, SETTINGS_FILE)
    found = {}
    for role in ROLES:
        token = config.get(role)
        if isinstance(token, dict):  # the long form: {"content": ..., "lstrip": ...}
            token = token.get("content")
        if isinstance(token, str):
            found[role] = token
    return found


def read_full(path: Path, custom_regex: bool) -> Engine:
    """A checked tokenizer.json."""
    from tokenizers import Tokenizer as Engine

    text = read_text(path, MAX_TOKENIZER_BYTES)
    values = parse_json(text, path.name, MAX_TOKENIZER_DEPTH)
    check_pieces(path.name, values)
    if not custom_regex:
        for pattern in patterns(values):
            if pattern not in KNOWN_PATTERNS:
                raise FileError(
                    f"{path.name} splits text by the regular expression {show(pattern)}, which no "
                    "known model uses and which may never end: load_tokenizer(folder, "
                    "custom_regex=True) accepts it"
                )
    return guarded(path.name, lambda: Engine.from_str(text))


def check_pieces(what: str, values: dict[str, Any]) -> None:
    """Counts and lengths of a tokenizer.json's pieces, before the engine sees them."""
    model = values.get("model")
    if not isinstance(model, dict):
        raise FileError(f"{what} has no model object: {AGAIN}")
    vocab, added = model.get("vocab", {}), values.get("added_tokens", [])
    merges = model.get("merges", [])
    for name, part in (("vocab", vocab), ("added_tokens", added), ("merges", merges)):
        if not isinstance(part, dict | list) or len(part) > MAX_ENTRIES:
            raise FileError(f"{what} has {name} that are no list of up to {MAX_ENTRIES}: {AGAIN}")
    pieces = [*vocab] if isinstance(vocab, dict) else [v[0] for v in vocab if isinstance(v, list)]
    pieces += [t.get("content") for t in added if isinstance(t, dict)]
    check_lengths(what, pieces)


def check_lengths(what: str, pieces: Sequence[Any]) -> None:
    for piece in pieces:
        if not isinstance(piece, str) or len(piece.encode(errors="replace")) > MAX_PIECE_BYTES:
            raise FileError(
                f"{what} has piece {show(piece)}, not text of up to {MAX_PIECE_BYTES} bytes: "
                f"{AGAIN}"
            )


def patterns(node: Any) -> Iterator[str]:
    """Every regular expression in the parts of a tokenizer.json that run one."""
    if isinstance(node, list):
        for child in node:
            yield from patterns(child)
    elif isinstance(node, dict):
        for name, child in node.items():
            if name == "Regex":
                yield str(child)
            elif name not in ("vocab", "merges", "added_tokens"):
                yield from patterns(child)


def read_pair(
    what: str, vocab: dict[str, int], merges: list[tuple[str, str]], special: dict[str, str]
) -> Engine:
    """GPT-2's byte-level BPE from what its two files hold."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    engine: Engine = guarded(what, lambda: Engine(models.BPE(vocab=vocab, merges=merges)))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    names = {END_OF_TEXT, *special.values()} & vocab.keys()
    mask = special.get("mask_token")  # takes the space before it, as in transformers
    engine.add_special_tokens(
        [AddedToken(name, normalized=False, lstrip=name == mask) for name in sorted(names)]
    )
    return engine


def engine_around(engine: Engine, vocab: dict[str, int]) -> Engine:
    """The engine with RoBERTa's beginning and end around a text."""
    from tokenizers import processors

    begin, end = ((p, vocab[p]) for p in ("<s>", "</s>"))
    engine.post_processor = processors.RobertaProcessing(end, begin, add_prefix_space=False)
    return engine


def read_vocab(path: Path) -> dict[str, int]:
    """Piece to id, the ids being 0 .. n - 1 in some order."""
    vocab = parse_json(read_text(path, MAX_TOKENIZER_BYTES), path.name, 1)
    if not 1 <= len(vocab) <= MAX_ENTRIES:
        raise FileError(f"{path.name} has {len(vocab)} pieces, not 1 to {MAX_ENTRIES}: {AGAIN}")
    check_lengths(path.name, list(vocab))
    owner: dict[int, str] = {}
    for piece, i in vocab.items():
        if type(i) is not int or not 0 <= i < len(vocab) or i in owner:
            raise FileError(
                f"{path.name} gives {show(piece)} the id {show(i)}, which is not one of its own "
                f"from 0 to {len(vocab) - 1}: {AGAIN}"
            )
        owner[i] = piece
    return vocab


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of merges.txt in order of rank."""
    text = read_text(path, MAX_TOKENIZER_BYTES)
    if text.count("\n") >= MAX_ENTRIES:  # before they become a list, which takes far more memory
        raise FileError(f"{path.name} has over {MAX_ENTRIES} lines: {AGAIN}")
    seen: dict[tuple[str, str], int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise FileError(f"{path.name} line {number} is {show(line)}, not two pieces: {AGAIN}")
        left, right = pair
        if (left, right) in seen:
            raise FileError(
                f"{path.name} lines {seen[left, right]} and {number} are the same merge: {AGAIN}"
            )
        seen[left, right] = number
    return list(seen)


def read_wordpieces(path: Path, special: dict[str, str], settings: Fields) -> Engine:
    """BERT's WordPiece from a vocab.txt, a piece a line. [arXiv:1609.08144, section 4.1]"""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Engine

    name = settings.get("tokenizer_class", "BertTokenizer")
    if name not in WORDPIECE_CLASSES:
        raise settings.fail(
            "tokenizer_class",
            f"is {show(name)}, and {path.name} is read for {', '.join(WORDPIECE_CLASSES)} only: "
            "save the tokenizer as tokenizer.json",
        )
    lower = settings.flag("do_lower_case", True)
    accents = settings.flag("strip_accents", lower)
    chinese = settings.flag("tokenize_chinese_chars", True)
    vocab = read_lines(path)
    for role in ("unk_token", "sep_token", "cls_token"):
        if special[role] not in vocab:
            raise FileError(
                f"{path.name} has no piece {show(special[role])}, the {role} of {SETTINGS_FILE}: "
                f"{AGAIN}"
            )
    unk, sep, cls = (special[role] for role in ("unk_token", "sep_token", "cls_token"))

    def make() -> Engine:
        model = models.WordPiece(vocab, unk_token=unk, max_input_chars_per_word=MAX_WORD)
        engine = Engine(model)
        engine.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=chinese, strip_accents=accents, lowercase=lower
        )
        engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        engine.post_processor = processors.BertProcessing((sep, vocab[sep]), (cls, vocab[cls]))
        engine.decoder = decoders.WordPiece(prefix="##")
        known = [
            AddedToken(p, normalized=False) for p in dict.fromkeys(special.values()) if p in vocab
        ]
        engine.add_special_tokens(known)
        return engine

    return guarded(path.name, make)


def read_lines(path: Path) -> dict[str, int]:
    """Piece to id of a vocab.txt: the ids count its lines from 0."""
    text = read_text(path, MAX_TOKENIZER_BYTES).removesuffix("\n")
    count = text.count("\n") + 1
    if not text or count > MAX_ENTRIES:
        raise FileError(
            f"{path.name} has {count if text else 0} pieces, not 1 to {MAX_ENTRIES}: {AGAIN}"
        )
    vocab: dict[str, int] = {}
    for i, line in enumerate(text.split("\n")):
        piece = line.removesuffix("\r")
        if not piece or piece in vocab:
            same = f"the same as line {vocab[piece] + 1}" if piece else "empty"
            raise FileError(f"{path.name} line {i + 1} is {same}, not a piece of its own: {AGAIN}")
        vocab[piece] = i
    check_lengths(path.name, list(vocab))
    return vocab


def guarded(what: str, make: Callable[[], Result]) -> Result:
    """The engine's answer; its complaints, panics included, become one sentence."""
    try:
        return make()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = show(str(error).split("\n")[0])
        raise FileError(
            f"{what} is refused by the tokenizers package ({reason}): {AGAIN}"
        ) from None
