"""WordPiece from a vocab.txt: the answer key, BERT's rules, settings, hostile files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import requires, shared_path
from test_tokenizer import load, save_pair

from sparseattn.errors import ArgumentError, DtypeError, FileError
from sparseattn.models import load_tokenizer

PIECES = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("the", "play", "##ing", "##s", "un", "##play", "cafe", "café", "The", "日", "本", ",", "!"),
)
IDS = {piece: i for i, piece in enumerate(PIECES)}


def save_lines(folder: Path, lines: Any = PIECES, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    text = lines if isinstance(lines, str) else "".join(f"{line}\n" for line in lines)
    (folder / "vocab.txt").write_bytes(text.encode())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ids(*pieces: str) -> list[int]:
    return [IDS[piece] for piece in pieces]


@pytest.mark.promise("D5")
@pytest.mark.parametrize("layout", ["vocab.txt", "tokenizer.json"])
def test_bert_gives_the_answer_key(layout: str, tmp_path: Path) -> None:
    """Google's own tokenizer on 1,582 questions of SQuAD: pieces and ids of every one."""
    folder = shared_path("tokenizers/bert-base-uncased")
    tokenizer = load(folder)
    if layout == "tokenizer.json":
        tokenizer._engine.save(str(tmp_path / "tokenizer.json"))
        tokenizer = load(tmp_path)
    rows = [json.loads(line) for line in (folder / "expected.jsonl").read_text().splitlines()]
    assert len(rows) == 1582 and not all(row["text"].isascii() for row in rows)
    vocab = (folder / "vocab.txt").read_text().split("\n")
    for row in rows:
        got = tokenizer.encode(row["text"])
        assert got == row["ids"] and [vocab[i] for i in got] == row["wordpiece"]
        assert tokenizer.encode(row["text"], special=True) == [101, *got, 102]


@pytest.mark.parametrize("lower", [True, False])
def test_same_ids_as_transformers(lower: bool, tmp_path: Path) -> None:
    transformers = requires("transformers")
    folder = shared_path("tokenizers/bert-base-uncased")
    shutil.copy(folder / "vocab.txt", tmp_path)
    settings = {"do_lower_case": lower, "tokenizer_class": "BertTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load(tmp_path)
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    texts = [
        "Ünïcödé, déjà vu!",
        "日本語 text",
        "a\u200bb\x00c\ufffd\td",
        "x" * 101,
        "[MASK] me.",
        "",
    ]
    for first in texts:
        assert tokenizer.encode(first, special=True) == theirs(first)["input_ids"]
        for second in texts[:-1]:  # an empty one counts as none there
            pair = theirs(first, second)
            want = (pair["input_ids"], pair["token_type_ids"])
            assert tokenizer.encode_pair(first, second) == want
    assert (tokenizer.mask_token_id, tokenizer.vocab_size) == (theirs.mask_token_id, len(theirs))


def test_rules(tmp_path: Path) -> None:
    """Longest piece first, ## inside of a word, accents and case away, Chinese apart."""
    tokenizer = load(save_lines(tmp_path))
    assert tokenizer.encode("The plays,unplaying!") == ids(
        *("the", "play", "##s", ",", "un", "##play", "##ing", "!")
    )
    assert tokenizer.encode("CAFÉ 日本") == ids("cafe", "日", "本")
    assert tokenizer.encode("playx the") == ids("[UNK]", "the")
    assert tokenizer.encode("[MASK]s") == ids("[MASK]", "[UNK]")
    assert (
        tokenizer.decode(ids("[CLS]", "un", "##play", "##ing", "!"), special=False) == "unplaying!"
    )
    assert tokenizer.encode("play" + "s" * 97) == ids("[UNK]")  # over 100 letters
    assert tokenizer.encode("the the the", special=True, limit=4) == ids(
        "[CLS]", "the", "the", "[SEP]"
    )
    assert tokenizer.encode("the the the", limit=2) == ids("the", "the")
    assert tokenizer.encode_pair("the", "play") == (
        ids("[CLS]", "the", "[SEP]", "play", "[SEP]"),
        [0, 0, 0, 1, 1],
    )


def test_settings(tmp_path: Path) -> None:
    cased = load(save_lines(tmp_path, do_lower_case=False))
    assert cased.encode("The the café") == ids("The", "the", "café")
    bare = load(save_lines(tmp_path, do_lower_case=False, strip_accents=True))
    assert bare.encode("The café") == ids("The", "cafe")
    whole = load(save_lines(tmp_path, tokenize_chinese_chars=False))
    assert whole.encode("日本") == ids("[UNK]")
    lines = ["<m>" if piece == "[MASK]" else piece for piece in PIECES]
    named = load(save_lines(tmp_path, lines, mask_token={"content": "<m>"}))
    assert named.mask_token_id == IDS["[MASK]"] and named.encode("<m>") == [IDS["[MASK]"]]
    crlf = load(save_lines(tmp_path, "".join(f"{piece}\r\n" for piece in PIECES)))
    assert crlf.encode("the") == ids("the") and crlf.vocab_size == len(PIECES)


def test_roberta_pair(tmp_path: Path) -> None:
    """vocab.json with merges.txt and RoBERTa's pieces: they stand around a text."""
    from test_tokenizer import VOCAB

    more = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    vocab = {piece: i for i, piece in enumerate([*more, *VOCAB])}
    tokenizer = load(save_pair(tmp_path, vocab))
    the, mask = vocab["the"], vocab["<mask>"]
    assert tokenizer.encode("the <mask>", special=True) == [0, the, mask, 2]
    assert tokenizer.mask_token_id == mask
    assert load(save_pair(tmp_path / "gpt2")).encode("the", special=True) == [VOCAB["the"]]


def test_bad_arguments(tmp_path: Path) -> None:
    tokenizer = load(save_lines(tmp_path))
    with pytest.raises(DtypeError, match="second is a int: give a str"):
        tokenizer.encode_pair("the", 3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="first has a lone surrogate at 0"):
        tokenizer.encode_pair("\ud800", "the")


HOSTILE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": ("", {}, "vocab.txt has 0 pieces, not 1 to 1048576"),
    "an_empty_line": ("[UNK]\n\nthe\n", {}, "vocab.txt line 2 is empty, not a piece of its own"),
    "the_same_piece": ("the\na\nthe\n", {}, "vocab.txt line 3 is the same as line 1"),
    "long_piece": (["x" * 4097], {}, "not text of up to 4096 bytes"),
    "too_many": ("a\n" * (2**20 + 1), {}, "vocab.txt has 1048577 pieces, not 1 to 1048576"),
    "no_unknown": (["[CLS]", "[SEP]"], {}, "has no piece '[UNK]', the unk_token of tokenizer_conf"),
    "no_end": (["[CLS]", "[UNK]"], {}, "has no piece '[SEP]', the sep_token"),
    "named_but_absent": (PIECES, {"cls_token": "<c>"}, "has no piece '<c>', the cls_token"),
    "another_class": (
        PIECES,
        {"tokenizer_class": "BertJapaneseTokenizer"},
        "tokenizer_class is 'BertJapaneseTokenizer', and vocab.txt is read for BertTokenizer,",
    ),
    "class_is_a_list": (PIECES, {"tokenizer_class": [1]}, "tokenizer_class is [1], and vocab.txt"),
    "lower_is_text": (PIECES, {"do_lower_case": "yes"}, "do_lower_case is 'yes': give true or"),
    "accents_are_1": (PIECES, {"strip_accents": 1}, "strip_accents is 1: give true or false"),
}


@pytest.mark.promise("D5")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_vocab_txt(case: str, tmp_path: Path) -> None:
    lines, settings, sentence = HOSTILE[case]
    with pytest.raises(FileError) as caught:
        load_tokenizer(save_lines(tmp_path, lines, **settings))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.promise("D5")
def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    save_lines(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\n\xff\xfe\n")
    with pytest.raises(FileError, match=r"vocab\.txt is not UTF-8 at byte 6"):
        load_tokenizer(tmp_path)
    with open(tmp_path / "vocab.txt", "wb") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(FileError, match="more than the limit of 67108864"):
        load_tokenizer(tmp_path)
    with open(tmp_path / "vocab.txt", "wb") as file:
        file.write(b"\n" * (8 << 20))
    with pytest.raises(FileError, match="has 8388608 pieces"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "vocab.txt").mkdir()
    with pytest.raises(FileError, match="is not a regular file"):
        load_tokenizer(tmp_path)
