"""The weights of a folder: one safetensors file, or several that an index JSON names.

The index comes from a stranger and names files, so a name is what writers of shards make it: plain,
and the same file under the rules of every system. Whether a name leaves the folder is never asked
of resolved links: in a hub cache every file is a link into a folder beside it.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sparseattn.errors import FileError
from sparseattn.models.checkpoint import (
    AGAIN,
    MAX_NAME_BYTES,
    MAX_TENSORS,
    Checkpoint,
    Tensor,
    TensorSource,
    parse_json,
    read_text,
    show,
    show_path,
)

MAX_INDEX_BYTES = 32 * 2**20
MAX_INDEX_DEPTH = 8
MAX_INDEX_VALUES = 2 * MAX_TENSORS  # names in the map, and what else the index holds
MAX_SHARDS = 1000
MAX_SHARD_NAME = 255  # bytes, as file systems have it

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")

# Letters, digits and three signs leave no separator, drive, stream or second spelling to any
# system; Windows gives some stems to devices, in any folder and with any ending.
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
DEVICE_NAME = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def open_weights(folder: Path, *, mmap: bool = True) -> TensorSource:
    """The folder's tensors, or an error that says what to do about what is there."""
    path = folder / WEIGHTS_FILE
    if os.path.lexists(path):
        return Checkpoint(path, mmap=mmap)
    path = folder / INDEX_FILE
    if os.path.lexists(path):
        return Shards(path, mmap=mmap)
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLED)
    if pickled:
        source = shlex.quote(str(folder))
        target = shlex.quote(str(folder) + "-safetensors")
        raise FileError(
            f"{pickled[0]} is a pickle, which can run code when it is read, and is refused: "
            'convert it with python -c "import sys, transformers as t; '
            "n = t.AutoConfig.from_pretrained(sys.argv[1]).architectures or "
            "['AutoModelForCausalLM']; M = getattr(t, n[0]); "
            f'M.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])" {source} {target}'
        )
    raise FileError(
        f"folder {show_path(folder)} has no {WEIGHTS_FILE} or {INDEX_FILE}: add it, or pass "
        "random_weights=0 for random parameters"
    )


def read_index(path: Path) -> dict[str, str]:
    """Tensor to file name, as an index JSON has it, with both known to be names."""
    what = path.name
    text = read_text(path, MAX_INDEX_BYTES)
    index = parse_json(text, what, MAX_INDEX_DEPTH, MAX_INDEX_VALUES)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not 1 <= len(files) <= MAX_TENSORS:
        raise FileError(f"{what} has no weight_map of 1 to {MAX_TENSORS} tensors by file: {AGAIN}")
    spelled: dict[str, str] = {}
    for tensor, file in files.items():
        if len(tensor.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES or "\0" in tensor:
            raise FileError(
                f"{what}: tensor {show(tensor)} has a name with a NUL or of over "
                f"{MAX_NAME_BYTES} bytes: {AGAIN}"
            )
        check_shard_name(what, tensor, file)
        other = spelled.setdefault(file.lower(), file)
        if other != file:
            raise FileError(
                f"{what} names both {show(other)} and {show(file)}, which are one file where case "
                f"does not count: {AGAIN}"
            )
        if len(spelled) > MAX_SHARDS:
            raise FileError(f"{what} names more than {MAX_SHARDS} files: {AGAIN}")
    return files


def check_shard_name(what: str, tensor: str, file: Any) -> None:
    if (
        not isinstance(file, str)
        or len(file) > MAX_SHARD_NAME
        or not SHARD_NAME.fullmatch(file)
        or ".." in file
        or DEVICE_NAME.fullmatch(file)
    ):
        raise FileError(
            f"{what} puts tensor {show(tensor)} into file {show(file)}, but a shard has a plain "
            "name of letters, digits, '_', '-' and single '.' that ends in .safetensors: do not "
            "load this folder, or correct the index"
        )


class Shards:
    """The files of a sharded checkpoint, with the face of one `Checkpoint`.

    Every file is opened and its header checked, and the index and the headers must say the same,
    before any tensor is read.

    Parameters
    ----------
    path : Path
        The index. Its files lie beside it.
    mmap : bool
        As for `Checkpoint`.

    Raises
    ------
    FileError
        If the index or a file is not what it must be, or they disagree.
    """

    def __init__(self, path: Path, *, mmap: bool = True) -> None:
        self.name = path.name
        self._files = read_index(path)
        by_file: dict[str, list[str]] = {}
        for tensor, file in self._files.items():
            by_file.setdefault(file, []).append(tensor)
        self._shards: dict[str, Checkpoint] = {}
        count = 0
        for file, listed in by_file.items():
            shard = self._shards[file] = Checkpoint(path.parent / file, mmap=mmap)
            count += len(shard.tensors)
            if count > MAX_TENSORS:
                raise FileError(f"{self.name}: its files hold over {MAX_TENSORS} tensors: {AGAIN}")
            absent = next((tensor for tensor in listed if tensor not in shard.tensors), None)
            if absent is not None:
                raise FileError(
                    f"{self.name} puts tensor {show(absent)} into {file}, which does not hold it: "
                    f"{AGAIN}"
                )
        for file, shard in self._shards.items():
            self._check_listed(file, shard)
        self.tensors: dict[str, Tensor] = {
            tensor: self._shards[file].tensors[tensor] for tensor, file in self._files.items()
        }

    def _check_listed(self, file: str, shard: Checkpoint) -> None:
        """No tensor of a file is unknown to the index, or in a second file."""
        for tensor in shard.tensors:
            listed = self._files.get(tensor)
            if listed is None:
                raise FileError(
                    f"{file} holds tensor {show(tensor)}, which {self.name} does not list: {AGAIN}"
                )
            if listed != file:
                raise FileError(
                    f"tensor {show(tensor)} is in {listed} and in {file}, and {self.name} lists "
                    f"one: {AGAIN}"
                )

    def read(self, name: str, *, wide: bool = False) -> NDArray[Any]:
        """A tensor, as `Checkpoint.read` gives it."""
        return self._shards[self._files[name]].read(name, wide=wide)
