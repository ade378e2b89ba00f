"""Networks in less than float32: the linear layers that meet every token, and nothing else.

Those are nearly all of the work. Norms, energies, states, the residual stream, and whatever is computed once per image
stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infexport.image_model import ImageModel
from infexport.int8_linear import Int8Linear
from infvit.fold import PixelPatchEmbed
from infvit.rewrite import replaced


class HalfLinear(nn.Module):
    """A linear layer that multiplies in float16 and adds its bias in float32.

    Args:
        linear: what it replaces.
        dtype: of what it gives.
        largest: magnitude that its input never exceeds, where that is known. Each row of weights is then scaled by a
            power of two, so that no sum exceeds 2^15 and small weights keep their digits.
    """

    weight: Tensor
    unit: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype = torch.float32, largest: float | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        weight, unit = linear.weight.detach(), None
        if largest is not None:
            sums = (largest * weight.abs().sum(1)).clamp(min=2.0**-100)
            unit = torch.exp2(torch.ceil(torch.log2(sums)) - 15)
            weight = weight / unit[:, None]
        self.register_buffer("weight", weight.half())
        self.register_buffer("unit", unit)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product = nn.functional.linear(x.half(), self.weight).float()
        if self.unit is not None:
            product = product * self.unit
        return (product if self.bias is None else product + self.bias).to(self.dtype)


@dataclass
class Inputs:
    """What a layer has met: the range of all values, and the sum of all tokens `[K]`, float64."""

    low: float = math.inf
    high: float = -math.inf
    total: Tensor | float = 0.0
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        rows = x.flatten(0, -2)
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        self.total, self.tokens = self.total + rows.sum(0, dtype=torch.float64), self.tokens + len(rows)

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / self.tokens


def token_layers(model: ImageModel, images: Iterable[Tensor]) -> dict[nn.Linear, Inputs]:
    """The linear layers that meet every token, and what they met.

    Args:
        model: run on the images.
        images: batches, at least one, each of more than one patch.
    """
    layers: dict[nn.Linear, Inputs] = {}

    def observe(module: nn.Module, args: tuple[Tensor]) -> None:
        assert isinstance(module, nn.Linear)
        (x,) = args
        if x.dim() > 2 and x.shape[-2] > 1:
            layers.setdefault(module, Inputs()).add(x)

    hooks = [m.register_forward_pre_hook(observe) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with torch.inference_mode():
            for batch in images:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return layers


def _example(model: ImageModel) -> Tensor:
    patch = model.network.config.patch_size
    if model.takes == "uint8":
        return torch.zeros(1, 2 * patch, 2 * patch, 3, dtype=torch.uint8)
    return torch.zeros(1, 3, 2 * patch, 2 * patch)


def _pixel_layers(model: ImageModel) -> dict[nn.Linear, float]:
    """The layers whose input are pixels, and the largest magnitude of these."""
    embeds = (module for module in model.modules() if isinstance(module, PixelPatchEmbed))
    return {embed.proj: float(max(embed.center, 255 - embed.center)) for embed in embeds}


def to_fp16(model: ImageModel) -> ImageModel:
    """The model with its token layers in float16, for GPUs.

    The Neumann kernel, which is as much work again, takes float16 queries, keys and values; it sums in float32.
    """
    pure = [attention for attention in model.network.attentions if attention.variant == "pure_infsa"]
    kernel = {projection for a in pure for projection in (a.q_proj, a.k_proj, a.v_proj)}
    halves: dict[nn.Module, nn.Module] = {
        layer: HalfLinear(layer, torch.float16 if layer in kernel else torch.float32)
        for layer in token_layers(model, [_example(model)])
    }
    halves |= {layer: HalfLinear(layer, largest=largest) for layer, largest in _pixel_layers(model).items()}
    return replaced(model, halves)


def to_int8(model: ImageModel, calibration: Iterable[Tensor] | None = None) -> ImageModel:
    """The model with its token layers in int8, but for the patch embedding.

    That is 3% of the work, and in int8 would be half of the error.

    Args:
        model: in float32.
        calibration: batches of images that fix the range of every activation, and tell what rounding the weights does
            to the average token, which goes into the bias; None finds ranges at run time, over all images and tokens
            of a call.
    """
    observed = token_layers(model, [_example(model)] if calibration is None else calibration)
    pixels = _pixel_layers(model)
    layers = {layer: inputs for layer, inputs in observed.items() if layer not in pixels}
    if calibration is None:
        return replaced(model, {layer: Int8Linear(layer) for layer in layers})
    return replaced(model, {layer: Int8Linear(layer, (met.low, met.high), met.mean) for layer, met in layers.items()})
