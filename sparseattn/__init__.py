"""Sparse attention on the CPU: which keys a query sees is a spec, the rest is one interface.

``attention`` (with ``Cache`` for decoding), ``attention_vjp`` for its gradients, ``plan`` for what
a spec keeps, ``merge`` of parts; ``scaled_dot_product_attention`` as in PyTorch; ``Model`` runs
checkpoints, ``use`` replaces their attention, ``compare`` says what that does to them.
``specs()`` lists the variants.

>>> import numpy as np, sparseattn as sa
>>> q = k = v = np.random.default_rng(0).standard_normal((1, 8, 256, 64), np.float32)
>>> sa.attention(q, k, v, sa.TopK(16), causal=True).shape
(1, 8, 256, 64)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparseattn import _core
from sparseattn.attention import attention, plan
from sparseattn.cache import Cache
from sparseattn.config import get_num_threads, set_num_threads, show_config
from sparseattn.errors import (
    ArgumentError,
    CacheInUse,
    DtypeError,
    FileError,
    InternalError,
    NotSupported,
    OutOfMemory,
    SparseAttnError,
    UnknownArgument,
)
from sparseattn.gradients import attention_vjp
from sparseattn.merge import merge, merge_vjp
from sparseattn.plan import Plan
from sparseattn.sdpa import scaled_dot_product_attention
from sparseattn.use import use
from sparseattn.variants import (
    BlockMask,
    Dense,
    Intersection,
    PerHead,
    PerLayer,
    Prefix,
    RandomKeys,
    TopK,
    Union,
    Variant,
    Window,
    parse,
    specs,
)

if TYPE_CHECKING:
    from sparseattn.evaluation.compare import compare
    from sparseattn.models import Model

__version__: str = _core.__version__

__all__ = [
    # attention
    "attention",
    "scaled_dot_product_attention",
    "attention_vjp",
    "merge",
    "merge_vjp",
    "plan",
    "Plan",
    "Cache",
    # specs
    "parse",
    "specs",
    "Variant",
    "Dense",
    "Window",
    "Prefix",
    "BlockMask",
    "TopK",
    "RandomKeys",
    "Union",
    "Intersection",
    "PerHead",
    "PerLayer",
    # models and evaluation
    "Model",
    "use",
    "compare",
    # what runs
    "show_config",
    "get_num_threads",
    "set_num_threads",
    # errors
    "SparseAttnError",
    "ArgumentError",
    "CacheInUse",
    "DtypeError",
    "FileError",
    "InternalError",
    "NotSupported",
    "OutOfMemory",
    "UnknownArgument",
]

# Imported at first use: they bring the standard library's heavier half, tokenizers, safetensors.
_LAZY = {
    "Model": "sparseattn.models",
    "compare": "sparseattn.evaluation.compare",
    "plots": "sparseattn.plots",
    "testing": "sparseattn.testing",
}


def __getattr__(name: str) -> Any:
    home = _LAZY.get(name)
    if home is None:
        raise AttributeError(f"module 'sparseattn' has no attribute {name!r}")
    module = importlib.import_module(home)
    value = module if home == f"sparseattn.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


if _core.isa_refused() is not None:
    import warnings

    warnings.warn(
        f"SPARSEATTN_ISA={_core.isa_refused()} is none of {', '.join(_core.isas())}, which this "
        f"CPU has: {_core.isa()} runs",
        RuntimeWarning,
        stacklevel=2,
    )
