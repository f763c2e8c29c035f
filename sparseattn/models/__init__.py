"""Models from checkpoint folders, with their attention replaceable: see `Model`."""

from __future__ import annotations

from sparseattn.models.common import Config
from sparseattn.models.model import Model
from sparseattn.models.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Config", "Model", "Tokenizer", "load_tokenizer"]
