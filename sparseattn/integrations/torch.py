"""PyTorch CPU tensors in and out, sharing memory, and nodes of its gradient graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

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
    DtypeError
        If NumPy lacks its dtype.
    NotSupported
        If it stands for other tensors.
    """
    if tensor.device.type != "cpu":
        raise ArgumentError(
            f"{name} is on device {tensor.device} and sparseattn computes on the CPU: "
            f"pass {name}.cpu()"
        )
    if tensor.layout != torch.strided:
        raise ArgumentError(f"{name} has layout {tensor.layout}: pass {name}.to_dense()")
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
    except RuntimeError:
        raise NotSupported(
            f"{name} is a tensor without memory, as inside of torch.func and torch.vmap: "
            "call sparseattn outside of them"
        ) from None
    return array


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def from_numpy(array: NDArray[Any]) -> torch.Tensor:
    """A tensor on the array's memory; bfloat16 of its bits, uint16."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def draw_seed() -> int:
    """Of PyTorch's own generator: ``torch.manual_seed`` says which, and a checkpoint that runs its
    forward again draws the same."""
    return int(torch.randint((1 << 63) - 1, (), dtype=torch.int64))


Tensors: TypeAlias = tuple[torch.Tensor | None, ...]
# (inputs, outputs, gradients of outputs, whose gradients are wanted) -> gradients of inputs
Pullback: TypeAlias = Callable[[Tensors, Tensors, Tensors, tuple[bool, ...]], Tensors]


class Node(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    """A function of tensors whose gradient is a pullback.

    Inputs and outputs are kept as PyTorch keeps them: changes in place are noticed, memory is freed
    as a backward goes on, and hooks on saved tensors work.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[], tuple[Tensors, Pullback]], *inputs: torch.Tensor | None
    ) -> Tensors:
        outputs, ctx.pullback = run()
        ctx.n_inputs = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():  # else a gradient of this would be taken for zero
            raise NotSupported("attention has no second derivative: leave out create_graph=True")
        saved, n = ctx.saved_tensors, ctx.n_inputs
        return None, *ctx.pullback(saved[:n], saved[n:], grads, ctx.needs_input_grad[1:])


def record(run: Callable[[], tuple[Tensors, Pullback]], *inputs: Any) -> Tensors:
    """The outputs of ``run`` as functions of ``inputs``: what is no tensor gets no gradient."""
    tensors = [x if isinstance(x, torch.Tensor) else None for x in inputs]
    outputs: Tensors = Node.apply(run, *tensors)  # type: ignore[no-untyped-call, unused-ignore]
    return outputs
