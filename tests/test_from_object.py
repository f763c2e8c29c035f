"""A transformers model as ours: the same numbers, the same memory, and what it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import requires
from tiny_models import GPT2_CONFIG, LLAMA_CONFIG

import sparseattn as sa
from sparseattn.errors import ArgumentError, DtypeError, FileError, NotSupported
from sparseattn.models import Model

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")

IDS = np.random.default_rng(0).integers(3, 61, (2, 20))
TINY = {n: v for n, v in LLAMA_CONFIG.items() if n not in ("model_type", "eos_token_id")}
BERT = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "vocab_size": 61,
    "max_position_embeddings": 48,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {n: v for n, v in GPT2_CONFIG.items() if n != "model_type"}),
    "llama": ("Llama", TINY),
    "llama-tied": ("Llama", TINY | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", TINY | {"head_dim": 4}),
    "gpt_neox": ("GPTNeoX", {n: v for n, v in TINY.items() if n != "num_key_value_heads"}),
    "bert": ("Bert", BERT),
}


def make(name: str, dtype: str = "float32") -> Any:
    torch, transformers = requires("torch"), requires("transformers")
    family, config = MODELS[name]
    torch.manual_seed(0)
    head = (
        "ForMaskedLM" if family == "Bert" else "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    )
    made = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, family + head)(made).eval()
    return model.to(getattr(torch, dtype))


def logits(theirs: Any) -> np.ndarray:
    torch = requires("torch")
    with torch.no_grad():
        found: np.ndarray = theirs(torch.from_numpy(IDS)).logits.float().numpy()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_memory_and_fingerprint(name: str, tmp_path: Path) -> None:
    """As transformers computes; in its memory; and the model that its saved folder is."""
    theirs = make(name)
    ours = Model.from_pretrained(theirs)
    assert np.abs(ours(IDS) - logits(theirs)).max() <= 2e-5
    pointers = {value.data_ptr() for value in theirs.state_dict().values()}
    for short, value in ours._values.items():
        assert value.ctypes.data in pointers, short
        assert value.dtype == np.float32 and not value.flags.writeable
    theirs.save_pretrained(tmp_path)
    saved = Model.from_pretrained(tmp_path)
    assert ours.config == saved.config and ours.n_parameters == saved.n_parameters
    assert ours.fingerprint == saved.fingerprint
    assert ours.folder is None and ours.tokenizer is None


def test_compare_takes_it(tmp_path: Path, no_reference: None) -> None:
    """With the losses of the folder that it is saved to."""
    theirs = make("llama")
    theirs.save_pretrained(tmp_path)
    how = {"text": IDS.ravel().tolist(), "attention": "window:4", "context": 8, "time_budget": 0}
    one, other = (sa.compare(m, **how).to_dict() for m in (theirs, tmp_path))
    assert one["evaluation"]["model"] == "LlamaForCausalLM"
    assert [row["nll"] for row in one["rows"]] == [row["nll"] for row in other["rows"]]
    assert one["rows"][0]["nll"] != one["rows"][1]["nll"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_storage_types(dtype: str) -> None:
    theirs = make("llama", dtype)
    ours = Model.from_pretrained(theirs)
    assert np.abs(ours(IDS) - logits(theirs.float())).max() <= 2e-5
    wide = Model.from_pretrained(make("llama", dtype), dtype="float32")
    assert {value.dtype for value in wide._values.values()} == {np.dtype("f4")}
    assert np.abs(wide(IDS) - ours(IDS)).max() <= 1e-6


def test_half_matrices_are_not_copied() -> None:
    theirs = make("llama", "bfloat16")
    ours = Model.from_pretrained(theirs)
    embed = theirs.get_input_embeddings().weight
    mine = next(v for n, v in ours._values.items() if n.startswith("embed"))
    assert mine.dtype == np.uint16 and mine.ctypes.data == embed.data_ptr()


def test_training_goes_on_in_shared_memory_and_not_in_a_copy() -> None:
    torch = requires("torch")
    theirs = make("gpt2")
    shared, copied = Model.from_pretrained(theirs), Model.from_pretrained(theirs, mmap=False)
    before = copied(IDS)
    np.testing.assert_array_equal(shared(IDS), before)
    with torch.no_grad():
        theirs.get_input_embeddings().weight *= 1.5
    np.testing.assert_array_equal(copied(IDS), before)
    assert np.abs(shared(IDS) - logits(theirs)).max() <= 2e-5
    assert np.abs(shared(IDS) - before).max() > 1e-3


def test_a_view_that_is_not_contiguous() -> None:
    torch = requires("torch")
    theirs = make("llama")
    linear = theirs.model.layers[0].mlp.up_proj
    want = logits(theirs)
    linear.weight = torch.nn.Parameter(linear.weight.detach().T.contiguous().T)
    assert not linear.weight.is_contiguous()
    assert np.abs(Model.from_pretrained(theirs)(IDS) - want).max() <= 2e-5


def test_a_head_of_its_own_where_the_configuration_ties() -> None:
    """As in a file: the head that is there is used."""
    torch = requires("torch")
    theirs = make("llama-tied")
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.lm_head.weight))
    assert np.abs(Model.from_pretrained(theirs)(IDS) - logits(theirs)).max() <= 2e-5


def test_a_head_that_is_tied_against_the_configuration() -> None:
    theirs = make("llama")
    theirs.lm_head.weight = theirs.model.embed_tokens.weight
    ours = Model.from_pretrained(theirs)
    assert np.abs(ours(IDS) - logits(theirs)).max() <= 2e-5


def test_its_tokenizer() -> None:
    transformers, tokenizers = requires("transformers"), requires("tokenizers")
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "b": 2}, "a"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>")
    theirs.backend_tokenizer.enable_truncation(2)
    ours = Model.from_pretrained(make("llama"), tokenizer=theirs).tokenizer
    assert ours is not None and ours.bos_token_id == 0
    assert ours.encode("b a b a") == [2, 1, 2, 1]
    assert theirs.backend_tokenizer.truncation is not None  # theirs was left as it is


def test_what_is_refused() -> None:
    torch = requires("torch")
    theirs = make("llama")
    with pytest.raises(ArgumentError, match="random_weights is given with a model"):
        Model.from_pretrained(theirs, random_weights=0)
    with pytest.raises(DtypeError, match="tokenizer is a int: give a folder"):
        Model.from_pretrained(theirs, tokenizer=3)
    with pytest.raises(FileError, match=r"LlamaModel: tensor 'lm_head.weight' of a llama model is"):
        Model.from_pretrained(theirs.model)
    with torch.device("meta"):
        empty = type(theirs)(theirs.config)
    with pytest.raises(NotSupported, match=r"LlamaForCausalLM: tensor 'model.embed.* has no data"):
        Model.from_pretrained(empty)
    theirs.config.num_hidden_layers = 4
    with pytest.raises(FileError, match=r"LlamaForCausalLM: tensor .* of a llama model is missing"):
        Model.from_pretrained(theirs)
    theirs.config.num_hidden_layers = 10**6
    with pytest.raises(FileError, match=r"LlamaForCausalLM.config: num_hidden_layers is 1000000: "):
        Model.from_pretrained(theirs)
    theirs.config.num_hidden_layers = 3
    theirs.model.norm.register_parameter(
        "weight", torch.nn.Parameter(torch.ones(32, dtype=torch.int32), requires_grad=False)
    )
    with pytest.raises(
        ArgumentError, match=r"'model.norm.weight' has dtype int32: convert the mod"
    ):
        Model.from_pretrained(theirs)


def fake(**changes: Any) -> Any:
    """A model of tensors that are not torch's, one of them with a fault."""
    plain: dict[str, Any] = {
        "device": SimpleNamespace(type="cpu"),
        "layout": "torch.strided",
        "dtype": "torch.float32",
        "shape": (61, 32),
        "is_quantized": False,
        "numel": lambda: 61 * 32,
        "data_ptr": lambda: 64,
        "stride": lambda: (32, 1),
    }
    config = SimpleNamespace(to_dict=lambda: LLAMA_CONFIG | {"num_hidden_layers": 1})
    tensor = SimpleNamespace(**(plain | changes))
    return SimpleNamespace(config=config, state_dict=lambda: {"model.embed_tokens.weight": tensor})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"device": SimpleNamespace(type="cuda")}, r"is on cuda: give model.cpu\(\)"),
        ({"device": SimpleNamespace(type="meta")}, "has no data: load the model before it is"),
        ({"layout": "torch.sparse_csr"}, "is sparse or quantised: give a model of plain tensors"),
        ({"is_quantized": True}, "is sparse or quantised"),
    ],
)
def test_tensors_that_cannot_be_read(changes: dict[str, Any], sentence: str) -> None:
    """Without torch: what the object says of itself decides."""
    with pytest.raises(NotSupported, match=sentence):
        Model.from_pretrained(fake(**changes))


def test_objects_that_are_no_models() -> None:
    for value in (3, object(), SimpleNamespace(config={}), np.zeros(3)):
        with pytest.raises(DtypeError, match="give a folder's name or a transformers model"):
            Model.from_pretrained(value)
    strange = SimpleNamespace(
        config=SimpleNamespace(to_dict=lambda: {"model_type": "mixtral"}), state_dict=dict
    )
    with pytest.raises(FileError, match=r"SimpleNamespace.config: model_type is 'mixtral': known"):
        Model.from_pretrained(strange)


def test_torch_is_not_imported() -> None:
    """Neither by a folder nor by an object that only looks like a model."""
    code = (
        "import sys, types, sparseattn as sa\n"
        "sa.Model.from_pretrained()\n"
        "config = types.SimpleNamespace(to_dict=dict)\n"
        "try: sa.Model.from_pretrained(types.SimpleNamespace(config=config, state_dict=dict))\n"
        "except sa.SparseAttnError: pass\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
