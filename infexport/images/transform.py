"""The evaluation transform and the normalisation, as a bundle records them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from infexport.errors import InfexportError

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
ResizeMode = Literal["shortest", "exact"]


@dataclass(frozen=True)
class EvalTransform:
    """The evaluation transform a network was trained with: resize, then centre crop to crop_size².

    "shortest" resizes the shorter side to resize_size and keeps the aspect; "exact" resizes to resize_size².
    """

    resize_mode: ResizeMode
    resize_size: int
    crop_size: int
    interpolation: Interpolation

    def __post_init__(self) -> None:
        for name, allowed in (("resize_mode", ResizeMode), ("interpolation", Interpolation)):
            if getattr(self, name) not in get_args(allowed):
                raise _bad_transform(f"{name} {getattr(self, name)!r}", f"one of {get_args(allowed)}")
        for name in ("resize_size", "crop_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise _bad_transform(f"{name} {value!r}", "a whole number, at least 1")

    def at(self, size: int) -> EvalTransform:
        """The same transform at another side: crop_size = size, resize_size scaled in proportion."""
        resize = round(self.resize_size * size / self.crop_size)
        return replace(self, crop_size=size, resize_size=max(1, resize))


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing that a bundle records.

    Attributes:
        mean, std: of pixels in [0, 1], a number per channel.
        resize_mode, resize_size, crop_size, interpolation: see `EvalTransform`.
    """

    mean: Sequence[float]
    std: Sequence[float]
    resize_mode: ResizeMode
    resize_size: int
    crop_size: int
    interpolation: Interpolation

    @property
    def transform(self) -> EvalTransform:
        """The evaluation transform.

        Raises:
            InfexportError: a field that it does not take.
        """
        return EvalTransform(self.resize_mode, self.resize_size, self.crop_size, self.interpolation)


def _bad_transform(received: str, expected: str) -> InfexportError:
    details = f"received {received}; expected {expected}"
    hint = "see preprocessing in the bundle's infexport.json"
    return InfexportError("evaluation transform not understood", details, hint)
