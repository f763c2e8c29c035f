"""Sharded checkpoints equal one file; an index can neither lie nor leave its folder."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import requires
from tiny_models import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    gpt2_weights,
    llama_weights,
    pack,
    pack_tensors,
    save_folder,
)

from sparseattn.errors import FileError
from sparseattn.models import Model, shards
from sparseattn.models.checkpoint import MAX_TENSORS, Checkpoint
from sparseattn.models.shards import INDEX_FILE, MAX_INDEX_BYTES, MAX_SHARDS, Shards

TENSORS = {
    "a": np.arange(6.0).reshape(2, 3),
    "b": np.ones(4),
    "c": np.zeros((1, 0)),
    "d": np.full((2, 2), 7.0),
}
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MAP = {"a": ONE, "b": TWO, "c": TWO, "d": ONE}


def write_index(folder: Path, index: Any) -> Path:
    path = folder / INDEX_FILE
    path.write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    return path


def write_shards(
    folder: Path,
    files: Mapping[str, str],
    tensors: Mapping[str, np.ndarray],
    dtype: str = "F32",
) -> Path:
    """Honest files as a map says, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in set(files.values()):
        data = pack_tensors({n: tensors[n] for n, f in files.items() if f == file}, dtype)
        (folder / file).write_bytes(data)
    return write_index(folder, {"metadata": {"total_size": 1}, "weight_map": files})


def refusal(path: Path) -> str:
    with pytest.raises(FileError) as caught:
        Shards(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and message.isascii()
    return message


# ---- honest shards ------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [True, False])
def test_tensors_are_those_of_one_file(mmap: bool, tmp_path: Path) -> None:
    file = Shards(write_shards(tmp_path, MAP, TENSORS), mmap=mmap)
    assert file.name == INDEX_FILE and set(file.tensors) == set(TENSORS)
    for name, want in TENSORS.items():
        got = file.read(name)
        assert file.tensors[name].shape == want.shape and got.dtype == np.float32
        np.testing.assert_array_equal(got, want)
        assert not got.flags.writeable


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_a_model_is_that_of_one_file(family: str, dtype: str, pieces: int, tmp_path: Path) -> None:
    config, weights = (
        (GPT2_CONFIG, gpt2_weights(GPT2_CONFIG))
        if family == "gpt2"
        else (LLAMA_CONFIG, llama_weights(LLAMA_CONFIG))
    )
    one = Model.from_pretrained(save_folder(tmp_path / "one", config, weights, dtype))
    folder = save_folder(tmp_path / "many", config)
    names = [f"model-{i % pieces + 1:05}-of-{pieces:05}.safetensors" for i in range(len(weights))]
    write_shards(folder, dict(zip(weights, names, strict=True)), weights, dtype)
    many = Model.from_pretrained(folder)
    assert many.fingerprint == one.fingerprint
    np.testing.assert_array_equal(many([1, 2, 3]), one([1, 2, 3]))
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    save_folder(folder, config | {layers: 4})
    with pytest.raises(FileError, match=f"{INDEX_FILE}: tensor .* is missing"):
        Model.from_pretrained(folder)


def test_one_file_comes_before_an_index(tmp_path: Path) -> None:
    """As in transformers: an old index beside a merged file is not read."""
    save_folder(tmp_path, GPT2_CONFIG, gpt2_weights(GPT2_CONFIG))
    write_index(tmp_path, b"nonsense")
    assert Model.from_pretrained(tmp_path)([1]).shape == (1, 61)


def test_transformers_shards(tmp_path: Path) -> None:
    """What save_pretrained writes, and the logits that it stands for."""
    torch, transformers = requires("torch"), requires("transformers")
    config = {k: v for k, v in LLAMA_CONFIG.items() if k != "model_type"}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="9KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    ids = np.arange(1, 40).reshape(1, -1)
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(Model.from_pretrained(tmp_path)(ids) - want).max() <= 2e-5


def test_a_thousand_files(tmp_path: Path) -> None:
    """The limit itself is accepted; one more is not."""
    files = {f"t{i}": f"s{i}.safetensors" for i in range(MAX_SHARDS + 1)}
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for tensor, file in files.items():
        (tmp_path / file).write_bytes(pack({tensor: entry}))
    assert f"names more than {MAX_SHARDS} files" in refusal(
        write_index(tmp_path, {"weight_map": files})
    )
    files.popitem()
    path = write_index(tmp_path, {"weight_map": files})
    assert len(Shards(path, mmap=False).tensors) == MAX_SHARDS


# ---- names of files -----------------------------------------------------------------------------

LINUX_ATTACKS = [
    "../model.safetensors",
    "../../../../etc/passwd",
    "..",
    ".",
    "",
    "/etc/passwd",
    "/tmp/model.safetensors",
    "//host/model.safetensors",
    "sub/model.safetensors",
    "./model.safetensors",
    "a/../model.safetensors",
    "model..safetensors",
    "..safetensors",
    ".safetensors",
    ".hidden.safetensors",
    "-rf.safetensors",
    "--help.safetensors",
    "~root.safetensors",
    "$HOME.safetensors",
    "`id`.safetensors",
    "model.safetensors\0.bin",
    "model.safetensors\n",
    "model\n.safetensors",
    "\x1b[2Jmodel.safetensors",
    "model.safetensors ",
    " model.safetensors",
    "model.safetensors/",
    "pytorch_model.bin",
    "model.pt",
    "config.json",
    "model.safetensors.index.json",
    "model.SAFETENSORS",
    "safetensors",
    "https://example.org/model.safetensors",
    "file:///tmp/model.safetensors",
    "a" * 245 + ".safetensors",  # 257 bytes
    "é" * 10 + ".safetensors",
    "\u2025/model.safetensors",  # two dots in one sign
    "\uff0e\uff0e\uff0fmodel.safetensors",  # full width dots and slash
    "\u202emodel.safetensors",  # right to left
    "mo\u0301del.safetensors",
    "\ud800.safetensors",
]
WINDOWS_ATTACKS = [
    "..\\model.safetensors",
    "sub\\model.safetensors",
    "\\model.safetensors",
    "\\\\host\\share\\model.safetensors",
    "\\\\?\\C:\\model.safetensors",
    "\\\\.\\PhysicalDrive0",
    "C:model.safetensors",
    "C:\\model.safetensors",
    "c:/model.safetensors",
    "model.safetensors:stream",
    "model:stream.safetensors",
    "model.safetensors::$DATA",
    "model.safetensors.",
    "CON.safetensors",
    "con.safetensors",
    "PRN.safetensors",
    "aux.safetensors",
    "NUL.safetensors",
    "nul.tar.safetensors",
    "COM1.safetensors",
    "com0.safetensors",
    "LPT9.safetensors",
    "CONIN$.safetensors",
    "MODEL~1.SAF",
    "model?.safetensors",
    "model*.safetensors",
    "model<.safetensors",
    "model|.safetensors",
    'model".safetensors',
    "%TEMP%.safetensors",
    "\uff3cmodel.safetensors",  # full width backslash
    "\u2215model.safetensors",  # division slash
    "\u00a5model.safetensors",  # the yen sign, a separator in one code page
]
NOT_NAMES: list[Any] = [None, 1, 1.5, True, ["model.safetensors"], {"a": "model.safetensors"}, {}]


@pytest.mark.promise("D3")
@pytest.mark.parametrize("name", LINUX_ATTACKS + WINDOWS_ATTACKS + NOT_NAMES, ids=ascii)
def test_a_name_that_is_not_plain(name: Any, tmp_path: Path) -> None:
    """Refused under the rules of every system, on every system, and no such file is opened."""
    opened: list[Any] = []
    original = shards.Checkpoint
    path = write_index(tmp_path, {"weight_map": {"a": ONE, "w": name}})
    (tmp_path / ONE).write_bytes(pack_tensors({"a": np.ones(1)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "Checkpoint", lambda *a, **k: opened.append(a) or original(*a, **k))
        message = refusal(path)
    assert f"{INDEX_FILE} puts tensor 'w' into file " in message
    assert "but a shard has a plain name of letters, digits, '_', '-' and single '.'" in message
    assert not opened


@pytest.mark.promise("D3")
@pytest.mark.parametrize(
    "name",
    [
        ONE,
        "model.fp16-00001-of-00002.safetensors",
        "pytorch_model-00001-of-00003.safetensors",
        "0.safetensors",
        "_x.safetensors",
        "console.safetensors",
        "com.safetensors",
        "nul1.safetensors",
        "model.safetensors.safetensors",
        "a" * 243 + ".safetensors",
    ],
)
def test_a_plain_name(name: str, tmp_path: Path) -> None:
    assert list(Shards(write_shards(tmp_path, {"a": name}, TENSORS)).tensors) == ["a"]


@pytest.mark.promise("D3")
def test_names_that_differ_in_case(tmp_path: Path) -> None:
    files = {"a": "model-A.safetensors", "b": "model-a.safetensors"}
    message = refusal(write_index(tmp_path, {"weight_map": files}))
    assert "names both 'model-A.safetensors' and 'model-a.safetensors', which are one" in message


# ---- the index and the files disagree -----------------------------------------------------------


@pytest.mark.promise("D3")
def test_a_tensor_that_is_listed_and_absent(tmp_path: Path) -> None:
    path = write_shards(tmp_path, MAP, TENSORS)
    write_index(tmp_path, {"weight_map": MAP | {"gone": TWO}})
    assert f"puts tensor 'gone' into {TWO}, which does not hold it" in refusal(path)


@pytest.mark.promise("D3")
def test_a_tensor_that_is_present_and_unlisted(tmp_path: Path) -> None:
    path = write_shards(tmp_path, MAP, TENSORS)
    write_index(tmp_path, {"weight_map": {n: f for n, f in MAP.items() if n != "d"}})
    assert f"{ONE} holds tensor 'd', which {INDEX_FILE} does not list" in refusal(path)


@pytest.mark.promise("D3")
def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    path = write_shards(tmp_path, MAP, TENSORS)
    (tmp_path / TWO).write_bytes(pack_tensors({n: TENSORS[n] for n in "abc"}))
    assert f"tensor 'a' is in {ONE} and in {TWO}, and {INDEX_FILE} lists one" in refusal(path)


@pytest.mark.promise("D3")
def test_a_tensor_that_is_listed_twice(tmp_path: Path) -> None:
    path = write_index(tmp_path, f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}'.encode())
    assert f"names 'a' twice, for '{ONE}' and for '{TWO}'" in refusal(path)
    path = write_index(tmp_path, b'{"weight_map": {}, "weight_map": {}}')
    assert "names 'weight_map' twice" in refusal(path)


SHARD_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda path: path.unlink(), f"{TWO}' is missing"),
    "empty": (lambda path: path.write_bytes(b""), f"{TWO} has 0 bytes, too few"),
    "short": (lambda path: os.truncate(path, path.stat().st_size - 1), f"{TWO} is truncated"),
    "long": (lambda path: path.write_bytes(path.read_bytes() + b"x"), f"{TWO} has 1 bytes that"),
    "a_folder": (lambda path: (path.unlink(), path.mkdir()), f"{TWO}' is not a regular file"),
    "a_fifo": (lambda path: (path.unlink(), os.mkfifo(path)), f"{TWO}' is not a regular file"),
    "a_device": (
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        f"{TWO}' is not a regular file",
    ),
    "a_loop": (lambda path: (path.unlink(), path.symlink_to(path)), f"{TWO}' cannot be opened"),
    "a_pickle": (lambda path: path.write_bytes(b"\x80\x04K\x01." * 9), "claims a header of"),
}


@pytest.mark.promise("D3")
@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_a_bad_shard(fault: str, tmp_path: Path) -> None:
    harm, sentence = SHARD_FAULTS[fault]
    path = write_shards(tmp_path, MAP, TENSORS)
    harm(tmp_path / TWO)
    assert sentence in refusal(path)


INDEXES: dict[str, tuple[Any, str]] = {
    "nothing": (b"", "is not valid JSON"),
    "a_list": ([], "holds [] where an object is expected"),
    "not_utf8": (b'{"\xff": 1}', "is not UTF-8 at byte 2"),
    "no_map": ({"metadata": {}}, f"has no weight_map of 1 to {MAX_TENSORS} tensors"),
    "a_map_of_none": ({"weight_map": {}}, "has no weight_map of 1 to"),
    "map_is_a_list": ({"weight_map": [ONE]}, "has no weight_map of 1 to"),
    "map_is_text": ({"weight_map": ONE}, "has no weight_map of 1 to"),
    "map_is_null": ({"weight_map": None}, "has no weight_map of 1 to"),
    "nul_in_tensor": ({"weight_map": {"a\0": ONE}}, "has a name with a NUL or of over 4096 bytes"),
    "long_tensor": ({"weight_map": {"a" * 5000: ONE}}, "has a name with a NUL or of over 4096"),
    "nine_deep": (b'{"metadata":' + b'{"a":' * 8 + b"0" + b"}" * 9, "deeper than 8 levels"),
    "deep": (b'{"a":' * 100_000, "deeper than 8 levels"),
    "deeper": (b'{"a":' * 300_000, "holds more than 200000 values"),
    "too_large": (b" " * (MAX_INDEX_BYTES + 1), f"more than the limit of {MAX_INDEX_BYTES}"),
    "too_many": (
        {"weight_map": dict.fromkeys(map(str, range(MAX_TENSORS + 1)), ONE)},
        f"has no weight_map of 1 to {MAX_TENSORS} tensors",
    ),
    "far_too_many": (
        {"weight_map": dict.fromkeys(map(str, range(2 * MAX_TENSORS + 1)), ONE)},
        "holds more than 200000 values",
    ),
    "lists": (b'{"a":[' + b"[]," * 10_000_000 + b"0]}", "holds more than 200000 values"),
}


@pytest.mark.promise("D3")
@pytest.mark.parametrize("case", INDEXES)
def test_a_bad_index(case: str, tmp_path: Path) -> None:
    index, sentence = INDEXES[case]
    path = write_index(tmp_path, index)
    size = path.stat().st_size
    tracemalloc.start()
    try:
        message = refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert f"{INDEX_FILE} " in message or f"{INDEX_FILE}:" in message
    assert sentence in message
    assert peak <= 3 * size + 64e6  # bytes, text, and 200,000 values at most


@pytest.mark.promise("D3")
def test_more_tensors_than_the_limit_over_many_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shards(tmp_path, MAP, TENSORS)
    monkeypatch.setattr(shards, "MAX_TENSORS", 3)
    write_index(tmp_path, {"weight_map": {"a": ONE, "b": TWO}})
    assert "files hold over 3 tensors" in refusal(path)


# ---- a hub cache --------------------------------------------------------------------------------


def make_cache(root: Path, repo: str = "org/name") -> Path:
    """The layout of a hub cache, every file a relative link into ``blobs``; the snapshot."""
    home = root / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / ("0" * 39 + "1")
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(snapshot.name)
    weights = gpt2_weights(GPT2_CONFIG)
    files = {n: ONE if i % 2 else TWO for i, n in enumerate(weights)}
    save_folder(snapshot, GPT2_CONFIG)
    write_shards(snapshot, files, weights)
    for i, path in enumerate(sorted(snapshot.iterdir())):
        blob = home / "blobs" / f"{i:040x}"
        path.rename(blob)
        path.symlink_to(os.path.join("..", "..", "blobs", blob.name))
    return snapshot


@pytest.mark.promise("D3")
@pytest.mark.parametrize("strict", [False, True])
def test_a_hub_cache_is_read(strict: bool, tmp_path: Path) -> None:
    snapshot = make_cache(tmp_path)
    assert Model.from_pretrained(snapshot, strict_symlinks=strict)([1, 2]).shape == (2, 61)
    (tmp_path / "alias").symlink_to(snapshot)  # the folder itself may be called by a link
    assert Model.from_pretrained(tmp_path / "alias")([1, 2]).shape == (2, 61)
    plain = save_folder(tmp_path / "plain", GPT2_CONFIG, gpt2_weights(GPT2_CONFIG))
    assert Model.from_pretrained(plain, strict_symlinks=strict)([1, 2]).shape == (2, 61)


@pytest.mark.promise("D3")
@pytest.mark.parametrize("name", ["config.json", ONE, INDEX_FILE, "generation_config.json"])
def test_strict_links_stay_in_the_cache(name: str, tmp_path: Path) -> None:
    """A link to another model's blob loads, and is refused on request."""
    snapshot = make_cache(tmp_path)
    other = make_cache(tmp_path, "org/name2")  # a sibling whose name begins alike
    (other / "generation_config.json").write_text("{}")
    (snapshot / name).unlink(missing_ok=True)
    (snapshot / name).symlink_to(other / name)
    assert Model.from_pretrained(snapshot)([1, 2]).shape == (2, 61)
    with pytest.raises(FileError, match=f"'{name}' is a link that leaves .*models--org--name'"):
        Model.from_pretrained(snapshot, strict_symlinks=True)


@pytest.mark.promise("D3")
def test_a_link_to_anything_but_a_file(tmp_path: Path) -> None:
    snapshot = make_cache(tmp_path)
    for target in ("/dev/zero", tmp_path, tmp_path / "gone"):
        (snapshot / ONE).unlink()
        (snapshot / ONE).symlink_to(target)
        with pytest.raises(FileError, match=r"is not a regular file|is missing"):
            Model.from_pretrained(snapshot)
    assert Checkpoint(snapshot / TWO).tensors
