"""Derivatives of the operators, of every order and mode, computed from their plain definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad

from infsa_ops.common import no_autocast

LIBRARY = torch.library.Library("infsa", "FRAGMENT")
KEYS = tuple(f"Autograd{device}" for device in ("CPU", "CUDA", "Meta", "XPU", "MPS", "HPU", "XLA", "PrivateUse1"))
"""Dispatch keys for which this module registers kernels.

Each takes precedence over the kernel that `torch.library.custom_op` makes for `Autograd`. That kernel supports reverse
mode only: it returns forward-mode tangents of zero, and fails under `torch.func`."""


def _transformed(tensors: tuple[Tensor, ...]) -> bool:
    """Tell whether a `torch.func` transform is active or a tensor carries a forward-mode tangent."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def register_derivatives(operator: CustomOpDef, definition: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
    """Register the derivatives of the definition for an operator.

    Reverse mode keeps the operator's own forward pass. Its backward pass differentiates the definition, and is itself
    differentiable. Forward mode and `torch.func` transforms run the definition instead of the operator.

    Args:
        operator: takes its tensors as its first arguments.
        definition: the same function in torch's differentiable operations, computed in at least float32.
    """
    overload = operator._opoverload

    def below_autograd(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
            tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
            ctx.save_for_backward(*tensors)
            ctx.options = arguments[len(tensors) :]
            return below_autograd(keys, *arguments)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            with no_autocast(gradients[0]):
                pullback = torch.func.vjp(lambda *tensors: definition(*tensors, *ctx.options), *ctx.saved_tensors)[1]
                pulled = pullback(gradients[0] if len(gradients) == 1 else gradients)
            return None, *pulled, *(None for _ in ctx.options)

    def kernel(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        tensors = tuple(argument for argument in arguments if isinstance(argument, Tensor))
        if _transformed(tensors):
            return definition(*arguments)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return Reverse.apply(keys, *arguments)
        return below_autograd(keys, *arguments)

    for key in KEYS:
        LIBRARY.impl(overload, kernel, key, with_keyset=True)
