"""Text, blocks and the scoring of blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import shared_path
from fake_lm import VOCAB, FakeModel, FakeTokenizer, fake_ids
from hypothesis import given
from hypothesis import strategies as st

import sparseattn as sa
from sparseattn.evaluation.perplexity import perplexity
from sparseattn.evaluation.scores import Scorer
from sparseattn.evaluation.text import SEPARATOR, cut_blocks, load_text
from sparseattn.variants import Dense, RandomKeys, TopK, Window

# ---- blocks ------------------------------------------------------------------------------------


@given(st.integers(2, 400), st.integers(2, 64), st.data())
def test_every_token_but_the_first_is_predicted_once(n_tokens, context, data):
    stride = data.draw(st.integers(1, context))
    blocks = cut_blocks(n_tokens, context, stride)
    targets = [t for b in blocks for t in range(b.begin + 1 + b.first, b.end + 1)]
    assert targets == list(range(1, n_tokens))
    assert all(b.end - b.begin <= context for b in blocks)
    assert [b.begin for b in blocks] == [i * stride for i in range(len(blocks))]
    assert blocks[0].first == 0
    assert all(b.targets == stride for b in blocks[1:-1])  # the last S targets of each block


def test_blocks_of_a_ragged_text():
    assert [(b.begin, b.end, b.first) for b in cut_blocks(21, 8, 8)] == [
        (0, 8, 0),
        (8, 16, 0),
        (16, 20, 0),
    ]
    assert [(b.begin, b.end, b.first) for b in cut_blocks(15, 8, 4)] == [
        (0, 8, 0),
        (4, 12, 4),
        (8, 14, 4),
    ]


# ---- text --------------------------------------------------------------------------------------


def test_text_is_a_path_the_text_or_ids(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text\n", encoding="utf-8")
    tokenizer = FakeTokenizer()
    by_path = load_text(path, tokenizer, None)
    assert by_path.name == "a.txt"
    np.testing.assert_array_equal(by_path.ids, load_text(str(path), tokenizer, None).ids)
    literal = load_text("some text\n", tokenizer, None)
    np.testing.assert_array_equal(by_path.ids, literal.ids)
    assert by_path.sha256 == literal.sha256
    np.testing.assert_array_equal(load_text([3, 1, 2], None, 2).ids, [3, 1])


@pytest.mark.parametrize(
    ("content", "words"), [(b"\xff\xfe\x00", "not UTF-8"), (None, "No such file")]
)
def test_unreadable_text_is_a_sentence(tmp_path, content, words):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(sa.FileError, match=words) as error:
        load_text(str(path), FakeTokenizer(), None)
    assert str(path) in str(error.value)


def test_text_needs_a_tokenizer_and_ids_must_be_integers():
    with pytest.raises(sa.ArgumentError, match="no tokenizer"):
        load_text("a text\n", None, None)
    with pytest.raises(sa.ArgumentError, match="token ids"):
        load_text(np.ones((2, 3)), None, None)


def test_only_as_much_of_a_text_is_tokenised_as_is_needed():
    tokenizer = FakeTokenizer()
    text = "abcdefghij\n" * 10_000
    got = load_text(text, tokenizer, 500)
    np.testing.assert_array_equal(got.ids, tokenizer.encode(text)[:500])
    assert max(tokenizer.calls[:-1]) < 5_000
    np.testing.assert_array_equal(load_text(text, tokenizer, None).ids, tokenizer.encode(text))


def test_a_beginning_has_the_ids_of_the_whole():
    """What a real tokenizer makes of a cut text differs only near the cut."""
    model = sa.Model.from_pretrained(shared_path("models/stories260K"))
    text = shared_path("text/wikitext-2-raw/wiki.test.raw").read_text(encoding="utf-8")[:150_000]
    whole = model.tokenizer.encode(text, special=True)
    for count in (100, 5_000, 20_000):
        np.testing.assert_array_equal(load_text(text, model.tokenizer, count).ids, whole[:count])


def test_documents_begin_as_the_model_knows_it():
    text = f"\nab\n{SEPARATOR}\ncd\n{SEPARATOR}"
    tokenizer = FakeTokenizer(begin=True)
    got = load_text(text, tokenizer, None)
    a, b, c, d = tokenizer.encode("abcd")
    np.testing.assert_array_equal(got.ids, [1, a, b, 1, c, d])
    assert got.documents == 2
    own = FakeTokenizer(begin=False, separator=3)  # a piece of its own: left to the tokenizer
    np.testing.assert_array_equal(load_text(text, own, None).ids, own.encode(text))


# ---- scores ------------------------------------------------------------------------------------


def brute_force(model, ids, block, spec):
    """Losses, KL and agreement from whole float64 logits."""

    def logits(attention):
        rows = model.hidden(ids[None, block.begin : block.end], attention)[0]
        x = model.head(rows).astype(np.float64)[block.first :]
        return x - np.logaddexp.reduce(x, axis=1, keepdims=True)

    dense, own = logits("dense"), logits(spec)
    target = ids[block.begin + 1 + block.first : block.end + 1]
    nll = -own[np.arange(len(target)), target]
    kl = (np.exp(dense) * (dense - own)).sum(axis=1)
    return nll, kl, dense.argmax(axis=1) == own.argmax(axis=1)


@pytest.mark.parametrize("spec", [Dense(), Window(5), TopK(3), RandomKeys(4)], ids=str)
@pytest.mark.parametrize("chunk", [1, 7 * VOCAB, 1 << 20])
def test_scores_are_those_of_whole_logits(monkeypatch, spec, chunk):
    monkeypatch.setattr("sparseattn.evaluation.scores.CHUNK", chunk)
    model, ids = FakeModel(), fake_ids(150).astype(np.int32)
    scorer = Scorer(model, ids, 64, Dense())
    for block in cut_blocks(len(ids), 64, 40):
        nll, kl, agree = brute_force(model, ids, block, spec)
        model.largest_head = 0
        score = scorer.block(block, spec)
        tail = np.arange(block.first, block.end - block.begin) >= 48
        assert score.targets == len(nll) == block.targets
        assert score.nll == pytest.approx(nll.sum(), rel=1e-6)
        assert score.tail == tail.sum()
        assert score.nll_tail == pytest.approx(nll[tail].sum(), rel=1e-6)
        assert score.kl == pytest.approx(0 if spec == Dense() else kl.sum(), rel=1e-5, abs=1e-9)
        assert score.agree == (len(nll) if spec == Dense() else agree.sum())
        assert model.largest_head <= max(1, chunk // VOCAB)  # logits of few rows at a time


def test_dense_states_are_computed_once_where_they_fit(monkeypatch):
    model, ids = FakeModel(), fake_ids(150).astype(np.int32)
    blocks = cut_blocks(len(ids), 64, 64)

    def run():
        model.calls.clear()
        scorer = Scorer(model, ids, 64, Dense())
        scores = [scorer.block(b, s) for s in (Dense(), TopK(3), Window(4)) for b in blocks]
        return [(s.nll, s.kl, s.agree, s.sha256) for s in scores]

    kept = run()
    assert model.calls.count("dense") == len(blocks)
    monkeypatch.setattr("sparseattn.evaluation.scores.KEEP", 0)
    assert run() == kept
    assert model.calls.count("dense") == 3 * len(blocks)


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    model = FakeModel()
    model.out[:] = 0
    got = perplexity(model, fake_ids(200), tokens=None, context=32)
    assert got.value == pytest.approx(VOCAB, rel=1e-6)
    assert got.nll.low == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert got.evaluation["predictions"] == 199
    assert "199 predictions in 7 blocks of 32, stride 32" in repr(got)


def test_perplexity_counts_and_stride():
    model, ids = FakeModel(), fake_ids(150)
    for stride in (64, 10):
        got = perplexity(model, ids, "window:5", tokens=None, context=64, stride=stride)
        losses = [
            brute_force(model, ids, block, "window:5")[0] for block in cut_blocks(150, 64, stride)
        ]
        assert got.nll.value == pytest.approx(np.concatenate(losses).mean(), rel=1e-6)
        assert got.evaluation["predictions"] == 149


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 65}, "context must be from 2 to 64, got 65"),
        ({"context": 32, "stride": 33}, "stride must be from 1 to 32, got 33"),
        ({"context": 32, "stride": 0}, "stride must be from 1 to 32, got 0"),
        ({"tokens": 3}, "tokens must be from 66"),
        ({"tokens": 2.5}, "tokens must be an integer"),
        ({"text": [1] * 60}, "text too short: token ids has 60 tokens"),
        ({"text": [1] * 80 + [VOCAB]}, "token id 50"),
        ({"attention": ["dense", "window:4"]}, "one spec here, got 2"),
        ({"attention": "windw:4"}, "window"),
        ({"model": 3}, "model must be a folder"),
        ({"random_weights": 1}, "model folder"),
        ({"seed": -1}, "seed must be"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_wrong_arguments_are_refused_before_any_work(changes, words):
    model = FakeModel()
    arguments = {"model": model, "text": fake_ids(200), "tokens": None, **changes}
    with pytest.raises(sa.SparseAttnError, match=words):
        perplexity(**arguments)
    assert model.calls == []
