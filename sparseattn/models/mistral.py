"""Mistral: LLaMA with a sliding window in every layer.

Jiang et al., "Mistral 7B", 2023, arXiv:2310.06825, section 2; names and defaults as in Hugging
Face's ``MistralForCausalLM``.
"""

from __future__ import annotations

from dataclasses import replace

from sparseattn.models.common import Config
from sparseattn.models.fields import Fields
from sparseattn.models.llama import LLAMA, SIZES, read_alike
from sparseattn.models.windows import read_window

MISTRAL_SIZES = SIZES | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def read_config(fields: Fields) -> Config:
    """Mistral's config.json; a null ``sliding_window`` is none, an absent one 4096."""
    config = read_alike(fields, "mistral", MISTRAL_SIZES)
    return replace(config, windows=(read_window(fields, 4096),) * config.n_layers)


MISTRAL = replace(LLAMA, name="mistral", read_config=read_config)
