"""Networks made of other networks: which modules may be rewritten, and copies with other children."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

Module = TypeVar("Module", bound=nn.Module)


def is_untouched(module: nn.Module) -> bool:
    """Return whether a call of a module runs its class's methods and nothing besides: no hooks, none replaced."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    everywhere = (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks)
    replaced = any(callable(getattr(type(module), name, None)) for name in vars(module))
    return not any(hooks) and not any(everywhere) and not replaced


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Return whether a module is of exactly this class, untouched, with plain tensors.

    Only then its weights and the `forward` of `kind` are all there is to it. An adapter is a subclass, and a
    parametrization makes one. A quantised weight is a tensor of another class, with products of its own.
    """
    if type(module) is not kind or not is_untouched(module):
        return False
    held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    return all(type(tensor) in (Tensor, nn.Parameter) for tensor in held if isinstance(tensor, Tensor))


def with_children(module: Module, **children: nn.Module | None) -> Module:
    """Return the module with other children: a shallow copy, weights shared, the original as it was."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin
