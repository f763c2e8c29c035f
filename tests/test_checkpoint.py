"""Hostile files: every one meets its sentence, quickly, in little memory, and nothing is run."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import tracemalloc
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

from sparseattn.errors import ArgumentError, FileError, SparseAttnError
from sparseattn.models import Model, checkpoint
from sparseattn.models.checkpoint import MAX_HEADER_BYTES, MAX_TENSORS, Checkpoint

EIGHT = bytes(8)


def entry(begin: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(**changes: Any) -> bytes:
    return pack({"a": entry() | changes}, EIGHT)


def many_tensors() -> bytes:
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return pack(("{" + ",".join(f'"{i}":{empty}' for i in range(MAX_TENSORS + 1)) + "}").encode())


# id: (bytes of the file, what the sentence says)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes, too few for a header"),
    "seven_bytes": (bytes(7), "has 7 bytes, too few"),
    "length_0": (pack(b"{}", length=0), "claims a header of 0 bytes, outside 2 to"),
    "length_1": (pack(b"{}", length=1), "claims a header of 1 bytes, outside 2 to"),
    "length_2_63": (pack(b"{}", length=2**63), "claims a header of 9223372036854775808 bytes"),
    "length_all_ones": (pack(b"{}", length=2**64 - 1), "claims a header of 18446744073709551615"),
    "length_over_limit": (
        pack(b"{}", length=MAX_HEADER_BYTES + 1),
        f"outside 2 to {MAX_HEADER_BYTES}",
    ),
    "length_over_file": (pack(b"{}", length=3), "is truncated: it claims a header of 3 bytes"),
    "not_utf8": (pack(b'{"\xff": 1}'), "is not UTF-8 at byte 2"),
    "utf16": (pack(json.dumps({"a": entry()}).encode("utf-16-le"), EIGHT), "is not valid JSON"),
    "a_list": (pack(b"[1,2]"), "does not start with '{'"),
    "leading_space": (pack(b" {}"), "does not start with '{'"),
    "a_pickle": (pack(pickle.dumps({"a": 1})), "does not start with '{'"),
    "not_json": (pack(b'{"a": }'), "is not valid JSON"),
    "unfinished": (pack(b'{"a": {'), "is not valid JSON"),
    "after_the_end": (pack(b"{}{}"), "is not valid JSON"),
    "name_twice": (
        pack(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), EIGHT),
        "names 'a' twice",
    ),
    "key_twice": (
        pack(b'{"a":{"dtype":"F32","dtype":"F64","shape":[2],"data_offsets":[0,8]}}', EIGHT),
        "names 'dtype' twice",
    ),
    "deep": (pack(b'{"a":' + b"[" * 40_000), "is nested deeper than 3 levels"),
    "deeper": (pack(b'{"a":' + b"[" * 100_000), "holds more than 50000 values"),
    "one_too_deep": (pack({"a": {"b": {"c": {}}}}), "is nested deeper than 3 levels"),
    "long_integer": (pack(b'{"a":%s}' % (b"9" * 5000)), "is not valid JSON"),
    "many_tensors": (many_tensors(), f"more than {MAX_TENSORS} tensors"),
    "many_lists": (pack(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"), "more than 50000 values"),
    "many_keys": (
        pack(("{" + ",".join(f'"{i:x}":0' for i in range(1_500_000)) + "}").encode()),
        "holds more than 50000 values",
    ),
    "a_late_twin": (
        pack(("{" + ",".join(f'"{i}":0' for i in range(40_000)) + ',"39999":1}').encode()),
        "names '39999' twice, for 0 and for 1",
    ),
    "a_million_tensors": (
        pack(b"{" + b'"":{"data_offsets":[0,0]},' * 600_000 + b"}"),
        f"describes more than {MAX_TENSORS} tensors",
    ),
    "big_endian_length": (len(one()).to_bytes(8, "big") + one()[8:], "claims a header of"),
    "trailing": (pack({"a": entry()}, bytes(9)), "has 1 bytes that belong to no tensor before"),
    "no_tensor_but_data": (pack({}, bytes(5)), "has 5 bytes that belong to no tensor"),
    "hole_first": (
        pack({"a": entry(4, 12)}, bytes(12)),
        "has 4 bytes that belong to no tensor before 'a'",
    ),
    "hole_between": (
        pack({"a": entry(), "b": entry(12, 20)}, bytes(20)),
        "has 4 bytes that belong to no tensor before 'b'",
    ),
    "overlap": (pack({"a": entry(), "b": entry(4, 12)}, bytes(12)), "'a' and 'b' overlap"),
    "same_bytes": (pack({"a": entry(), "b": entry()}, EIGHT), "'a' and 'b' overlap"),
    "past_the_end": (pack({"a": entry()}, bytes(7)), "is truncated: tensor 'a' ends at byte"),
    "reversed": (one(data_offsets=[8, 0]), "data_offsets [8, 0], not a [begin, end]"),
    "negative": (one(data_offsets=[-8, 0]), "data_offsets [-8, 0], not a"),
    "float_offsets": (one(data_offsets=[0.0, 8.0]), "data_offsets [0.0, 8.0], not a"),
    "text_offsets": (one(data_offsets=["0", "8"]), "data_offsets ['0', '8'], not a"),
    "bool_offsets": (one(data_offsets=[False, 8]), "data_offsets [False, 8], not a"),
    "infinite_offset": (
        pack(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}', EIGHT),
        "data_offsets [0, inf], not a",
    ),
    "huge_offsets": (one(data_offsets=[0, 2**53 + 8]), "not a [begin, end] within 2^53"),
    "three_offsets": (one(data_offsets=[0, 4, 8]), "data_offsets [0, 4, 8], not a"),
    "offsets_null": (one(data_offsets=None), "data_offsets None, not a"),
    "no_offsets": (
        pack({"a": {"dtype": "F32", "shape": [2]}}, EIGHT),
        "not described by dtype, shape and data_offsets",
    ),
    "extra_key": (one(strides=[1]), "not described by dtype, shape and data_offsets"),
    "entry_is_text": (pack({"a": "F32"}, EIGHT), "not described by dtype, shape and data_offsets"),
    "entry_is_null": (pack({"a": None}, EIGHT), "not described by dtype, shape and data_offsets"),
    "shape_too_small": (one(shape=[1]), "needs 4 bytes, but its data_offsets hold 8"),
    "shape_too_large": (one(shape=[3]), "needs 12 bytes, but its data_offsets hold 8"),
    "shape_overflows_64_bits": (
        one(shape=[2**40, 2**40]),
        "needs 4835703278458516698824704 bytes, but its data_offsets hold 8",
    ),
    "shape_wraps_to_8": (one(shape=[2**32, 2**32 + 1]), "but its data_offsets hold 8"),
    "shape_negative": (one(shape=[-2]), "shape [-2], not at most 8 counts"),
    "shape_float": (one(shape=[2.0]), "shape [2.0], not at most 8 counts"),
    "shape_bool": (one(shape=[True, 2]), "shape [True, 2], not at most 8 counts"),
    "shape_text": (one(shape="2"), "shape '2', not at most 8 counts"),
    "shape_9_dims": (one(shape=[1] * 8 + [2]), "not at most 8 counts"),
    "shape_over_2_53": (one(shape=[0, 2**53 + 1]), "not at most 8 counts below 2^53"),
    "dtype_unknown": (one(dtype="F33"), "dtype 'F33', which is unknown"),
    "dtype_lower_case": (one(dtype="f32"), "dtype 'f32', which is unknown"),
    "dtype_sub_byte": (one(dtype="F4", shape=[16]), "dtype 'F4', which is unknown"),
    "dtype_number": (one(dtype=32), "dtype 32, which is unknown"),
    "dtype_list": (one(dtype=["F32"]), "dtype ['F32'], which is unknown"),
    "dtype_lies": (one(dtype="F64"), "needs 16 bytes, but its data_offsets hold 8"),
    "scalar_too_long": (one(shape=[]), "needs 4 bytes, but its data_offsets hold 8"),
    "zero_size_with_bytes": (one(shape=[0]), "needs 0 bytes, but its data_offsets hold 8"),
    "metadata_number": (
        pack({"__metadata__": {"n": 1}, "a": entry()}, EIGHT),
        "has a __metadata__ that is not text by name",
    ),
    "metadata_list": (pack({"__metadata__": ["pt"]}), "has a __metadata__ that is not text"),
    "nul_in_name": (pack({"a\0b": entry()}, EIGHT), "has a name with a NUL"),
    "long_name": (pack({"a" * 2**20: entry()}, EIGHT), "or of over 4096 bytes"),
    "surrogate_name": (pack(b'{"\\ud800":{}}'), "tensor '\\ud800' is not described"),
}

HONEST = {
    "nothing": pack({}),
    "padded": pack(b"{}      "),
    "metadata": pack({"__metadata__": {"format": "pt", "note": "[[{\x01"}}),
    "scalar": pack({"a": entry(0, 4, ())}, bytes(4)),
    "zero_size": pack({"a": entry(0, 0, (0, 7)), "b": entry(), "c": entry(8, 8, (0,))}, EIGHT),
    "any_order": pack({"b": entry(8, 16), "a": entry()}, bytes(16)),
    "any_type": pack({"a": entry(0, 8, (8,), "BOOL"), "b": entry(8, 16, (1,), "C64")}, bytes(16)),
    "unicode_name": pack({"é": entry(), "e\u0301": entry(8, 16)}, bytes(16)),
}


@pytest.mark.promise("D2")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(case: str, tmp_path: Path) -> None:
    data, sentence = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    begin = time.process_time()
    with pytest.raises(FileError) as caught:
        Checkpoint(path)
    seconds = time.process_time() - begin
    message = str(caught.value)
    assert sentence in message
    assert "\n" not in message and len(message) < 400 and message.isascii()
    assert seconds < 0.1


@pytest.mark.promise("D2")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_takes_little_memory(case: str, tmp_path: Path) -> None:
    data, _ = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    header = min(len(data), MAX_HEADER_BYTES)  # the header itself may be read

    def load() -> None:
        with pytest.raises(FileError):
            Checkpoint(path)

    assert traced(load) < header + 10e6


def traced(call: Any) -> int:
    """Peak bytes that Python and NumPy allocate in a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", HONEST)
def test_honest_file_is_read(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HONEST[case])
    assert "__metadata__" not in Checkpoint(path).tensors


@pytest.mark.promise("D2")
def test_truncated_anywhere(tmp_path: Path) -> None:
    data = pack_tensors(gpt2_weights(GPT2_CONFIG))
    path = tmp_path / "model.safetensors"
    for size in np.linspace(0, len(data) - 1, 100, dtype=int):
        path.write_bytes(data[:size])
        with pytest.raises(FileError, match=r"truncated|too few"):
            Checkpoint(path)


@pytest.mark.promise("D2")
def test_only_regular_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / "blob").write_bytes(HONEST["scalar"])
    path.symlink_to(tmp_path / "blob")  # as in a hub cache
    assert list(Checkpoint(path).tensors) == ["a"]
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(FileError, match="is missing"):
        Checkpoint(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(FileError, match="is not a regular file"):
        Checkpoint(path)
    path.rmdir()
    os.mkfifo(path)  # nobody writes: an open that waits would hang
    with pytest.raises(FileError, match="is not a regular file"):
        Checkpoint(path)
    with pytest.raises(FileError, match="is not a regular file"):
        Checkpoint(Path("/dev/zero"))
    if os.geteuid():
        (tmp_path / "blob").chmod(0)
        with pytest.raises(FileError, match="cannot be opened"):
            Checkpoint(tmp_path / "blob")


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("pad", [0, 1, 2])
def test_values_of_every_weight_type(mmap: bool, pad: int, tmp_path: Path) -> None:
    """As stored and widened exactly, at any alignment; zeros, subnormals, infinities and NaN among
    the values. Vectors are widened at once."""
    f32 = np.array([0.0, -0.0, 1.5, -(2.0**-149), 3e38, np.inf, -np.inf, np.nan], np.float32)
    f16 = np.array([0.0, -0.0, 65504, 2.0**-24, -(2.0**-14), np.inf, -np.inf, np.nan], np.float16)
    b16 = np.array([0, 0x8000, 0x3F80, 0x0001, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0], np.uint16)
    parts = {"F32": f32, "F16": f16, "BF16": b16, "F64": f32.astype(np.float64)}
    header, data = {"pad": entry(0, pad, [pad], "U8")}, bytes(pad)
    for dtype, values in parts.items():
        end = len(data) + values.nbytes
        header[dtype] = entry(len(data), end, [2, 4], dtype)
        data += values.tobytes()
        header[f"{dtype} vector"] = entry(end, end + values.nbytes, [8], dtype)
        data += values.tobytes()
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(raw + b" " * (-len(raw) % 8), data))
    file = Checkpoint(path, mmap=mmap)
    path.write_bytes(path.read_bytes())  # same bytes: what was read stays valid
    wide = {
        "F32": f32,
        "F16": f16.astype(np.float32),
        "BF16": (b16.astype(np.uint32) << 16).view(np.float32),
        "F64": f32,
    }
    for dtype, want in wide.items():
        kept = file.read(dtype)
        assert kept.dtype == (parts[dtype].dtype if parts[dtype].itemsize == 2 else np.float32)
        if kept.dtype != np.float32:
            np.testing.assert_array_equal(kept.view(np.uint16).ravel(), parts[dtype].view("u2"))
            np.testing.assert_array_equal(file.read(f"{dtype} vector"), want)
            assert file.read(f"{dtype} vector").dtype == np.float32
        got = file.read(dtype, wide=True)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got.ravel(), want)
        assert (np.signbit(got.ravel()) == np.signbit(want)).all()
        for array in (kept, got):
            assert array.shape == (2, 4) and array.flags.aligned
            with pytest.raises(ValueError, match="read-only"):
                array[0, 0] = 1
    with pytest.raises(FileError, match="tensor 'pad' has dtype U8: save the weights as one of"):
        file.read("pad")


def test_agrees_with_the_library(tmp_path: Path) -> None:
    numpy = requires("safetensors.numpy")
    values = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(3, np.float16)}
    numpy.save_file(values, tmp_path / "model.safetensors", metadata={"format": "np"})
    file = Checkpoint(tmp_path / "model.safetensors")
    for name, want in values.items():
        np.testing.assert_array_equal(file.read(name), want)


# ---- the folder -----------------------------------------------------------------------------


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"does not exist: give a folder with config.json"):
        Model.from_pretrained(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="is a file: give the folder that holds it"):
        Model.from_pretrained(tmp_path / "file")
    with pytest.raises(FileError, match=r"has no config.json: give a Hugging Face model folder"):
        Model.from_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match="is no path"):
        Model.from_pretrained("a\0b")


def test_no_weights(tmp_path: Path) -> None:
    save_folder(tmp_path, GPT2_CONFIG)
    with pytest.raises(
        FileError,
        match=r"has no model.safetensors or model.safetensors.index.json: add it, or pass random_w",
    ):
        Model.from_pretrained(tmp_path)


class Marker:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.promise("D6")
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.PTH", "last.ckpt", "model.safetensors"]
)
def test_pickles_are_refused(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = save_folder(tmp_path / "a model", LLAMA_CONFIG)
    (folder / name).write_bytes(pickle.dumps(Marker(marker)))
    with pytest.raises(FileError) as caught:
        Model.from_pretrained(folder)
    if name != "model.safetensors":
        message = str(caught.value)
        assert f"{name} is a pickle" in message and "is refused" in message
        assert "M.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])" in message
        assert f"'{folder}' '{folder}-safetensors'" in message  # quoted for a shell
    assert not marker.exists()


@pytest.mark.promise("D6")
def test_the_conversion_command_works(tmp_path: Path) -> None:
    """What the refusal says to type makes a folder that loads."""
    import shlex
    import subprocess

    torch, transformers = requires("torch"), requires("transformers")
    config = transformers.LlamaConfig(
        **{k: v for k, v in LLAMA_CONFIG.items() if k != "model_type"}
    )
    folder = tmp_path / "model"
    config.save_pretrained(folder)
    weights = transformers.LlamaForCausalLM(config).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(FileError) as caught:
        Model.from_pretrained(folder)
    words = shlex.split(str(caught.value).split(" with ")[1])
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    model = Model.from_pretrained(f"{folder}-safetensors")
    got = model._values["norm.weight"]
    np.testing.assert_array_equal(got, weights["model.norm.weight"].numpy())


# ---- config.json ----------------------------------------------------------------------------

CONFIG_TEXTS = {
    "empty": ("", "config.json is not valid JSON"),
    "a_list": ("[]", "config.json holds [] where an object is expected"),
    "text": ('"gpt2"', "config.json holds 'gpt2' where an object"),
    "duplicate": ('{"n_layer": 1, "n_layer": 2}', "config.json names 'n_layer' twice"),
    "deep": ('{"a":' * 40_000, "config.json is nested deeper than 16 levels"),
    "deeper": ('{"a":' * 100_000, "config.json holds more than 50000 values"),
    "lists": ('{"a":[' + "[]," * 200_000 + "0]}", "config.json holds more than 50000 values"),
    "seventeen": ('{"a":' * 17 + "0" + "}" * 17, "config.json is nested deeper than 16 levels"),
    "too_large": ('{"a": "' + "x" * 2**20 + '"}', "more than the limit of 1048576"),
    "latin_1": (b'{"a": "\xe9"}', "config.json is not UTF-8 at byte 7"),
    "utf_8_bom": (b"\xef\xbb\xbf{}", "config.json is not valid JSON"),
    "no_family": ("{}", "model_type is missing"),
    "a_pickle": (pickle.dumps({"a": 1}), "config.json is not UTF-8"),
}


@pytest.mark.promise("D4")
@pytest.mark.parametrize("case", CONFIG_TEXTS)
def test_config_text(case: str, tmp_path: Path) -> None:
    text, sentence = CONFIG_TEXTS[case]
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileError) as caught:
        Model.from_pretrained(tmp_path)
    assert sentence in str(caught.value)


GPT2_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mixtral"}, "model_type is 'mixtral': known are mistral"),
    ({"model_type": "gpt-2"}, "model_type is 'gpt-2': known are gpt2"),
    ({"model_type": ["gpt2"]}, "model_type is ['gpt2']: known are"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is set: save the weights"),
    ({"n_layer": 0}, "n_layer is 0: give an integer from 1 to 1024"),
    ({"n_layer": -3}, "n_layer is -3: give an integer"),
    ({"n_layer": 10**30}, "n_layer is 1000000000000000000000000000000: give an integer"),
    ({"n_layer": 3.0}, "n_layer is 3.0: give an integer"),
    ({"n_layer": "3"}, "n_layer is '3': give an integer"),
    ({"n_layer": True}, "n_layer is True: give an integer"),
    ({"n_layer": [3]}, "n_layer is [3]: give an integer"),
    ({"n_layer": 4}, "'transformer.h.3.ln_1.weight' of a gpt2 model is missing"),
    ({"n_layer": 2}, "'transformer.h.2.attn.c_attn.weight' has no place in a gpt2 model"),
    ({"n_head": 5}, "n_embd is 24: give a multiple of n_head, which is 5"),
    ({"n_head": 1025}, "n_head is 1025: give an integer from 1 to 1024"),
    ({"n_embd": 131073}, "n_embd is 131073: give an integer from 1 to 131072"),
    ({"n_embd": 30}, "'transformer.wte.weight' has shape [61, 24] where config.json makes it [61"),
    ({"n_inner": 41}, "has shape [24, 40] where config.json makes it [24, 41]"),
    ({"n_inner": -1}, "n_inner is -1: give an integer"),
    ({"n_positions": 49}, "'transformer.wpe.weight' has shape [48, 24] where config.json makes it"),
    ({"n_positions": 2**24 + 1}, "n_positions is 16777217: give an integer from 1 to 16777216"),
    ({"vocab_size": 2**22}, "'transformer.wte.weight' has shape [61, 24] where config.json makes"),
    ({"vocab_size": 2**22 + 1}, "vocab_size is 4194305: give an integer from 1 to 4194304"),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0: give a number above 0 and at most 1"),
    ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan: give a number above 0"),
    ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon is inf: give a number above 0"),
    ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5': give a number"),
    ({"activation_function": "gelu_neu"}, "activation_function is 'gelu_neu': known are gelu_new"),
    ({"activation_function": 3}, "activation_function is 3: known are"),
    ({"activation_function": {"a": "x" * 999}}, "activation_function is {'a': 'xxx"),
    ({"scale_attn_weights": "yes"}, "scale_attn_weights is 'yes': give true or false"),
    ({"scale_attn_by_inverse_layer_idx": 1}, "is 1: give true or false"),
    ({"add_cross_attention": True}, "add_cross_attention is true: give a decoder without"),
    ({"tie_word_embeddings": False}, "tensor 'lm_head.weight' of a gpt2 model is missing"),
]

LLAMA_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3: give a divisor of num_attention_heads"),
    ({"num_key_value_heads": 16}, "num_key_value_heads is 16: give a divisor"),
    ({"num_key_value_heads": 4}, "k_proj.weight' has shape [8, 32] where config.json makes it [16"),
    ({"num_attention_heads": 6, "num_key_value_heads": 2}, "hidden_size is 32: give a multiple of"),
    ({"head_dim": 5}, "head_dim is 5: give an even number, as RoPE turns pairs"),
    ({"head_dim": 0}, "head_dim is 0: give an integer from 2"),
    ({"head_dim": 8}, "q_proj.weight' has shape [32, 32] where config.json makes it [64, 32]"),
    ({"intermediate_size": 45}, "gate_proj.weight' has shape [44, 32] where config.json makes it"),
    ({"attention_bias": True}, "tensor 'model.layers.0.self_attn.q_proj.bias' of a llama model is"),
    ({"mlp_bias": True}, "tensor 'model.layers.0.mlp.gate_proj.bias' of a llama model is missing"),
    ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0: give true or false"),
    ({"rope_theta": 0}, "rope_theta is 0: give a number above 1e-06"),
    ({"rope_theta": -1e4}, "rope_theta is -10000.0: give a number above 1e-06"),
    ({"rope_theta": 1e13}, "rope_theta is 10000000000000.0: give a number above"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear': give an object or null"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: factor is missing: add it"),
    ({"rope_parameters": {"rope_type": ["x"]}}, "rope_parameters: rope_type is ['x']: known are"),
    ({"rope_parameters": {"rope_theta": "big"}}, "rope_parameters: rope_theta is 'big': give a"),
    ({"hidden_act": "sliu"}, "hidden_act is 'sliu': known are silu"),
    ({"rms_norm_eps": None, "num_hidden_layers": None}, "'model.layers.3.input_layernorm.weight'"),
]


@pytest.mark.promise("D4")
@pytest.mark.parametrize("number", range(len(GPT2_CHANGES) + len(LLAMA_CHANGES)))
def test_config_fields(number: int, tmp_path: Path) -> None:
    """Every one is refused before weights are touched: in little memory, by one sentence."""
    is_gpt2 = number < len(GPT2_CHANGES)
    changes, sentence = (GPT2_CHANGES + LLAMA_CHANGES)[number]
    config, weights = (
        (GPT2_CONFIG, gpt2_weights(GPT2_CONFIG))
        if is_gpt2
        else (LLAMA_CONFIG, llama_weights(LLAMA_CONFIG))
    )
    folder = save_folder(tmp_path, config | changes, weights)
    message = ""

    def load() -> None:
        nonlocal message
        with pytest.raises(FileError) as caught:
            Model.from_pretrained(folder)
        message = str(caught.value)

    assert traced(load) < 10e6
    assert sentence in message
    assert "\n" not in message and len(message) < 400


def test_missing_and_foreign_tensors(tmp_path: Path) -> None:
    good = gpt2_weights(GPT2_CONFIG)
    name = "transformer.h.1.mlp.c_fc.bias"
    for weights, sentence in (
        (
            {k: v for k, v in good.items() if k != name},
            f"tensor '{name}' of a gpt2 model is missing",
        ),
        (
            good | {"score.weight": np.zeros((2, 24))},
            "tensor 'score.weight' has no place in a gpt2",
        ),
        (good | {"wte.weight": good["transformer.wte.weight"]}, "are the same parameter: keep one"),
        (good | {name: np.zeros((40, 1))}, "has shape [40, 1] where config.json makes it [40]"),
        (good | {"x" * 3000: np.zeros(1)}, "xxx... has no place"),
    ):
        save_folder(tmp_path, GPT2_CONFIG, weights)
        with pytest.raises(FileError) as caught:
            Model.from_pretrained(tmp_path)
        assert sentence in str(caught.value)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    data = pack_tensors(gpt2_weights(GPT2_CONFIG)).replace(b'"F32"', b'"I32"', 1)
    save_folder(tmp_path, GPT2_CONFIG, data)
    with pytest.raises(FileError, match="has dtype I32: save the weights as one of F32, F64, F16"):
        Model.from_pretrained(tmp_path)


def test_a_wish_for_too_many_random_parameters(tmp_path: Path) -> None:
    config = GPT2_CONFIG | {"n_embd": 131072, "n_head": 1024, "n_layer": 1024}
    save_folder(tmp_path, config)
    with pytest.raises(FileError, match="random parameters, more than the limit of 2147483648"):
        Model.from_pretrained(tmp_path, random_weights=0)
    for seed in (-1, 1.0, True, "0", 2**64):
        with pytest.raises(ArgumentError, match=r"random_weights is .*: give a seed"):
            Model.from_pretrained(tmp_path, random_weights=seed)  # type: ignore[arg-type]


def test_special_tokens_out_of_range_read_as_absent(tmp_path: Path) -> None:
    config = GPT2_CONFIG | {"bos_token_id": 50256, "eos_token_id": [60, 61, -1, "x", 3]}
    save_folder(tmp_path, config, gpt2_weights(config))
    model = Model.from_pretrained(tmp_path)
    assert model.config.bos_token_id is None and model.config.eos_token_ids == (60, 3)
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 4, "eos_token_id": 5}')
    model = Model.from_pretrained(tmp_path)
    assert model.config.bos_token_id == 4 and model.config.eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(FileError, match=r"generation_config.json holds \[\]"):
        Model.from_pretrained(tmp_path)


def test_errors_are_of_one_family() -> None:
    assert issubclass(FileError, SparseAttnError) and issubclass(FileError, OSError)
    assert checkpoint.show("é" * 200) == ascii("é" * 200)[:77] + "..."
