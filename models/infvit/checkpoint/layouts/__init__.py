"""The layouts a checkpoint may be in, one module each."""

from infvit.checkpoint.layout import Layout
from infvit.checkpoint.layouts import (
    reference,
    timm,
    torchvision,
    transformers,
    transformers4,
    transformers4_wrapped,
)

LAYOUTS: tuple[str, ...] = (
    "reference",
    "torchvision",
    "transformers",
    "transformers4",
    "transformers4_wrapped",
    "timm",
)
"""Their names, in the order they are tried."""

READERS: tuple[Layout, ...] = (
    reference.LAYOUT,
    torchvision.WRAPPED,
    torchvision.SOFTMAX,
    transformers.LAYOUT,
    transformers4.LAYOUT,
    transformers4_wrapped.LAYOUT,
    timm.LAYOUT,
)
"""Layouts in the order they are tried; torchvision's attention has two forms under one name."""

__all__ = ["LAYOUTS", "READERS"]
