"""Generation: token by token as the whole at once, batches as each prompt alone, text in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SPECS, requires, shared_path
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_models import GPT2_CONFIG, LLAMA_CONFIG, gpt2_weights, llama_weights, save_folder

import sparseattn as sa
from sparseattn.errors import ArgumentError, DtypeError
from sparseattn.models import Model
from sparseattn.models.incremental import Incremental, grouped
from sparseattn.models.pieces import Pieces, Stops
from sparseattn.models.tokenizer import Tokenizer
from sparseattn.variants.base import Variant

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")

CONFIGS = {"gpt2": GPT2_CONFIG, "llama": LLAMA_CONFIG}
WEIGHTS = {"gpt2": gpt2_weights, "llama": llama_weights}
# What a model takes by spec alone: arrays of a variant and counts of heads belong to one model.
MODEL_SPECS = [s for s in SPECS if not s.arrays and not isinstance(s, sa.PerHead)]
PROMPTS = [[5, 9, 3], [7], [11, 2, 5, 9, 3, 40, 41, 42, 8, 9, 17], [30, 31, 32]]
MARGIN = 1e-4  # of logits of order one: nearer ones may change places


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family = request.param
    config = {**CONFIGS[family], "eos_token_id": None}
    return Model.from_pretrained(
        save_folder(tmp_path_factory.mktemp(family), config, WEIGHTS[family](config))
    )


def by_prefill(model: Model, prompt: list[int], count: int, **how: Any) -> tuple[list[int], float]:
    """Greedy tokens, each from the whole text so far, and the least margin of any choice."""
    ids, least = list(prompt), np.inf
    for _ in range(count):
        last = model(ids, **how)[-1]
        second, first = np.sort(last)[-2:]
        least = min(least, float(first - second))
        ids.append(int(last.argmax()))
    return ids[len(prompt) :], float(least)


# ---- token by token ------------------------------------------------------------------------------


@pytest.mark.promise("A5")
@pytest.mark.parametrize("spec", MODEL_SPECS, ids=str)
def test_logits_are_those_of_the_whole_text(model: Model, spec: Variant) -> None:
    """For every prompt of a ragged batch, some of which end on the way."""
    rng = np.random.default_rng(0)
    texts = [np.concatenate([p, rng.integers(0, 61, 30)]) for p in PROMPTS]
    whole = [model(text, attention=spec) for text in texts]
    specs = [spec.layer(i) for i in range(model.config.n_layers)]
    running = Incremental(model, specs, [np.array(p) for p in PROMPTS])
    at = [len(p) for p in PROMPTS]
    got = running.read()
    for step in range(30):
        for row, prompt in zip(got, running.prompts, strict=True):
            np.testing.assert_allclose(row, whole[prompt][at[prompt] - 1], atol=3e-5)
        if step == 10:
            running.keep({0, 2, 3})
        if step == 20:
            running.keep({2})
        tokens = [int(texts[p][at[p]]) for p in running.prompts]
        for p in running.prompts:
            at[p] += 1
        got = running.step(tokens)
    assert running.prompts == [2]


@pytest.mark.parametrize("spec", MODEL_SPECS, ids=str)
def test_greedy_is_the_largest_logit_each_time(model: Model, spec: Variant) -> None:
    together = model.generate(PROMPTS, 12, attention=spec)
    for prompt, many in zip(PROMPTS, together, strict=True):
        want, margin = by_prefill(model, prompt, 12, attention=spec)
        if margin > MARGIN:
            assert many.tolist() == want
            assert model.generate(prompt, 12, attention=spec).tolist() == want


def test_layers_may_differ(model: Model) -> None:
    how: dict[str, Any] = {"attention": "window:4", "per_layer": {0: "dense", 2: "topk:3"}}
    want, margin = by_prefill(model, PROMPTS[2], 20, **how)
    assert margin > MARGIN and model.generate(PROMPTS[2], 20, **how).tolist() == want
    assert want != by_prefill(model, PROMPTS[2], 20, attention="window:4")[0]


def groups(*specs: str) -> list[list[int]]:
    """Which of the prompts share caches under these specs, one a layer."""
    return grouped(np.array([len(p) for p in PROMPTS]), [sa.parse(s) for s in specs])


def test_who_shares_caches() -> None:
    """Padding in front is for what looks back; random keys are drawn by place in the batch."""
    for spec in ("dense", "window:4", "topk:3", "window:4+topk:2", "window:window_size=3/2"):
        assert groups(spec) == [[0, 1, 2, 3]]
    for spec in ("window:5:sinks=2", "window:4:globals=3", "prefix:3", "dense&window:4:sinks=1"):
        assert groups(spec) == groups("dense", spec) == [[0, 3], [1], [2]]
    for spec in ("random:4", "window:4+random:4"):
        assert groups(spec) == groups("window:4:sinks=1", spec) == [[0], [1], [2], [3]]


def test_a_windows_cache_stays_small(model: Model) -> None:
    running = Incremental(model, [sa.Window(4)] * 3, [np.array(PROMPTS[2])])
    running.read()
    before = running.groups[0].caches[0].nbytes
    for token in range(30):
        running.step([token])
    cache = running.groups[0].caches[0]
    assert cache.get_seq_length() == 41 and cache.nbytes == before


def test_threads_and_isa_choose_alike(model: Model, isa: str, threads: int) -> None:
    want, margin = by_prefill(model, PROMPTS[2], 20)
    assert margin > MARGIN and model.generate(PROMPTS[2], 20).tolist() == want


def test_the_known_text() -> None:
    """What llama2.c's own test expects of stories260K, 464 characters."""
    model = Model.from_pretrained(shared_path("models/stories260K"))
    assert model.generate("", max_new_tokens=200) == KNOWN_TEXT and len(KNOWN_TEXT) == 464
    assert "".join(model.stream("", max_new_tokens=200)) == KNOWN_TEXT
    half = model.generate(["", "Once upon a time"], 40, attention="window:512")
    assert KNOWN_TEXT.startswith(half[0]) and half[1] == KNOWN_TEXT[16 : 16 + len(half[1])]


KNOWN_TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. "
    'She said, "I want to play with your ball, but I can\'t find it."\n'
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to "
    'do."\n'
    "Lily didn't want to help her mom, so she"
)


def test_greedy_is_transformers_greedy(model: Model) -> None:
    torch, transformers = requires("torch"), requires("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model.folder).eval()
    for prompt in PROMPTS:
        if by_prefill(model, prompt, 30)[1] < MARGIN:
            continue
        with torch.no_grad():
            ids = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=0
            )
        assert model.generate(prompt, 30).tolist() == ids[0, len(prompt) :].tolist()


# ---- where it ends -------------------------------------------------------------------------------


def test_an_end_token_ends_and_is_not_given(tmp_path: Path, model: Model) -> None:
    long = [model.generate(p, 25).tolist() for p in PROMPTS]
    ends = [long[0][7], long[2][3]]
    config = json.loads((model.folder / "config.json").read_text())
    folder = save_folder(tmp_path, {**config, "eos_token_id": ends})
    (folder / "model.safetensors").write_bytes((model.folder / "model.safetensors").read_bytes())
    short = Model.from_pretrained(folder)
    for prompt, ids in zip(PROMPTS, long, strict=True):
        at = next((i for i, token in enumerate(ids) if token in ends), 25)
        assert short.generate(prompt, 25).tolist() == ids[:at]
    together = short.generate(PROMPTS, 25)
    assert [len(ids) for ids in together] == [len(short.generate(p, 25)) for p in PROMPTS]


def test_the_context_ends(model: Model) -> None:
    """Each prompt at its own place; the last token stands at the last position."""
    together = model.generate(PROMPTS, 1000)
    assert [len(p) + len(ids) for p, ids in zip(PROMPTS, together, strict=True)] == [48] * 4
    assert len(model.generate([1] * 47)) == 1
    with pytest.raises(ArgumentError, match="prompt has 48 tokens, and this model's context of 48"):
        model.generate([1] * 48)


def test_at_most_so_many(model: Model) -> None:
    assert [len(model.generate(PROMPTS[0], n)) for n in (1, 2, 7)] == [1, 2, 7]


# ---- drawing -------------------------------------------------------------------------------------


HOT: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}


def test_a_seed_is_a_text_whatever_runs_beside(model: Model) -> None:
    alone = [model.generate(p, 20, **HOT, seed=3).tolist() for p in PROMPTS]
    assert [x.tolist() for x in model.generate(PROMPTS, 20, **HOT, seed=3)] == alone
    assert [x.tolist() for x in model.generate(PROMPTS[::-1], 20, **HOT, seed=3)] == alone[::-1]
    assert model.generate(PROMPTS[0], 20, **HOT, seed=4).tolist() != alone[0]
    assert model.generate(PROMPTS[0], 9, **HOT, seed=3).tolist() == alone[0][:9]


def test_copies_of_a_prompt_differ(model: Model) -> None:
    copies = model.generate([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]], 20, **HOT)
    assert len({tuple(ids) for ids in copies}) == 4
    assert copies[0].tolist() == model.generate(PROMPTS[0], 20, **HOT).tolist()


def test_without_a_seed_texts_differ(model: Model) -> None:
    assert (
        model.generate(PROMPTS[0], 20, **HOT, seed=None).tolist()
        != model.generate(PROMPTS[0], 20, **HOT, seed=None).tolist()
    )


def test_one_candidate_is_greedy(model: Model) -> None:
    want = model.generate(PROMPTS[2], 20).tolist()
    for how in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 0}, {"temperature": 1e-9}):
        assert model.generate(PROMPTS[2], 20, **{"temperature": 1.0, **how}).tolist() == want
    assert model.generate(PROMPTS[2], 20, temperature=0.0, top_k=5).tolist() == want


# ---- prompts and results -------------------------------------------------------------------------


def test_ids_in_every_form(model: Model) -> None:
    want = model.generate(PROMPTS[0], 5)
    assert isinstance(want, np.ndarray) and want.dtype == np.int64
    for prompt in (np.array(PROMPTS[0], np.uint8), tuple(PROMPTS[0])):
        assert np.array_equal(model.generate(prompt, 5), want)
    many = model.generate(np.array([PROMPTS[0], PROMPTS[3]]), 5)
    assert isinstance(many, list) and np.array_equal(many[0], want)
    assert list(model.stream(PROMPTS[0], 5)) == want.tolist()


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?\n"


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model that reads and writes letters."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models

    config = {**LLAMA_CONFIG, "eos_token_id": 2}
    folder = save_folder(tmp_path_factory.mktemp("letters"), config, llama_weights(config))
    engine = Engine(models.BPE(vocab={c: i + 3 for i, c in enumerate(LETTERS)}, merges=[]))
    engine.decoder = decoders.Fuse()
    engine.save(str(folder / "tokenizer.json"))
    return Model.from_pretrained(folder)


def test_text_in_text_out(writer: Model) -> None:
    ids = writer.tokenizer.encode("once upon")
    want = writer.tokenizer.text(writer.generate(ids, 30).tolist())
    assert want and writer.generate("once upon", 30) == want
    assert writer.generate(["once upon", "a time"], 30)[0] == want
    assert writer.generate(["once upon"], 30) == [want]
    assert "".join(writer.stream("once upon", 30)) == want


def test_an_empty_prompt_begins(writer: Model) -> None:
    assert writer.generate("", 10) == writer.tokenizer.text(writer.generate([1], 10).tolist())


def test_stop_strings_cut_before_them(writer: Model) -> None:
    how = {**HOT, "max_new_tokens": 30, "seed": 1}
    text = writer.generate("once upon", **how)
    stop = text[5:8]
    cut = text[: text.index(stop)]
    assert writer.generate("once upon", **how, stop=stop) == cut
    assert writer.generate("once upon", **how, stop=["no such", stop, text[9:]]) == cut
    assert "".join(writer.stream("once upon", **how, stop=[stop])) == cut
    assert writer.generate("once upon", **how, stop=[text[-2:] + "more"]) == text
    ids = writer.generate(writer.tokenizer.encode("once upon"), **how, stop=stop)
    assert len(ids) < 30 and writer.tokenizer.text(ids.tolist()).endswith(stop)
    other = writer.generate(["once upon", "a time"], **how, stop=stop)
    assert other[0] == cut and stop not in other[1]


def bad_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    value, kind = ArgumentError, DtypeError
    return {
        "count": ({"max_new_tokens": 0}, value, "max_new_tokens is 0: give a number from 1"),
        "half": ({"max_new_tokens": 1.5}, value, "max_new_tokens is 1.5: give an integer"),
        "cold": ({"temperature": -1}, value, "temperature is -1: give 0 or None"),
        "hot": ({"temperature": np.inf}, value, "temperature is inf: give 0 or None"),
        "nan": ({"temperature": np.nan}, value, "temperature is nan: give"),
        "word": ({"temperature": "warm"}, value, "temperature is 'warm': give a number"),
        "k": ({"temperature": 1, "top_k": 0}, value, "top_k is 0: give a number of tokens from 1"),
        "k half": ({"temperature": 1, "top_k": 2.5}, value, "top_k is 2.5: give an integer"),
        "p": ({"temperature": 1, "top_p": 0.0}, value, "top_p is 0: give a share above 0"),
        "p high": ({"temperature": 1, "top_p": 1.5}, value, "top_p is 1.5: give a share above 0"),
        "k alone": ({"top_k": 5}, value, "top_k=5 chooses .* pass temperature=1.0"),
        "p alone": ({"top_p": 0.5}, value, "top_p=0.5 chooses .* pass temperature=1.0"),
        "seed": ({"seed": -1}, value, "seed is -1: give a number from 0"),
        "seed word": ({"seed": "a"}, value, "seed is 'a': give an integer"),
        "spec": ({"attention": "windw:3"}, value, "window"),
        "layer": ({"per_layer": {9: "dense"}}, value, "per_layer names layer 9"),
        "stop": ({"stop": [""]}, value, "stop holds an empty string"),
        "stop kind": ({"stop": 3}, kind, "stop is 3: give a string"),
        "stop kinds": ({"stop": [3]}, kind, "stop holds 3: give strings"),
        "stop bare": ({"stop": "a"}, value, "stop is 'a', but this model has no tokenizer"),
        "text": ({"prompt": "a"}, value, "prompt is a str, but this model has no tokenizer"),
        "bytes": ({"prompt": b"a"}, kind, "prompt is a bytes: give a str"),
        "number": ({"prompt": 3}, kind, "prompt is a int: give a str"),
        "nothing": ({"prompt": []}, value, "prompt is an empty list"),
        "no ids": ({"prompt": [[1], []]}, value, "prompt 1 is empty"),
        "no array": ({"prompt": np.zeros(0, int)}, value, "prompt is empty"),
        "float ids": ({"prompt": [1.0]}, kind, "prompt is float64 of shape"),
        "deep": ({"prompt": [[[1]]]}, kind, "prompt 0 is int64 of shape"),
        "mixed": ({"prompt": ["a", [1]]}, kind, "prompt mixes"),
        "unknown": ({"prompt": [[1], [61]]}, value, "prompt 1 holds token 61: .* 0 to 60"),
        "negative": ({"prompt": [-1]}, value, "prompt holds token -1"),
    }


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize("case", bad_calls())
def test_bad_calls_are_answered_at_once(model: Model, case: str, method: str) -> None:
    arguments, kind, words = bad_calls()[case]
    with pytest.raises(kind, match=words) as raised:
        getattr(model, method)(**{"prompt": [1], **arguments})
    assert "\n" not in str(raised.value)


def test_a_stream_has_one_prompt(model: Model) -> None:
    with pytest.raises(ArgumentError, match="prompt is a list of 2, and a stream has one"):
        model.stream([[1], [2]])


def test_no_beginning_to_start_from(writer: Model, tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "bos_token_id": None}
    folder = save_folder(tmp_path, config)
    model = Model.from_pretrained(folder, random_weights=0, tokenizer=writer.folder)
    with pytest.raises(ArgumentError, match=r"prompt is empty, .* names no beginning"):
        model.generate("")


def test_weights_that_overflow_are_said(tmp_path: Path) -> None:
    weights = llama_weights(LLAMA_CONFIG)
    weights["model.norm.weight"][3] = np.nan
    model = Model.from_pretrained(save_folder(tmp_path, LLAMA_CONFIG, weights))
    with pytest.raises(ArgumentError, match="no token can be chosen: the model overflows"):
        model.generate([1])


# ---- text in pieces ------------------------------------------------------------------------------


def byte_level() -> Tokenizer:
    """One token a byte, as in GPT-2's alphabet, and two that mean nothing in a text."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Engine(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    return Tokenizer(engine, {})


def with_spaces() -> Tokenizer:
    """Words that carry the space before them, and bytes for what they cannot write."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models

    pieces = ["<unk>", "<s>", "▁the", "▁cat", "s", "▁", *(f"<0x{b:02X}>" for b in range(256))]
    vocab = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    engine = Engine(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    engine.add_special_tokens(["<s>"])
    engine.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(engine, {})


def pieces_of(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    pieces = Pieces(tokenizer, prompt)
    return [*(pieces.add(i) for i in ids), pieces.end()]


@given(st.text(max_size=12), st.text(max_size=12))
@example("", "é€😀")
@example("a", "\ufffd")
def test_pieces_are_whole_characters(before: str, text: str) -> None:
    tokenizer = byte_level()
    parts = pieces_of(tokenizer, tokenizer.encode(before), tokenizer.encode(text))
    assert "".join(parts) == text
    assert all(part in text for part in parts)


def test_half_a_character_waits() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a€b")
    assert pieces_of(tokenizer, [], ids) == ["a", "", "", "€", "b", ""]
    broken = [*ids[:3], ids[4]]  # two bytes of three, then a letter
    assert "".join(pieces_of(tokenizer, [], broken)) == "a\ufffdb"
    assert pieces_of(tokenizer, [], ids[:2]) == ["a", "", "\ufffd"]


def test_special_and_unknown_tokens_say_nothing() -> None:
    tokenizer = byte_level()
    a, b = tokenizer.encode("ab")
    begin = tokenizer.token_id("<s>")
    assert pieces_of(tokenizer, [begin], [a, begin, 999, b]) == ["a", "", "", "b", ""]


def test_spaces_before_words() -> None:
    """The decoder takes the first space of a text away; of a continuation it must not."""
    tokenizer = with_spaces()
    the, cat, s = 2, 3, 4
    assert "".join(pieces_of(tokenizer, [1, the], [cat, s])) == " cats"
    assert "".join(pieces_of(tokenizer, [1], [the, cat])) == "the cat"
    euro = [6 + byte for byte in "€".encode()]
    assert pieces_of(tokenizer, [1, the], [*euro, cat]) == ["", "", "€", " cat", ""]


def cut(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    stop = Stops(stops)
    out = []
    for piece in pieces:
        out.append(stop.add(piece))
        if stop.found:
            return out, True
    return [*out, stop.end()], False


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stops_cut_wherever_the_pieces_end(pieces: list[str], stops: list[str]) -> None:
    out, found = cut(pieces, stops)
    shown, text = "".join(out), "".join(pieces)
    ends = [text.find(s) for s in stops if s in text]
    assert found == bool(ends)
    if not found:
        assert shown == text
        return
    read = "".join(pieces[: len(out)])  # what had come when one was whole
    assert shown == read[: min(read.find(s) for s in stops if s in read)]
    assert not any(s in shown for s in stops)


def test_only_what_may_begin_a_stop_string_waits() -> None:
    assert cut(["ab", "c\n", "d", "\n\n"], ["\n\n"]) == (["ab", "c", "\nd", ""], True)
    assert cut(["Us", "e"], ["User:"]) == (["", "", "Use"], False)


def test_pieces_come_as_they_are_decoded(writer: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real: Callable[..., Any] = Incremental.step
    monkeypatch.setattr(
        Incremental, "step", lambda self, tokens: steps.append("step") or real(self, tokens)
    )
    pieces = writer.stream("once", 10)
    assert steps == []
    next(pieces)
    assert len(steps) <= 2
