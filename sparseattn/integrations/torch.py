"""PyTorch CPU tensors in and out, sharing memory, without gradients for now."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparseattn.errors import ArgumentError, DtypeError, NotSupported


def to_numpy(name: str, tensor: torch.Tensor) -> NDArray[Any]:
    """An ndarray on the tensor's memory; bfloat16 as its bits, uint16.

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
    try:
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.int16)
            return np.asarray(tensor.numpy()).view(np.uint16)
        array: NDArray[Any] = tensor.numpy()
    except TypeError:
        raise DtypeError(
            f"{name} has dtype {tensor.dtype}, which NumPy lacks: pass {name}.float()"
        ) from None
    return array


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def from_numpy(array: NDArray[Any]) -> torch.Tensor:
    """A tensor on the array's memory; bfloat16 of its bits, uint16."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
