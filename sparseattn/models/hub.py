"""From what a user calls a model to a local folder: a path, or the snapshot of a hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sparseattn.errors import ArgumentError, DtypeError, FileError
from sparseattn.models.checkpoint import CONFIG_FILE, show, show_path
from sparseattn.models.shards import INDEX_FILE, WEIGHTS_FILE, read_index

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
# What is read, and no second copy of the weights in another format or folder.
HUB_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.txt"]
HUB_IGNORED = ["*/*.safetensors", "consolidated*"]
READ_FILES = (".json", ".safetensors", ".txt")


def find_folder(folder: str | os.PathLike[str]) -> Path:
    """The local folder of a model: `folder` itself, or the hub's snapshot where it is an id."""
    if not isinstance(folder, str | bytes | os.PathLike):
        raise DtypeError(
            f"folder is a {type(folder).__name__}: give a folder's name or a transformers model"
        )
    name = os.fspath(folder)
    if not isinstance(name, str) or "\0" in name:
        raise ArgumentError(f"folder is {show(name)}, which is no path: give a folder's name")
    path = Path(name)
    if path.is_dir():
        return path
    if os.path.lexists(path):
        raise FileError(f"{show(name)} is a file: give the folder that holds it")
    if HUB_ID.fullmatch(name):
        return find_snapshot(name)
    raise FileError(f"folder {show(name)} does not exist: give a folder with {CONFIG_FILE}")


def find_snapshot(repo: str) -> Path:
    """The snapshot folder of a hub id, from the local cache where it is complete.

    Only where it is not, the network is asked; with ``HF_HUB_OFFLINE=1`` huggingface_hub itself
    refuses that. What is cached and enough serves where the network does not answer.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileError(
            f"folder {show(repo)} does not exist: give a local folder, or install the hub extra "
            "(pip install 'sparseattn[hub]') to load by Hugging Face id"
        ) from None
    failure: Exception | None = None
    for patterns, offline in ((HUB_FILES, True), (HUB_FILES, False), ([CONFIG_FILE], True)):
        try:
            folder = Path(
                snapshot_download(
                    repo,
                    allow_patterns=patterns,
                    ignore_patterns=HUB_IGNORED,
                    local_files_only=offline,
                )
            )
        except Exception as error:  # every release has its own for what is not there
            failure = failure if offline else error
            continue
        if not offline or missing(folder) is None:
            return folder
    raise FileError(
        f"{show(repo)} is neither a local folder, nor a whole model in the local cache, nor a "
        f"Hugging Face id that can be read ({type(failure).__name__}): check the name and the "
        "network"
    ) from failure


def missing(folder: Path) -> str | None:
    """A file that a snapshot needs and lacks, as downloads cut short leave it."""
    if not (folder / CONFIG_FILE).exists():
        return CONFIG_FILE
    if (folder / WEIGHTS_FILE).exists():
        return None
    if not (folder / INDEX_FILE).exists():
        return WEIGHTS_FILE
    files = dict.fromkeys(read_index(folder / INDEX_FILE).values())
    return next((file for file in files if not (folder / file).exists()), None)


def check_links(folder: Path) -> None:
    """Refuses links out of the folder or, in a hub cache, out of its ``models--...`` folder."""
    own = Path(os.path.abspath(folder))
    cache = (place for place in (own, *own.parents) if place.name.startswith("models--"))
    root = os.path.realpath(next(cache, own))
    for path in sorted((*own.iterdir(), *own.glob("*/config.json"))):  # 1_Pooling/config.json
        if path.suffix not in READ_FILES:
            continue
        if not Path(os.path.realpath(path)).is_relative_to(root):
            raise FileError(
                f"{show(path.name)} is a link that leaves {show_path(root)}: replace it by the "
                "file itself, or load without strict_symlinks"
            )
