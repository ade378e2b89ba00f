"""Derivatives of the operators, of every order and mode, through their plain definition."""

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
"""Dispatch keys with kernels of ours; each precedes the kernel that `torch.library.custom_op` makes for `Autograd`.

That kernel knows reverse mode alone. It gives forward-mode tangents of zero, and fails under `torch.func`."""


def _transformed(tensors: tuple[Tensor, ...]) -> bool:
    """Return true under `torch.func`'s transforms, and where a tensor carries a forward-mode tangent."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def register_derivatives(operator: CustomOpDef, definition: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
    """Give an operator the derivatives of its definition.

    Reverse mode keeps the operator's own forward pass and differentiates the definition in the backward pass, which is
    differentiable in turn. Forward mode and `torch.func`'s transforms run the definition in place of the operator.

    Args:
        operator: its tensors are its first arguments.
        definition: the same function in torch's differentiable operations, at least in float32.
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
