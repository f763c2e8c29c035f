"""Checkpoint folders: JSON and safetensors files from strangers, checked before anything is used.

The order is always parse, validate, allocate, compute. A file is opened once, must be a regular
file, and its size is known before its header is believed. Nothing in a folder is ever executed:
``auto_map`` is ignored and pickled weights are refused.

Weights are mapped read-only. Truncating a file while it is mapped ends any program with a bus
error, so pass ``mmap=False`` (a private copy) for folders that others write to.
"""

from __future__ import annotations

import json
import math
import mmap as mapping
import os
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from sparseattn.errors import FileError
from sparseattn.half import widen

MAX_HEADER_BYTES = 16 * 2**20  # a safetensors header
MAX_TENSORS = 100_000
MAX_DIMS = 8
MAX_NAME_BYTES = 4096
MAX_OFFSET = 2**53  # beyond it JSON numbers are not exact for every reader
MAX_CONFIG_BYTES = 2**20  # config.json and its small neighbours
MAX_CONFIG_DEPTH = 16
MAX_CONFIG_VALUES = 50_000
MAX_JSON_VALUES = 2**22  # in any JSON file: what a tokenizer of 2^20 pieces and merges takes
TENSOR_VALUES = 16  # commas and brackets of a tensor in a header: 14 where it has 8 dims

CONFIG_FILE = "config.json"

# Bytes per element of every type that the format names in whole bytes.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
# What a weight may be stored as, and how its bytes are viewed.
WEIGHT_TYPES = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": "<u2"}

AGAIN = "download or export it again"


def show(value: object) -> str:
    """A value from a file as an error message may carry it: escaped, and short."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def show_path(path: str | os.PathLike[str]) -> str:
    """A path as an error message may carry it: its end says which file is meant."""
    text = ascii(os.fspath(path))
    return text if len(text) <= 160 else "'..." + text[-156:]


def open_regular(path: Path) -> tuple[int, int]:
    """A file descriptor and the size of a regular file (symlinks followed, as hub caches need)."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(path, flags)  # O_NONBLOCK: a FIFO must not wait for its writer
    except FileNotFoundError:
        raise FileError(f"{show_path(path)} is missing: {AGAIN}") from None
    except OSError as error:
        raise FileError(
            f"{show_path(path)} cannot be opened ({error.strerror}): check its permissions"
        ) from None
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise FileError(f"{show_path(path)} is not a regular file: replace it by the file itself")
    return fd, info.st_size


def read_text(path: Path, max_bytes: int) -> str:
    """The UTF-8 text of a regular file of at most `max_bytes`."""
    fd, size = open_regular(path)
    with os.fdopen(fd, "rb") as file:
        if size > max_bytes:
            raise FileError(
                f"{path.name} has {size} bytes, more than the limit of {max_bytes}: {AGAIN}"
            )
        data = file.read(max_bytes + 1)  # the size may have changed since
    if len(data) > max_bytes:
        raise FileError(f"{path.name} grew while it was read: load it when it is complete")
    return decode_utf8(data, path.name)


def decode_utf8(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{what} is not UTF-8 at byte {error.start}: {AGAIN}") from None


def parse_json(
    text: str, what: str, max_depth: int, max_values: int = MAX_JSON_VALUES
) -> dict[str, Any]:
    """The object in `text`; duplicate keys, other JSON values, deep nesting and more than about
    `max_values` entries are refused, the last before anything is parsed."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            seen: dict[str, Any] = {}
            for name, value in pairs:
                if name in seen:
                    raise FileError(
                        f"{what} names {show(name)} twice, for {show(seen[name])} and for "
                        f"{show(value)}: {AGAIN}"
                    )
                seen[name] = value
        return values

    check_values(text.count(",") + text.count("[") + text.count("{"), what, max_values)
    too_deep = f"{what} is nested deeper than {max_depth} levels: {AGAIN}"
    try:
        values = json.loads(text, object_pairs_hook=unique)
    except FileError:
        raise
    except RecursionError:
        raise FileError(too_deep) from None
    except ValueError as error:
        raise FileError(f"{what} is not valid JSON ({show(str(error))}): {AGAIN}") from None
    if not isinstance(values, dict):
        raise FileError(f"{what} holds {show(values)} where an object is expected: {AGAIN}")
    level: list[Any] = [values]
    for _ in range(max_depth):
        level = [child for node in level for child in children(node)]
        if not level:
            return values
    raise FileError(too_deep)


def check_values(count: int, what: str, max_values: int) -> None:
    """Parsing takes many times a text's size, and before every value is one of ``,[{``."""
    if count > max_values:
        raise FileError(f"{what} holds more than {max_values} values: {AGAIN}")


def children(node: Any) -> Iterable[Any]:
    """The containers directly inside a container."""
    inside = node.values() if isinstance(node, dict) else node
    return (child for child in inside if isinstance(child, dict | list))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a configuration's size."""
    text = read_text(path, MAX_CONFIG_BYTES)
    return parse_json(text, path.name, MAX_CONFIG_DEPTH, MAX_CONFIG_VALUES)


def read_small_json(folder: Path, name: str) -> dict[str, Any]:
    """An optional small file of a model folder; an absent one reads as empty."""
    path = folder / name
    if not os.path.lexists(path):
        return {}
    return read_json(path)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, as a dictionary not yet believed."""
    path = folder / CONFIG_FILE
    if not os.path.lexists(path):
        raise FileError(
            f"folder {show_path(folder)} has no {CONFIG_FILE}: give a Hugging Face model folder"
        )
    return read_json(path)


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


class TensorSource(Protocol):
    """What a model's weights are read from: a file, several, or another package's model."""

    @property
    def name(self) -> str: ...  # as error messages call it

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    def read(self, name: str, *, wide: bool = False) -> NDArray[Any]: ...


def integers(value: Any, high: int) -> bool:
    """Whether `value` is a list of integers in [0, high]."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= high for n in value)


def check_entry(what: str, name: str, entry: Any, base: int) -> Tensor:
    """One tensor's header entry, its offsets moved by `base`."""
    where = f"{what}: tensor {show(name)}"
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES or "\0" in name:
        raise FileError(f"{where} has a name with a NUL or of over {MAX_NAME_BYTES} bytes: {AGAIN}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileError(f"{where} is not described by dtype, shape and data_offsets: {AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FileError(f"{where} has dtype {show(dtype)}, which is unknown: save it as F32")
    if not integers(shape, MAX_OFFSET) or len(shape) > MAX_DIMS:
        raise FileError(
            f"{where} has shape {show(shape)}, not at most {MAX_DIMS} counts below 2^53: {AGAIN}"
        )
    if not integers(offsets, MAX_OFFSET) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileError(
            f"{where} has data_offsets {show(offsets)}, not a [begin, end] within 2^53: {AGAIN}"
        )
    begin, end = offsets
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if nbytes != end - begin:
        raise FileError(
            f"{where} of shape {show(shape)} and dtype {dtype} needs {show(nbytes)} bytes, but its "
            f"data_offsets hold {end - begin}: {AGAIN}"
        )
    return Tensor(dtype, tuple(shape), base + begin, base + end)


def check_header(what: str, raw: bytes, size: int) -> dict[str, Tensor]:
    """The tensors that a header describes, when they fill a file of `size` bytes exactly."""
    if not raw.startswith(b"{"):
        raise FileError(f"{what} has a header that does not start with '{{': {AGAIN}")
    count = raw.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise FileError(f"{what} describes more than {MAX_TENSORS} tensors: {AGAIN}")
    where = f"the header of {what}"
    values = TENSOR_VALUES * count + MAX_CONFIG_VALUES  # the metadata's
    check_values(raw.count(b",") + raw.count(b"[") + raw.count(b"{"), where, values)
    header = parse_json(decode_utf8(raw, where), where, 3, values)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{what} has a __metadata__ that is not text by name: {AGAIN}")
    if len(header) > MAX_TENSORS:
        raise FileError(f"{what} describes more than {MAX_TENSORS} tensors: {AGAIN}")
    base = 8 + len(raw)
    tensors = {name: check_entry(what, name, entry, base) for name, entry in header.items()}
    edges = [(t.begin, t.end, name) for name, t in tensors.items()]
    edges = [(base, base, "the header"), *sorted(edges), (size, size, "the end of the file")]
    for (_, end, before), (begin, _, after) in pairwise(edges):
        if begin > end:
            raise FileError(
                f"{what} has {begin - end} bytes that belong to no tensor before {show(after)}: "
                f"{AGAIN}"
            )
        if begin < end and after == "the end of the file":
            raise FileError(
                f"{what} is truncated: tensor {show(before)} ends at byte {end} of {size}; {AGAIN}"
            )
        if begin < end:
            raise FileError(f"{what}: tensors {show(before)} and {show(after)} overlap: {AGAIN}")
    return tensors


def read_header(file: BinaryIO, what: str, size: int) -> bytes:
    """The header's bytes, after what stands before it was compared with the file's size."""
    if size < 10:
        raise FileError(f"{what} has {size} bytes, too few for a header: {AGAIN}")
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise FileError(
            f"{what} claims a header of {length} bytes, outside 2 to {MAX_HEADER_BYTES}: {AGAIN}"
        )
    if length > size - 8:
        raise FileError(
            f"{what} is truncated: it claims a header of {length} bytes and has {size} in all; "
            f"{AGAIN}"
        )
    return file.read(length)


def map_file(file: BinaryIO, size: int) -> mapping.mmap | None:
    """The file's bytes, mapped; None where it became shorter."""
    try:
        if sys.version_info >= (3, 13):  # no descriptor is kept: a model may have 1,000 files
            return mapping.mmap(file.fileno(), size, access=mapping.ACCESS_READ, trackfd=False)
        return mapping.mmap(file.fileno(), size, access=mapping.ACCESS_READ)
    except ValueError:
        return None
    except OSError as error:
        raise FileError(
            f"{show_path(file.name)} cannot be mapped ({error.strerror}): pass mmap=False"
        ) from error


class Checkpoint:
    """A validated safetensors file: what it holds, and its tensors.

    Parameters
    ----------
    path : Path
        The file. Its size is compared with its header before the header is parsed.
    mmap : bool
        Map the file read-only (default), or copy it into memory.

    Raises
    ------
    FileError
        If the file is no regular file, is truncated, or its header is not what it must be.
    """

    def __init__(self, path: Path, *, mmap: bool = True) -> None:
        self.name = path.name
        fd, size = open_regular(path)
        with os.fdopen(fd, "rb") as file:
            self.tensors = check_header(self.name, read_header(file, self.name, size), size)
            file.seek(0)
            self._data: Any = map_file(file, size) if mmap else file.read(size)
        if self._data is None or len(self._data) != size:
            raise FileError(f"{self.name} changed while it was read: load it when it is complete")

    def read(self, name: str, *, wide: bool = False) -> NDArray[Any]:
        """A tensor, read-only, in the mapped bytes themselves where these can serve.

        float32; but matrices of half precision stay float16, or the bits of bfloat16 as uint16,
        unless ``wide``.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in WEIGHT_TYPES:
            raise FileError(
                f"{self.name}: tensor {show(name)} has dtype {tensor.dtype}: save the weights as "
                f"one of {', '.join(WEIGHT_TYPES)}"
            )
        flat = np.frombuffer(
            self._data, WEIGHT_TYPES[tensor.dtype], math.prod(tensor.shape), tensor.begin
        )
        return as_weight(flat.reshape(tensor.shape), wide)


def as_weight(array: NDArray[Any], wide: bool) -> NDArray[Any]:
    """An array as the models take it, read-only: float32, or a matrix of half precision as it is.
    A copy is made only where the memory cannot serve."""
    if array.dtype.itemsize == 2 and (wide or array.ndim < 2):
        array = widen(array)
    real = array.dtype.newbyteorder("=") if array.dtype.itemsize == 2 else np.float32
    array = np.require(array, real, ["A", "C"]).view()
    array.flags.writeable = False
    return array


def nearest(name: str, known: Sequence[str]) -> str:
    """The known names, those most like `name` first, for an error message."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=3, cutoff=0.5)
    return ", ".join(close or sorted(known))
