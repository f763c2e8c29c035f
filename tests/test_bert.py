"""The BERT family: logits, states and embeddings against float64 NumPy and transformers."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import requires
from reference import bert as reference
from tiny_models import draw, rounded, save_folder

import sparseattn as sa
from sparseattn.errors import ArgumentError, FileError
from sparseattn.models import Model

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")

TOLERANCE = 2e-5  # of logits, float32; with logits of order one

BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
    "type_vocab_size": 2,
    "vocab_size": 61,
    "architectures": ["BertForMaskedLM"],
}
ROBERTA = BERT | {
    "model_type": "roberta",
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "architectures": ["RobertaForMaskedLM"],
}
DISTILBERT: dict[str, Any] = {
    "model_type": "distilbert",
    "dim": 24,
    "n_heads": 3,
    "n_layers": 2,
    "hidden_dim": 40,
    "max_position_embeddings": 48,
    "vocab_size": 61,
    "architectures": ["DistilBertForMaskedLM"],
}
CONFIGS = {c["model_type"]: c for c in (BERT, ROBERTA, DISTILBERT)}
HEADS = ("masked_lm", "classifier")
LABELS = {"0": "no", "1": "perhaps", "2": "yes"}

Weights = dict[str, np.ndarray]


def body(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes below the prefix."""
    small = config["model_type"] == "distilbert"
    names = "distilbert" if small else "bert"
    wide, inner = (24, 40)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], wide),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], wide),
    }
    if not small:
        shapes["embeddings.token_type_embeddings.weight"] = (config["type_vocab_size"], wide)
    norms, linears = ["embeddings.LayerNorm"], []
    for i in range(config["n_layers" if small else "num_hidden_layers"]):
        at = reference.LAYER[names].format(i)
        q, k, v, out, norm1, up, down, norm2 = (at + part for part in reference.PARTS[names])
        norms += [norm1, norm2]
        linears += [(x, wide, wide) for x in (q, k, v, out)]
        linears += [(up, wide, inner), (down, inner, wide)]
    return shapes | layers(norms, linears)


def layers(norms: Any, linears: Any) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (24,)
    for name, n_in, n_out in linears:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in), (n_out,)
    return shapes


def head(config: dict[str, Any], kind: str) -> dict[str, tuple[int, ...]]:
    vocab, family = config["vocab_size"], config["model_type"]
    if kind == "classifier":
        dense, out = {
            "bert": ("bert.pooler.dense", "classifier"),
            "roberta": ("classifier.dense", "classifier.out_proj"),
            "distilbert": ("pre_classifier", "classifier"),
        }[family]
        return layers([], [(dense, 24, 24), (out, 24, 3)])
    dense, norm, bias = {
        "bert": (
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.bias",
        ),
        "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
        "distilbert": ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
    }[family]
    return layers([norm], [(dense, 24, 24)]) | {bias: (vocab,)}


def make(config: dict[str, Any], kind: str = "masked_lm") -> Weights:
    """A checkpoint's tensors as transformers names them."""
    shapes = {f"{config['model_type']}.{name}": shape for name, shape in body(config).items()}
    weights = draw(shapes | ({} if kind == "none" else head(config, kind)))
    for name in weights:
        if "LayerNorm.weight" in name:
            weights[name] += 1
    return weights


def asked(config: dict[str, Any], kind: str) -> dict[str, Any]:
    return config | ({"id2label": LABELS} if kind == "classifier" else {})


def tokens(batch: int = 2, length: int = 33) -> np.ndarray:
    return np.random.default_rng(7).integers(2, 61, (batch, length))


def paddings(batch: int, length: int) -> dict[str, np.ndarray]:
    """Masks of unequal rows, padded on either side."""
    counts = np.array([length - 1 - 7 * i % length for i in range(batch)])[:, None]
    right = np.arange(length) < counts
    return {"right": right, "left": right[:, ::-1].copy()}


def run(
    config: dict[str, Any], weights: Weights, kind: str, ids: np.ndarray, **more: Any
) -> np.ndarray:
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    x = reference.states(config, wide, ids, **more)
    if kind == "none":
        return x
    return (reference.masked_lm if kind == "masked_lm" else reference.classify)(config, wide, x)


# ---- logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_match_reference(family: str, kind: str, tmp_path: Path) -> None:
    config = asked(CONFIGS[family], kind)
    weights = make(config, kind)
    model = Model.from_pretrained(save_folder(tmp_path, config, weights))
    ids = tokens()
    want = np.stack([run(config, weights, kind, row) for row in ids])
    got = model(ids)
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(model(ids[0]), want[0], rtol=TOLERANCE, atol=TOLERANCE)
    assert model.config.head == kind and not model.config.causal
    assert model.config.labels == (tuple(LABELS.values()) if kind == "classifier" else ())


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},
        {"layer_norm_eps": 0.1},
        {"num_attention_heads": 1, "num_hidden_layers": 1},
        {"type_vocab_size": 1},
    ],
    ids=str,
)
def test_switches(changes: dict[str, Any], tmp_path: Path) -> None:
    config = BERT | changes
    weights = make(config)
    model = Model.from_pretrained(save_folder(tmp_path, config, weights))
    ids = tokens(1)
    want = run(config, weights, "masked_lm", ids[0])
    assert np.abs(want - run(BERT, make(BERT), "masked_lm", ids[0])).max() > 10 * TOLERANCE
    np.testing.assert_allclose(model(ids)[0], want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_stored_types(dtype: str, tmp_path: Path) -> None:
    weights = make(BERT)
    model = Model.from_pretrained(save_folder(tmp_path, BERT, weights, dtype))
    ids = tokens(1)
    want = run(BERT, rounded(weights, dtype), "masked_lm", ids[0])
    np.testing.assert_allclose(model(ids)[0], want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", CONFIGS)
def test_padding_and_token_types(family: str, side: str, tmp_path: Path) -> None:
    config = CONFIGS[family]
    weights = make(config)
    model = Model.from_pretrained(save_folder(tmp_path, config, weights))
    ids = tokens(3)
    mask = paddings(*ids.shape)[side]
    types = (ids % 2 if config.get("type_vocab_size") == 2 else None)  # fmt: skip
    got = model(ids, key_mask=mask, token_types=types)
    for i, row in enumerate(ids):
        kinds = None if types is None else types[i]
        want = run(config, weights, "masked_lm", row, mask=mask[i], types=kinds)[mask[i]]
        np.testing.assert_allclose(got[i][mask[i]], want, rtol=TOLERANCE, atol=TOLERANCE)
    if types is not None:
        assert np.abs(got - model(ids, key_mask=mask)).max() > 0.1


@pytest.mark.parametrize("spec", ["dense", "topk:4", "window:window_size=3/2", "random:5"])
@pytest.mark.parametrize("family", CONFIGS)
def test_padding_changes_no_bit(family: str, spec: str, tmp_path: Path) -> None:
    model = Model.from_pretrained(save_folder(tmp_path, CONFIGS[family], make(CONFIGS[family])))
    ids = tokens(3)
    for mask in paddings(*ids.shape).values():
        other = np.where(mask, ids, 60 - ids // 2)
        a, b = (model(x, attention=spec, key_mask=mask) for x in (ids, other))
        np.testing.assert_array_equal(a[mask], b[mask])
        assert np.isfinite(a).all() and (a[~mask] != b[~mask]).any()


def test_rows_of_different_lengths_are_padded(tmp_path: Path) -> None:
    model = Model.from_pretrained(save_folder(tmp_path, BERT, make(BERT)))
    rows = [tokens(1, n)[0].tolist() for n in (5, 33, 1)]
    types = [[t % 2 for t in row] for row in rows]
    got = model(rows, token_types=types)
    assert got.shape == (3, 33, 61)
    for row, kinds, logits in zip(rows, types, got, strict=True):
        want = model(row, token_types=kinds)
        np.testing.assert_allclose(logits[: len(row)], want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("spec", ["window:window_size=3/2", "topk:4", "random:5"])
def test_any_spec_of_both_directions(spec: str, tmp_path: Path) -> None:
    """What the plan shows is what the reference attends to."""
    weights = make(BERT)
    model = Model.from_pretrained(save_folder(tmp_path, BERT, weights))
    ids = tokens(1)
    plans: dict[int, sa.Plan] = {}
    got = model.hidden(ids, spec, on_attend=plans.__setitem__)
    assert sorted(plans) == [0, 1, 2]
    kept = [plan.to_mask()[0] for plan in plans.values()]
    ahead = np.triu(np.ones(kept[0].shape[-2:], bool), 1)
    assert all((mask & ahead).any() for mask in kept)
    if spec.startswith("window"):
        want = run(BERT, weights, "none", ids[0], keep=kept[0][0])
        np.testing.assert_allclose(got[0], want, rtol=TOLERANCE, atol=TOLERANCE)


# ---- names in use ------------------------------------------------------------------------------


def test_names_and_layouts_in_use(tmp_path: Path) -> None:
    """Without prefix, norms by their old names, heads nobody reads, a bias under two names."""
    good = make(BERT)
    bias = good["cls.predictions.bias"]
    embed = good["bert.embeddings.word_embeddings.weight"]
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        if "cls" not in n else n: v
        for n, v in good.items()
    }  # fmt: skip
    more = layers([], [("bert.pooler.dense", 24, 24), ("cls.seq_relationship", 24, 2)])
    extra = {n: np.ones(s, np.float32) for n, s in more.items()}
    extra["bert.embeddings.position_ids"] = np.arange(48.0)[None]
    moved = {n: v for n, v in good.items() if n != "cls.predictions.bias"}
    ids = tokens(1)
    want = Model.from_pretrained(save_folder(tmp_path / "good", BERT, good))(ids)
    for number, weights in enumerate(
        (
            {n.removeprefix("bert."): v for n, v in good.items()},
            old,
            good | extra,
            good | {"cls.predictions.decoder.bias": bias + 1},
            moved | {"cls.predictions.decoder.bias": bias},
            good | {"cls.predictions.decoder.weight": embed},
        )
    ):
        model = Model.from_pretrained(save_folder(tmp_path / str(number), BERT, weights))
        np.testing.assert_array_equal(model(ids), want)
    untied = good | {
        "cls.predictions.decoder.weight": embed[::-1],
        "cls.predictions.decoder.bias": bias[::-1],
    }
    config = BERT | {"tie_word_embeddings": False}
    model = Model.from_pretrained(save_folder(tmp_path / "untied", config, untied))
    np.testing.assert_allclose(model(ids), want[..., ::-1], rtol=TOLERANCE, atol=TOLERANCE)


def test_the_head_is_what_the_file_holds(tmp_path: Path) -> None:
    for kind in (*HEADS, "none"):
        folder = save_folder(tmp_path / kind, BERT | {"id2label": LABELS}, make(BERT, kind))
        model = Model.from_pretrained(folder)
        assert model.config.head == kind
        drawn = Model.from_pretrained(folder, random_weights=0)
        assert drawn.config.head == "masked_lm"  # what config.json says
    with pytest.raises(ArgumentError, match=r"no head that gives logits: call model\.hidden"):
        model([1, 2])
    with pytest.raises(ArgumentError, match="no head"):
        model.head(np.zeros((1, 24), np.float32))
    for name, want in (("BertModel", "none"), ("BertForSequenceClassification", "classifier")):
        folder = save_folder(tmp_path / name, BERT | {"architectures": [name]})
        model = Model.from_pretrained(folder, random_weights=0)
        assert model.config.head == want
        assert model.hidden([1, 2, 3]).shape == (3, 24)
    assert model([[1, 2, 3]]).shape == (1, 2)


# ---- transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*HEADS, "none"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_object_and_use(family: str, kind: str, tmp_path: Path) -> None:
    """A model of transformers is taken over as it stands, and both attend alike by any spec."""
    torch = requires("torch")
    theirs = theirs_of(family, kind, "float32", tmp_path)
    model = Model.from_pretrained(theirs)
    assert model.config.head == kind
    ids = tokens()
    with sa.use(model, "topk:4"), sa.use(theirs, "topk:4"), torch.no_grad():
        found = theirs(torch.from_numpy(ids))
        want = (found.last_hidden_state if kind == "none" else found.logits).numpy()
        got = (model.hidden if kind == "none" else model)(ids)
    assert np.abs(got - want).max() <= TOLERANCE


def theirs_of(family: str, kind: str, dtype: str, folder: Path) -> Any:
    """A random model of transformers, saved in `dtype`, and read back in float32."""
    torch, transformers = requires("torch"), requires("transformers")
    torch.manual_seed(0)
    name = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}[family]
    known = {k: v for k, v in CONFIGS[family].items() if k not in ("model_type", "architectures")}
    ends = {"masked_lm": "ForMaskedLM", "classifier": "ForSequenceClassification", "none": "Model"}
    cls = getattr(transformers, name + ends[kind])
    more = {"num_labels": 3} if kind == "classifier" else {}
    theirs = cls(getattr(transformers, name + "Config")(**known, **more)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    theirs.to(getattr(torch, dtype)).save_pretrained(folder)
    return cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.promise("A3")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [*HEADS, "none"])
@pytest.mark.parametrize("family", CONFIGS)
def test_matches_transformers(family: str, kind: str, dtype: str, tmp_path: Path) -> None:
    torch = requires("torch")
    theirs = theirs_of(family, kind, dtype, tmp_path)
    model = Model.from_pretrained(tmp_path)
    given = tokens(3)
    masks = {"none": np.ones(given.shape, bool)} | paddings(*given.shape)
    for mask in masks.values():
        ids = np.where(mask, given, CONFIGS[family].get("pad_token_id", 0))
        more, kinds = {}, None
        if CONFIGS[family].get("type_vocab_size") == 2:
            kinds = np.arange(ids.size).reshape(ids.shape) // 9 % 2
            more["token_type_ids"] = torch.from_numpy(kinds)
        with torch.no_grad():
            found = theirs(
                input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **more
            )
        want = (found.last_hidden_state if kind == "none" else found.logits).numpy()
        call = model.hidden if kind == "none" else model
        got = call(ids, key_mask=mask, token_types=kinds)
        assert got.shape == want.shape
        there = np.ones(len(ids), bool) if kind == "classifier" else mask
        assert np.abs(want[there]).max() > 0.5
        assert np.abs(got - want)[there].max() <= TOLERANCE


def test_xlm_roberta_is_roberta_by_another_name(tmp_path: Path) -> None:
    weights = make(ROBERTA)
    same = save_folder(tmp_path / "a", ROBERTA, weights)
    other = save_folder(tmp_path / "b", ROBERTA | {"model_type": "xlm-roberta"}, weights)
    a, b = map(Model.from_pretrained, (same, other))
    assert a.config.context == b.config.context == 46  # two of the 48 belong to padding
    np.testing.assert_array_equal(a(tokens()), b(tokens()))
    with pytest.raises(ArgumentError, match="tokens has length 47, but this model has 46 positio"):
        b([2] * 47)


@pytest.mark.nightly
def test_the_conversion_command_keeps_a_model_without_head(tmp_path: Path) -> None:
    """What the refusal of a pickle says to type adds no random head to a sentence encoder."""
    torch = requires("torch")
    theirs_of("bert", "none", "float32", tmp_path / "model")
    theirs = Model.from_pretrained(tmp_path / "model")
    weights = {k: torch.from_numpy(v.copy()) for k, v in theirs._values.items()}
    (tmp_path / "model/model.safetensors").unlink()
    torch.save(weights, tmp_path / "model/pytorch_model.bin")
    with pytest.raises(FileError) as caught:
        Model.from_pretrained(tmp_path / "model")
    words = shlex.split(str(caught.value).split(" with ")[1])
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    model = Model.from_pretrained(f"{tmp_path / 'model'}-safetensors")
    assert model.config.head == "none"
    np.testing.assert_array_equal(model.hidden([5, 6]), theirs.hidden([5, 6]))


# ---- hostile configurations ----------------------------------------------------------------------

HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 25}, "hidden_size is 25: give a multiple of num_attention_heads, which is 3"),
    ({"hidden_size": 2**31}, "hidden_size is 2147483648: give an integer from 1 to 131072"),
    ({"vocab_size": True}, "vocab_size is True: give an integer"),
    ({"vocab_size": 62}, "where config.json makes it [62, 24]"),
    ({"type_vocab_size": 0}, "type_vocab_size is 0: give an integer from 1 to 1024"),
    ({"type_vocab_size": 3}, "token_type_embeddings.weight' has shape [2, 24] where config.json"),
    ({"layer_norm_eps": -1.0}, "layer_norm_eps is -1.0: give a number above 0"),
    ({"layer_norm_eps": "nan"}, "layer_norm_eps is 'nan': give a number above 0"),
    ({"hidden_act": "exp"}, "hidden_act is 'exp': known are"),
    ({"is_decoder": True}, "is_decoder is true: give an encoder, which attends both ways"),
    ({"add_cross_attention": True}, "add_cross_attention is true: give an encoder"),
    ({"position_embedding_type": "relative_key"}, "is 'relative_key': known are absolute"),
    (
        {"num_hidden_layers": 4},
        "tensor 'bert.encoder.layer.3.attention.output.LayerNorm.weight' of a bert model is",
    ),
    ({"num_hidden_layers": 2}, "has no place in a bert model of this config.json"),
    ({"id2label": [1, 2]}, "id2label is [1, 2]: give an object or null"),
    ({"id2label": {"1": "a"}}, "id2label is not text by the numbers 0 to 0: correct it"),
    ({"id2label": {"0": 5}}, "id2label is not text by the numbers 0 to 0: correct it"),
    ({"num_labels": 0}, "num_labels is 0: give an integer from 1 to 65536"),
    (ROBERTA | {"max_position_embeddings": 2}, "max_position_embeddings is 2: give more than the"),
    (ROBERTA | {"pad_token_id": -1}, "pad_token_id is -1: give an integer from 0"),
    (DISTILBERT | {"n_heads": 5}, "dim is 24: give a multiple of n_heads, which is 5"),
]


@pytest.mark.promise("D4")
@pytest.mark.parametrize(("changes", "sentence"), HOSTILE, ids=[s[:40] for _, s in HOSTILE])
def test_hostile_config(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        Model.from_pretrained(save_folder(tmp_path, BERT | changes, make(BERT)))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.promise("D4")
def test_hostile_heads(tmp_path: Path) -> None:
    """A head of which a part is missing, of another size, or that no model here has."""
    good = make(BERT, "classifier")
    cases = {
        "tensor 'pooler.dense.bias' of a bert model is missing": {"bert.pooler.dense.bias": None},
        "'classifier.weight' has shape [4, 24] where config.json makes it [3, 24]": {
            "classifier.weight": np.zeros((4, 24), np.float32)
        },
        "tensor 'qa_outputs.weight' has no place in a bert model": {
            "qa_outputs.weight": np.zeros((2, 24), np.float32)
        },
    }
    for number, (sentence, changes) in enumerate(cases.items()):
        weights = {n: v for n, v in (good | changes).items() if v is not None}
        folder = save_folder(tmp_path / str(number), asked(BERT, "classifier"), weights)
        with pytest.raises(FileError) as caught:
            Model.from_pretrained(folder)
        assert sentence in str(caught.value)
