"""Problems to make plans for, shared by the tests of plans: awkward sizes, masks, paddings.

Plans are made of sizes and masks alone, so q and k are thin.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from reference.attention import causal_mask

from sparseattn import _core

Array = np.ndarray
Sizes = tuple[int, int, int, int, int]  # batch, heads, kv_heads, n_q, n_k

SIZES: list[Sizes] = [
    (1, 1, 1, 1, 1),
    (2, 6, 2, 63, 63),
    (1, 6, 2, 65, 65),
    (1, 2, 1, 257, 257),
    (2, 2, 2, 70, 200),
    (2, 2, 1, 200, 70),
    (1, 1, 1, 0, 5),
    (1, 1, 1, 5, 0),
    (0, 2, 1, 4, 4),
]
size_ids = ["x".join(map(str, sizes)) for sizes in SIZES]
CAUSAL = {0: None, 1: "bottom_right", 2: "top_left"}


def thin(sizes: Sizes, dtype: Any = np.float32, width: int = 4) -> tuple[Array, Array]:
    batch, heads, kv_heads, n_q, n_k = sizes
    rng = np.random.default_rng(sizes)
    q = rng.standard_normal((batch, heads, n_q, width)).astype(dtype)
    return q, rng.standard_normal((batch, kv_heads, n_k, width)).astype(dtype)


def problem(causal: int = 0, mask: Array | None = None, key_mask: Array | None = None) -> Any:
    return (causal, 0.5, 0.0, mask, None, key_mask)


def build(name: str, sizes: Sizes, of: Any = None, params: Any = None, **fields: Any) -> _core.Plan:
    q, k = thin(sizes)
    return _core.plan_build(name, SimpleNamespace(**fields), params, q, k, of or problem())


def window(sizes: Sizes, of: Any = None, **fields: Any) -> _core.Plan:
    options = {"left": -1, "right": -1, "sinks": 0, "globals": (), **fields}
    return build("window", sizes, of, **options)


# ---- masks and paddings that a row may be under -------------------------------------------------


def no_masks(sizes: Sizes) -> tuple[None, None]:
    return None, None


def right_padding(sizes: Sizes) -> tuple[None, Array]:
    n_k = sizes[4]
    return None, np.arange(n_k) < np.linspace(n_k, n_k // 3, sizes[0]).astype(int)[:, None]


def left_padding(sizes: Sizes) -> tuple[None, Array]:
    n_k = sizes[4]
    return None, np.arange(n_k) >= np.linspace(n_k // 4, n_k, sizes[0]).astype(int)[:, None]


def padding_with_holes(sizes: Sizes) -> tuple[None, Array]:
    keys = np.arange(sizes[4])
    return None, (keys % 5 != 2) & (keys < sizes[4] - 3) & np.ones((sizes[0], 1), bool)


def documents(sizes: Sizes) -> tuple[Array, None]:
    batch, heads, _, n_q, n_k = sizes
    same = np.arange(n_q)[:, None] // 37 == np.arange(n_k) // 37
    return np.broadcast_to(same, (batch, heads, n_q, n_k)), None


def random_mask(sizes: Sizes) -> tuple[Array, None]:
    batch, heads, _, n_q, n_k = sizes
    mask = np.random.default_rng(sizes).random((batch, heads, n_q, n_k)) < 0.3
    mask[..., n_q // 2 :, :] &= np.arange(n_k) < n_k // 2
    mask[..., : n_q // 4, :] = False
    return mask, None


def shared_by_heads(sizes: Sizes) -> tuple[Array, None]:
    mask, _ = random_mask(sizes)
    return np.broadcast_to(mask[:, :1], mask.shape), None


def transposed(sizes: Sizes) -> tuple[Array, None]:
    mask, _ = random_mask(sizes)
    turned = np.ascontiguousarray(mask.swapaxes(2, 3)).swapaxes(2, 3)
    turned.view(np.uint8)[turned] = 2  # true is whatever is not zero
    return turned, None


def blocks_of_64(sizes: Sizes) -> tuple[Array, None]:
    batch, heads, _, n_q, n_k = sizes
    at = (np.arange(n_q) // 64)[:, None] * 3 + np.arange(n_k) // 64
    return np.broadcast_to(at % 2 == 0, (batch, heads, n_q, n_k)), None


def mask_and_holes(sizes: Sizes) -> tuple[Array, Array]:
    return random_mask(sizes)[0], padding_with_holes(sizes)[1]


def whole_mask_and_padding(sizes: Sizes) -> tuple[Array, Array]:
    batch, heads, _, n_q, n_k = sizes
    return np.ones((batch, heads, n_q, n_k), bool), right_padding(sizes)[1]


MASKS: list[Callable[[Sizes], tuple[Array | None, Array | None]]] = [
    no_masks,
    right_padding,
    left_padding,
    padding_with_holes,
    documents,
    random_mask,
    shared_by_heads,
    transposed,
    blocks_of_64,
    mask_and_holes,
    whole_mask_and_padding,
]
mask_names = [make.__name__ for make in MASKS]


def visible(sizes: Sizes, causal: int, mask: Array | None, key_mask: Array | None) -> Array:
    batch, heads, _, n_q, n_k = sizes
    see = np.ones((batch, heads, n_q, n_k), bool)
    if causal:
        see &= causal_mask(n_q, n_k, CAUSAL[causal])
    if mask is not None:
        see &= mask.view(np.uint8) != 0
    if key_mask is not None:
        see &= key_mask[:, None, None]
    return see
