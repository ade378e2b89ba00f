"""Networks made of other networks: modules copied with other children, weights shared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def with_children(module: Module, **children: nn.Module | None) -> Module:
    """The module with other children: a shallow copy, weights shared, the original as it was."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


def replaced(module: Module, table: Mapping[nn.Module, nn.Module]) -> Module:
    """The module with its descendants replaced as `table` says; what has none of them is shared."""
    children = {
        name: table[child] if child in table else replaced(child, table) for name, child in module.named_children()
    }
    if all(children[name] is child for name, child in module.named_children()):
        return module
    return with_children(module, **children)
