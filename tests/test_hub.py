"""Models by Hugging Face id: the local cache first, then the network, else a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import requires
from test_shards import make_cache
from tiny_models import GPT2_CONFIG, gpt2_weights, save_folder

from sparseattn.errors import DtypeError, FileError
from sparseattn.models import Model
from sparseattn.models.hub import missing

Download = Callable[..., str]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Download], None]:
    """``hub(download)`` stands for an installed huggingface_hub; ids are no folders here."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    def install(download: Download) -> None:
        module = SimpleNamespace(snapshot_download=download)
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)

    return install


def whole(folder: Path) -> Path:
    return save_folder(folder, GPT2_CONFIG, gpt2_weights(GPT2_CONFIG))


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileError, match=r"'org/name' does not exist: .* 'sparseattn\[hub\]'"):
        Model.from_pretrained("org/name")


def test_the_cache_comes_before_the_network(hub: Any, tmp_path: Path) -> None:
    folder = whole(tmp_path / "snapshot")
    calls: list[tuple[str, bool]] = []

    def download(repo: str, *, local_files_only: bool = False, **rest: Any) -> str:
        calls.append((repo, local_files_only))
        if repo == "org/new" and local_files_only:
            raise OSError("not cached")
        return str(folder)

    hub(download)
    assert Model.from_pretrained("org/cached").folder == folder
    assert calls == [("org/cached", True)]
    assert Model.from_pretrained("org/new").folder == folder
    assert calls[1:] == [("org/new", True), ("org/new", False)]


def test_only_what_is_read_is_downloaded(hub: Any, tmp_path: Path) -> None:
    """No code, no pickles, and no second copy of the weights."""
    from fnmatch import fnmatch

    folder, asked = whole(tmp_path / "snapshot"), {}

    def download(repo: str, **rest: Any) -> str:
        asked.update(rest)
        return str(folder)

    hub(download)
    Model.from_pretrained("org/name")

    def taken(name: str) -> bool:
        return any(fnmatch(name, p) for p in asked["allow_patterns"]) and not any(
            fnmatch(name, p) for p in asked["ignore_patterns"]
        )

    wanted = ["config.json", "tokenizer.json", "model.safetensors", "merges.txt", "vocab.txt"]
    wanted += ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    wanted += ["modules.json", "1_Pooling/config.json"]
    assert [name for name in wanted if not taken(name)] == []
    unwanted = ["pytorch_model.bin", "modeling_x.py", "model.h5", "tf_model.msgpack", "README.md"]
    unwanted += ["onnx/model.onnx", "fp16/model.safetensors", "consolidated.safetensors", "a.pth"]
    assert [name for name in unwanted if taken(name)] == []


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "shard"])
def test_an_incomplete_snapshot_is_completed(gone: str, hub: Any, tmp_path: Path) -> None:
    """Older releases give what a broken download left; that is not taken for the model."""
    snapshot = make_cache(tmp_path)
    lost = snapshot / ("model-00002-of-00002.safetensors" if gone == "shard" else gone)
    if gone == "model.safetensors":
        lost = snapshot / "model.safetensors.index.json"
    kept = os.readlink(lost)
    lost.unlink()
    lost.symlink_to("../../blobs/gone")  # a blob that was not finished
    assert missing(snapshot) == lost.name.replace(".index.json", "")
    calls: list[bool] = []

    def download(repo: str, *, local_files_only: bool = False, **rest: Any) -> str:
        calls.append(local_files_only)
        if not local_files_only:
            lost.unlink()
            lost.symlink_to(kept)
        return str(snapshot)

    hub(download)
    assert Model.from_pretrained("org/name")([1, 2]).shape == (2, 61)
    assert calls == [True, False]


def test_what_is_cached_serves_without_a_network(hub: Any, tmp_path: Path) -> None:
    """Newer releases refuse a snapshot that lacks any file of the repository; a model whose
    weights are there needs no more."""
    snapshot = make_cache(tmp_path)

    def download(repo: str, *, allow_patterns: list[str], **rest: Any) -> str:
        if allow_patterns != ["config.json"]:
            raise ConnectionError("incomplete, and no network")
        return str(snapshot)

    hub(download)
    assert Model.from_pretrained("org/name")([1, 2]).shape == (2, 61)
    (snapshot / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileError, match=r"nor a whole model in the local cache.*ConnectionError"):
        Model.from_pretrained("org/name")


def test_a_hostile_index_in_the_cache(hub: Any, tmp_path: Path) -> None:
    snapshot = make_cache(tmp_path)
    index = snapshot / "model.safetensors.index.json"
    index.unlink()
    index.write_text(json.dumps({"weight_map": {"a": "../../../../secret.safetensors"}}))
    hub(lambda repo, **rest: str(snapshot))
    with pytest.raises(FileError, match="but a shard has a plain name"):
        Model.from_pretrained("org/name")


def test_an_id_that_cannot_be_read(hub: Any) -> None:
    def download(repo: str, *, local_files_only: bool = False, **rest: Any) -> str:
        raise LookupError("cached" if local_files_only else "gone")

    hub(download)
    with pytest.raises(FileError, match=r"'org/gone' is neither a local folder, .*\(LookupError\)"):
        Model.from_pretrained("org/gone")


@pytest.mark.parametrize(
    "name",
    ["../up", "./here/model", "/no/such", "a/b/c", "org/na me", "-x/y", "org/\u0431", "no such"],
)
def test_names_that_never_reach_the_hub(name: str, hub: Any) -> None:
    asked: list[str] = []
    hub(lambda repo, **rest: asked.append(repo))
    with pytest.raises(FileError, match="does not exist: give a folder"):
        Model.from_pretrained(name)
    assert not asked


def test_wrong_things() -> None:
    with pytest.raises(DtypeError, match="folder is a int: give a folder's name"):
        Model.from_pretrained(3)


# ---- the real package, without a network --------------------------------------------------------

CHILD = """
import json, sys, sparseattn as sa
result = {}
for repo in sys.argv[1:]:
    try:
        model = sa.Model.from_pretrained(repo, strict_symlinks=True)
        result[repo] = [len(model([1, 2])), model.fingerprint]
    except sa.SparseAttnError as error:
        result[repo] = str(error)
print(json.dumps(result))
"""


def test_the_real_package_offline(tmp_path: Path) -> None:
    """A cache as huggingface_hub keeps it, read by huggingface_hub with HF_HUB_OFFLINE=1: whole,
    with a shard that is gone, and not there at all."""
    requires("huggingface_hub")
    snapshot = make_cache(tmp_path, "org/sharded")
    broken = make_cache(tmp_path, "org/broken")
    (broken / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "org/sharded", "org/broken", "org/absent"],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path / "empty",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["org/sharded"] == [2, Model.from_pretrained(snapshot).fingerprint]
    assert "model-00001-of-00002.safetensors' is missing" in result["org/broken"]
    assert "'org/absent' is neither a local folder" in result["org/absent"]
