"""Model folders from strangers: nothing is run, nothing is allocated before it is believed, and
every wrong entry of a config.json meets a sentence that names it.

What single files may hold is in test_checkpoint.py, test_shards.py and test_tokenizer.py.
"""

from __future__ import annotations

import ast
import json
import math
import pickle
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from tiny_models import GPT2_CONFIG, LLAMA_CONFIG, gpt2_weights, pack, pack_tensors, save_folder

from sparseattn.errors import FileError
from sparseattn.models import Model
from sparseattn.models.checkpoint import MAX_HEADER_BYTES, MAX_TENSORS, show
from sparseattn.models.fields import (
    MAX_CONTEXT,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_LAYERS,
    MAX_VOCAB,
)
from sparseattn.models.model import FAMILIES
from sparseattn.models.shards import INDEX_FILE

CHILD = Path(__file__).with_name("load_child.py")


def load_child(folder: Path, extra: int, **keywords: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(CHILD), str(folder), str(extra), json.dumps(keywords)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# ---- D6: nothing is run -------------------------------------------------------------------------


class Marker:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def plant(folder: Path, marker: Path) -> None:
    """Everything that some loader runs, each of which would create `marker`."""
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()"
    for name in ("evil.py", "modeling.py", "setup.py", "__init__.py", "conftest.py", "numpy.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    pickled = pickle.dumps(Marker(marker))
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "optimizer.pkl"):
        (folder / name).write_bytes(pickled)
    objects = np.array([Marker(marker)], dtype=object)
    np.save(folder / "vocab.npy", objects, allow_pickle=True)
    np.savez(folder / "weights.npz", objects, allow_pickle=True)
    (folder / "evil.pth").write_text(f"import os; open({str(marker)!r}, 'w')\n")


@pytest.mark.promise("D4")
@pytest.mark.promise("D6")
def test_nothing_of_a_folder_is_run(tmp_path: Path) -> None:
    """With code, templates and pickles of every kind around honest weights: the model loads, and
    neither they nor anything forbidden is touched on the way."""
    marker = tmp_path / "marker"
    evil = {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "trust_remote_code": True,
        "custom_pipelines": {"text-generation": {"impl": "evil.Pipeline"}},
        "chat_template": "{{ raise_exception('rendered') }}",
        "torch_dtype": "__import__('evil')",
        "_name_or_path": "../../evil",
        "transformers_version": "4.0; import evil",
    }
    config = GPT2_CONFIG | evil
    folder = save_folder(tmp_path / "model", config, gpt2_weights(config))
    plant(folder, marker)
    (folder / "tokenizer_config.json").write_text(json.dumps(evil | {"tokenizer_class": "Evil"}))
    (folder / "generation_config.json").write_text(json.dumps(evil))
    result = load_child(folder, 2**28)
    assert "fingerprint" in result, result
    assert not marker.exists() and result["seen"] == []
    read = {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
    assert set(result["opened"]) <= read, result["opened"]


@pytest.mark.promise("D6")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.PTH", "last.ckpt"])
def test_pickled_weights_are_refused_unread(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = save_folder(tmp_path / "model", LLAMA_CONFIG)
    (folder / name).write_bytes(pickle.dumps(Marker(marker)))
    result = load_child(folder, 2**28)
    assert result["error"] == "FileError" and f"{name} is a pickle" in result["message"]
    assert not marker.exists() and result["seen"] == [] and name not in result["opened"]


@pytest.mark.promise("D6")
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        INDEX_FILE,
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ],
)
def test_a_pickle_under_another_name(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = save_folder(tmp_path / "model", GPT2_CONFIG, gpt2_weights(GPT2_CONFIG))
    if name == INDEX_FILE:
        (folder / "model.safetensors").unlink()
    (folder / "merges.txt").write_text("")
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / name).write_bytes(pickle.dumps(Marker(marker)))
    with pytest.raises(FileError):
        Model.from_pretrained(folder)
    assert not marker.exists()


def is_copy(call: ast.Call) -> bool:
    """pickle.loads(pickle.dumps(x, ...)): of an object in hand, and never of a file."""
    inner = call.args[0] if call.args else None
    return (
        ast.unparse(call.func) == "pickle.loads"
        and isinstance(inner, ast.Call)
        and ast.unparse(inner.func) == "pickle.dumps"
    )


UNPICKLERS = ("load", "loads", "Unpickler", "read_pickle")
RUNNERS = ("eval", "exec", "compile", "__import__")
MODULES = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")


def unpicklings(tree: ast.AST, runners: Sequence[str] = RUNNERS) -> list[str]:
    """Calls and imports of a module that could read a pickle, or run text."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(ast.unparse(node))
        if not isinstance(node, ast.Call):
            continue
        called, text = ast.unparse(node.func), ast.unparse(node)
        owner, _, name = called.rpartition(".")
        if name in UNPICKLERS and owner in (*MODULES, "torch", "np", "numpy", "pd"):
            if owner in ("np", "numpy") and "allow_pickle=False" in text:
                continue
            if not is_copy(node):
                found.append(text)
        if called in runners or "allow_pickle=True" in text:
            found.append(text)
        if "trust_remote_code=True" in text or "weights_only" in text:
            found.append(text)
    return found


@pytest.mark.promise("D6")
def test_the_package_never_unpickles() -> None:
    files = [p for p in (ROOT / "sparseattn").rglob("*.py") if p.name != "train_tiny.py"]
    assert len(files) > 50  # that script stands beside the asset, and is not in the wheel
    for path in files:  # the contract checker reads back the repr that it has just made
        runners = () if path.name.startswith("testing") else RUNNERS
        assert unpicklings(ast.parse(path.read_text()), runners) == [], path


@pytest.mark.promise("D6")
def test_the_check_for_unpickling_finds_it() -> None:
    for text in (
        "from pickle import loads",
        "pickle.load(f)",
        "pickle.loads(data)",
        "pickle.Unpickler(f)",
        "torch.load(f)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "pd.read_pickle(f)",
        "eval(x)",
        "M.from_pretrained(f, trust_remote_code=True)",
    ):
        assert unpicklings(ast.parse(text)), text
    assert not unpicklings(ast.parse("pickle.loads(pickle.dumps(x, 2))"))
    assert not unpicklings(ast.parse("np.load(f, allow_pickle=False)"))


# ---- D4: config.json, family by family and entry by entry ---------------------------------------

SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
INTEGERS = {
    "gpt2": {
        "n_embd": MAX_HIDDEN,
        "n_head": MAX_HEADS,
        "n_layer": MAX_LAYERS,
        "n_inner": 8 * MAX_HIDDEN,
        "n_positions": MAX_CONTEXT,
        "vocab_size": MAX_VOCAB,
    },
    "distilbert": {
        "dim": MAX_HIDDEN,
        "n_heads": MAX_HEADS,
        "n_layers": MAX_LAYERS,
        "hidden_dim": 8 * MAX_HIDDEN,
        "max_position_embeddings": MAX_CONTEXT,
        "vocab_size": MAX_VOCAB,
    },
}
USUAL = dict(zip(SIZES, (MAX_HIDDEN, MAX_HEADS, MAX_LAYERS, 8 * MAX_HIDDEN), strict=True))
USUAL |= {"max_position_embeddings": MAX_CONTEXT, "vocab_size": MAX_VOCAB}
NUMBERS = {"gpt2": ["layer_norm_epsilon", "initializer_range"], "distilbert": ["initializer_range"]}
FLAGS = {"gpt2": ["scale_attn_weights", "add_cross_attention"]}
WORDS = {"gpt2": "activation_function", "distilbert": "activation"}
NOT_INTEGERS: list[Any] = [
    1.5,
    3.0,
    1e400,
    math.nan,
    "3",
    "",
    True,
    False,
    [3],
    {},
    {"a": 1},
    [[[]]],
]
NOT_NUMBERS: list[Any] = [0, -1, 2.0, math.nan, math.inf, -math.inf, "1e-5", True, [1e-5], {}]
NOT_FLAGS: list[Any] = [0, 1, 1.0, "true", "", [], {}, [True], math.nan]
NOT_WORDS: list[Any] = [
    "",
    "gelu_neu",
    "os.system",
    "eval",
    "a" * 10_000,
    3,
    True,
    [],
    ["gelu"],
    {},
]


def hostile_entries(family: str) -> list[tuple[str, Any, str]]:
    """(entry, value, what the error says to give)."""
    cases: list[tuple[str, Any, str]] = []
    for name, high in INTEGERS.get(family, USUAL).items():
        values = [0, -1, -(2**63), high + 1, 2**31, 2**63, 2**64, 10**300, *NOT_INTEGERS]
        cases += [(name, value, "give an integer from ") for value in values]
    eps = (
        "layer_norm_eps"
        if family in ("gpt_neox", "bert", "roberta", "xlm-roberta")
        else "rms_norm_eps"
    )
    for name in NUMBERS.get(family, [eps, "initializer_range"]):
        cases += [(name, value, "give a number above 0 and at most 1") for value in NOT_NUMBERS]
    for name in FLAGS.get(family, ["tie_word_embeddings"]):
        cases += [(name, value, "give true or false") for value in NOT_FLAGS]
    word = WORDS.get(family, "hidden_act")
    cases += [(word, value, "known are ") for value in NOT_WORDS]
    return cases


@pytest.mark.promise("D4")
@pytest.mark.parametrize("family", FAMILIES)
def test_hostile_entries(family: str, tmp_path: Path) -> None:
    """Over 140 a family: one sentence, which names entry, value and remedy, and no weights."""
    cases = hostile_entries(family)
    assert len(cases) > 140
    for name, value, remedy in cases:
        folder = save_folder(tmp_path, {"model_type": family, name: value})
        message, seconds, peak = refusal(lambda: Model.from_pretrained(folder))  # noqa: B023
        assert message.startswith(f"config.json: {name} is {show(value)}: {remedy}"), (name, value)
        assert peak < 10e6 and seconds < 1


def refusal(load: Callable[[], Any]) -> tuple[str, float, int]:
    """What an error says; its processor seconds and its peak bytes."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(FileError) as caught:
            load()
        seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and message.isascii()
    return message, seconds, peak


ROPE_NONSENSE: list[Any] = [
    "linear",
    3,
    True,
    [],
    [{"type": "linear"}],
    {"type": "magic", "factor": 2.0},
    {"type": None, "rope_type": 5},
    {"rope_type": ["linear"]},
    {"rope_type": {"a": 1}},
    {"type": "linear"},
    {"type": "linear", "factor": 0},
    {"type": "linear", "factor": -1.0},
    {"type": "linear", "factor": math.nan},
    {"type": "linear", "factor": math.inf},
    {"type": "linear", "factor": "2"},
    {"type": "linear", "factor": True},
    {"type": "linear", "factor": 10**400},
    {"type": "dynamic", "factor": []},
    {"rope_type": "yarn", "factor": {}},
    {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": "x"},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": -1.0},
    {"rope_type": "default", "rope_theta": "x"},
    {"rope_type": "default", "rope_theta": 0},
    {"rope_theta": math.nan},
]


@pytest.mark.promise("D4")
@pytest.mark.parametrize(
    "family", [f for f in ("llama", "mistral", "qwen2", "qwen3") if f in FAMILIES]
)
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_nonsense_about_positions(section: str, family: str, tmp_path: Path) -> None:
    for value in ROPE_NONSENSE:
        folder = save_folder(tmp_path, {"model_type": family, section: value})
        message, _, peak = refusal(lambda: Model.from_pretrained(folder))  # noqa: B023
        assert message.startswith("config.json: ") and "rope" in message, (value, message)
        assert peak < 10e6


# ---- limits in bytes ----------------------------------------------------------------------------


def wide_header() -> bytes:
    """As many tensors, axes and bytes as a header may have; its last entry is wrong."""
    entry = b'"%07x":{"dtype":"U8","shape":[0,1,1,1,1,1,1,1],"data_offsets":[0,0]},'
    raw = b"{" + b"".join(entry % i for i in range(MAX_TENSORS - 1))
    return pack(raw + b'"x":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}')


def wide_map() -> bytes:
    """An index that is as large as one may be, of one file that does not exist."""
    return json.dumps(
        {"weight_map": {f"{i:0300}": "x.safetensors" for i in range(MAX_TENSORS)}}
    ).encode()


def dense_config() -> bytes:
    return b'{"model_type":"gpt2","a":{' + b",".join(b'"%x":0' % i for i in range(49_000)) + b"}}"


def dense_tokenizer() -> bytes:
    vocab = ",".join(f'"{i:x}":{i}' for i in range(2**20))
    return f'{{"model":{{"type":"BPE","vocab":{{{vocab}}},"merges":[{"[]," * 2**20}0]}}}}'.encode()


LARGE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "header": ("model.safetensors", wide_header, "tensor 'x' has data_offsets [1, 0]"),
    "blank_header": (
        "model.safetensors",
        lambda: pack(b"{" + b" " * (MAX_HEADER_BYTES - 2) + b"]"),
        "is not valid JSON",
    ),
    "index": (INDEX_FILE, wide_map, "x.safetensors' is missing"),
    "config": ("config.json", dense_config, "has no model.safetensors"),
    "tokenizer": ("tokenizer.json", dense_tokenizer, "tokenizer.json"),
}


@pytest.mark.promise("D2")
@pytest.mark.parametrize(
    "case",
    ["header", *(pytest.param(c, marks=pytest.mark.nightly) for c in LARGE if c != "header")],
)
def test_large_files_within_three_times_their_size(case: str, tmp_path: Path) -> None:
    """Files at their limits, of the shapes that parsing blows up most."""
    name, make, sentence = LARGE[case]
    with_weights = name == "tokenizer.json"
    folder = save_folder(tmp_path, GPT2_CONFIG, gpt2_weights(GPT2_CONFIG) if with_weights else None)
    (folder / name).write_bytes(make())
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    result = load_child(folder, 3 * on_disk + 2**28)
    assert result.get("error") == "FileError" and sentence in result["message"], result


@pytest.mark.promise("D2")
@pytest.mark.parametrize("dtype", [pytest.param("F32", marks=pytest.mark.nightly), "BF16"])
@pytest.mark.parametrize("keywords", [{"mmap": False}, {"dtype": "float32"}, {}], ids=str)
def test_a_model_within_three_times_its_size(
    dtype: str, keywords: dict[str, Any], tmp_path: Path
) -> None:
    config = GPT2_CONFIG | {"vocab_size": 700_000}  # 64 MiB of float32
    folder = save_folder(tmp_path, config, gpt2_weights(config), dtype)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 30 * 2**20
    result = load_child(folder, 3 * size, **keywords)  # without the 256 MiB that the promise adds
    assert "fingerprint" in result, result


@pytest.mark.promise("D2")
def test_bfloat16_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    folder = save_folder(tmp_path, GPT2_CONFIG, gpt2_weights(GPT2_CONFIG), "BF16")
    assert Model.from_pretrained(folder)([1, 2]).shape == (2, 61)


@pytest.mark.promise("D2")
@pytest.mark.nightly
def test_every_refusal_is_quick(tmp_path: Path) -> None:
    """The tables again by the clock: 100 ms each at the fastest of five."""
    from test_checkpoint import HOSTILE

    from sparseattn.models.checkpoint import Checkpoint

    path = tmp_path / "model.safetensors"
    for case, (data, _) in HOSTILE.items():
        path.write_bytes(data)
        times = []
        for _ in range(5):
            begin = time.process_time()
            with pytest.raises(FileError):
                Checkpoint(path)
            times.append(time.process_time() - begin)
        assert min(times) < 0.1, case


def test_a_folder_is_loaded_twice_from_the_same_bytes(tmp_path: Path) -> None:
    """The child's fingerprint is ours: what the limits let through is the model itself."""
    folder = save_folder(tmp_path, GPT2_CONFIG, pack_tensors(gpt2_weights(GPT2_CONFIG)))
    assert load_child(folder, 2**28)["fingerprint"] == Model.from_pretrained(folder).fingerprint


UNITS = {"": 1, "MiB": 2**20, "Mi": 2**20}


def test_limits_are_those_of_the_readme() -> None:
    """Every limit of the table is a constant of that value, and every limit on files is in it."""
    from sparseattn.models import checkpoint, fields, shards, tokenizer

    constants: dict[str, int] = {}
    for module in (checkpoint, fields, shards, tokenizer):
        constants |= {n: v for n, v in vars(module).items() if n.startswith("MAX_")}
    documented: dict[str, int] = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith("| `MAX_"):
            names, values = (cell.strip() for cell in line.split("|")[1:3])
            for name, value in zip(names.split(", "), values.split(", "), strict=True):
                number, _, unit = value.partition(" ")
                documented[name.strip("`")] = int(number.replace(",", "")) * UNITS[unit]
    inner = {"MAX_OFFSET", "MAX_WORD"}  # of the format, and of WordPiece itself
    assert documented == {name: value for name, value in constants.items() if name not in inner}
