"""Networks made of other networks: modules copied with other children, weights shared."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def with_children(module: Module, **children: nn.Module | None) -> Module:
    """The module with other children: a shallow copy, weights shared, the original as it was."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin
