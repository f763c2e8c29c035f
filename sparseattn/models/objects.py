"""A transformers model as weights and configuration: its own memory, where that can serve.

Nothing of transformers or PyTorch is imported: whoever gives such a model has loaded both.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseattn.errors import ArgumentError, DtypeError, NotSupported
from sparseattn.models.checkpoint import WEIGHT_TYPES, Tensor, as_weight, show
from sparseattn.models.tokenizer import Tokenizer

# torch's names of the types that a weight may have, as files name them.
TORCH_TYPES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16"}


def is_model(value: object) -> bool:
    """Whether this is a transformers model, or made like one."""
    config = getattr(value, "config", None)
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(config, "to_dict", None)
    )


class ModelObject:
    """The parameters of a transformers model, with the face of a file.

    Names that stand for memory of an earlier name are left out where the configuration ties
    them, as they are when such a model is saved.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On the CPU, float32, float64, float16 or bfloat16.

    copy : bool
        Whether later changes of that model leave this one alone.

    Attributes
    ----------
    config, generation_config : dict
        What config.json and generation_config.json of the saved model would hold.

    Raises
    ------
    NotSupported
        If a tensor is on another device, or is quantised, sparse or without data.
    """

    def __init__(self, model: Any, *, copy: bool = False) -> None:
        model = getattr(model, "_orig_mod", model)  # of a compiled one
        self.name = type(model).__name__
        self.config = as_saved(model.config) | {"architectures": [self.name]}
        self.generation_config = as_saved(getattr(model, "generation_config", None))
        self._copy = copy
        tied = self.config.get("tie_word_embeddings") is not False
        self.tensors: dict[str, Tensor] = {}
        self._values: dict[str, Any] = {}
        owners: dict[tuple[Any, ...], str] = {}
        for name, value in model.state_dict().items():
            tensor = self._describe(name, value)
            if value.numel() and tied:
                where = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
                if owners.setdefault(where, name) != name:
                    continue
            self.tensors[name], self._values[name] = tensor, value

    def _describe(self, name: str, value: Any) -> Tensor:
        where = f"{self.name}: tensor {show(name)}"
        if not hasattr(value, "layout"):
            raise NotSupported(f"{where} is a {type(value).__name__}: give a model of tensors")
        device, layout = str(value.device.type), str(value.layout)
        if device == "meta":
            raise NotSupported(f"{where} has no data: load the model before it is given")
        if device != "cpu":
            raise NotSupported(f"{where} is on {device}: give model.cpu()")
        kind = str(value.dtype).removeprefix("torch.")
        if layout != "torch.strided" or value.is_quantized:
            raise NotSupported(f"{where} is sparse or quantised: give a model of plain tensors")
        return Tensor(TORCH_TYPES.get(kind, kind), tuple(value.shape), 0, 0)

    def read(self, name: str, *, wide: bool = False) -> NDArray[Any]:
        """A tensor, read-only: float32 and half matrices are the model's own memory."""
        kind = self.tensors[name].dtype
        if kind not in WEIGHT_TYPES:
            raise ArgumentError(
                f"{self.name}: tensor {show(name)} has dtype {kind}: convert the model with "
                "model.float()"
            )
        value = self._values[name].detach()
        if kind == "BF16":  # NumPy has no such type: its bits
            value = value.view(sys.modules["torch"].int16)
        try:
            array: NDArray[Any] = value.numpy()
        except (RuntimeError, TypeError) as error:
            raise NotSupported(
                f"{self.name}: tensor {show(name)} cannot be read as an array "
                f"({show(str(error))}): give a model of plain tensors"
            ) from error
        array = array.view(np.uint16) if kind == "BF16" else array
        return as_weight(array.copy() if self._copy else array, wide)


def as_saved(config: Any) -> dict[str, Any]:
    """A configuration object as its JSON file would be read; none reads as empty."""
    values = {} if config is None else config.to_dict()
    saved: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return saved


def tokenizer_of(value: Any) -> Tokenizer:
    """The tokenizer of a transformers tokenizer object, as a copy."""
    engine: Any = getattr(value, "backend_tokenizer", None)
    if not callable(getattr(engine, "to_str", None)):
        raise DtypeError(
            f"tokenizer is a {type(value).__name__}: give a folder, a tokenizer.json, or a fast "
            "tokenizer of transformers"
        )
    special = {role: str(piece) for role, piece in value.special_tokens_map.items()}
    return Tokenizer(type(engine).from_str(engine.to_str()), special)
