"""PyTorch CPU tensors in and out, sharing memory, without gradients for now."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from sparseattn.errors import ArgumentError, DtypeError, NotSupported

WIDENED = (torch.float16, torch.bfloat16)  # computed in float32


def to_numpy(name: str, tensor: torch.Tensor) -> NDArray[Any]:
    """An ndarray on the tensor's memory; half precision is widened into a float32 copy.

    Raises
    ------
    ArgumentError
        If the tensor is not on the CPU or not dense.
    NotSupported
        If it would need a gradient.
    """
    if tensor.device.type != "cpu":
        raise ArgumentError(
            f"{name} is on device {tensor.device} and sparseattn computes on the CPU: "
            f"pass {name}.cpu()"
        )
    if tensor.layout != torch.strided:
        raise ArgumentError(f"{name} has layout {tensor.layout}: pass {name}.to_dense()")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotSupported(
            f"{name} requires grad, and gradients come in a later version: "
            f"pass {name}.detach(), or call under torch.no_grad()"
        )
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype in WIDENED:
        tensor = tensor.float()
    try:
        array: NDArray[Any] = tensor.numpy()
    except TypeError:
        raise DtypeError(
            f"{name} has dtype {tensor.dtype}, which NumPy lacks: pass {name}.float()"
        ) from None
    return array


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def from_numpy(array: NDArray[Any], dtype: str | None = None) -> torch.Tensor:
    """A tensor on the array's memory, or a copy in ``dtype`` where that differs."""
    tensor = torch.from_numpy(array)
    return tensor if dtype is None else tensor.to(getattr(torch, dtype))


def store(tensor: torch.Tensor, array: NDArray[Any]) -> None:
    """Copy ``array`` into ``tensor``, rounding to its dtype."""
    tensor.copy_(torch.from_numpy(array))
