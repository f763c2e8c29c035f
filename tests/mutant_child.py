"""Loads damaged folders in a process with 1 GiB of address space and 5 seconds for each.

    python mutant_child.py FOLDER FIRST COUNT SEED

FOLDER is an empty one to work in. Prints each number before its turn, and at the end JSON: how many
ended how, and the traceback of each that ended otherwise than by success or a SparseAttnError.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from mutants import Files, mutate
from tiny_models import pack_tensors

import sparseattn as sa
from sparseattn.errors import SparseAttnError

LIMIT, SECONDS = 2**30, 5
SMALL = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 32, "vocab_size": 300},
    "llama": SMALL | {"num_key_value_heads": 1, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "qwen3": SMALL | {"num_key_value_heads": 2, "head_dim": 4, "eos_token_id": [1, 2]},
    "gpt_neox": SMALL | {"rotary_pct": 0.5},
    "bert": SMALL | {"type_vocab_size": 2},
}


def honest(family: str, folder: Path) -> Files:
    """The files of a tiny model; some sharded, some of half precision, each with a tokenizer."""
    config = {"model_type": family, "bos_token_id": 0, "eos_token_id": 1} | KINDS[family]
    files: Files = {"config.json": json.dumps(config).encode()}
    (folder / "config.json").write_bytes(files["config.json"])
    model = sa.Model.from_pretrained(folder, random_weights=0)
    weights = {name: np.asarray(value, np.float32) for name, value in model._values.items()}
    if family in ("llama", "bert"):
        places = {n: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, n in enumerate(weights)}
        for file in set(places.values()):
            part = {n: w for n, w in weights.items() if places[n] == file}
            files[file] = pack_tensors(part, "BF16")
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    else:
        files["model.safetensors"] = pack_tensors(weights)
    return files | tokenizer(family) | {"generation_config.json": b'{"eos_token_id": [1, 2]}'}


def tokenizer(family: str) -> Files:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: i for i, piece in enumerate([*alphabet, "th", "the", "Ġthe", "in"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n")]
    settings = {"tokenizer_config.json": b'{"bos_token": "a", "eos_token": {"content": "b"}}'}
    if family == "gpt2":
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        return settings | {
            "vocab.json": json.dumps(pieces).encode(),
            "merges.txt": "\n".join(lines).encode(),
        }
    if family == "bert":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##s", *"abcdefghi"]
        return {
            "vocab.txt": "\n".join([*words, ""]).encode(),
            "tokenizer_config.json": b'{"do_lower_case": true}',
            "modules.json": json.dumps(
                [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
            ).encode(),
            "1_Pooling/config.json": b'{"word_embedding_dimension": 8, "pooling_mode": "mean"}',
        }
    engine = Tokenizer(models.BPE(pieces, merges))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return settings | {"tokenizer.json": engine.to_str().encode()}


def use(folder: Path) -> None:
    """Load, run, encode and decode."""
    model = sa.Model.from_pretrained(folder)
    last = model.config.vocab_size - 1
    ids = np.minimum([5, 6, 7], last)[: model.config.context]
    model(ids)
    if model.tokenizer is not None:
        model.tokenizer.decode(model.tokenizer.encode("the thing, in 12 é\n"))
        model.tokenizer.encode("the", special=True)


def write(folder: Path, name: str, data: bytes) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def main() -> dict[str, Any]:
    work, first, count, seed = Path(sys.argv[1]), *map(int, sys.argv[2:])
    bases: list[tuple[Path, Files]] = []
    for family in KINDS:
        folder = work / family
        folder.mkdir()
        files = honest(family, folder)
        for name, data in files.items():
            write(folder, name, data)
        use(folder)  # honest as it is
        bases.append((folder, files))
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    np.seterr(all="ignore")
    outcomes: Counter[str] = Counter()
    wrong = {}
    for number in range(first, first + count):
        print(number, flush=True)
        folder, files = bases[number % len(bases)]
        name, data = mutate(files, number, seed)
        write(folder, name, data)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # ends the process
        try:
            use(folder)
            outcomes["success"] += 1
        except SparseAttnError as error:
            outcomes[type(error).__name__] += 1
        except Exception:
            wrong[number] = f"{folder.name}/{name}\n{traceback.format_exc()}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        write(folder, name, files[name])
    shutil.rmtree(work)
    return {"outcomes": outcomes, "wrong": wrong}


if __name__ == "__main__":
    print(json.dumps(main()))
