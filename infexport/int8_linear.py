"""A linear layer in int8: the torch op, its module, and its form in ONNX.

Weights are int8, symmetric, a scale per output channel; activations uint8, asymmetric, per tensor, in a range that is
fixed (calibrated) or found at run time (dynamic). Products are summed in int32, everything else is float32. uint8 by
int8 is the pair that ONNX Runtime's CPU kernels are fast for: int8 by int8 ran at a twelfth of its rate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.library.custom_op("infexport::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
) -> Tensor:
    """x Wᵀ + b with both factors in 8 bits.

    Args:
        x: `[…, K]`, float32.
        weight: Wᵀ in units of its scale, `[K, N]`, int8.
        weight_scale: `[N]`, float32.
        bias: `[N]`, float32.
        scale, zero_point: of x, float32 and uint8 scalars; None finds the range of x at run time as ONNX's
            `DynamicQuantizeLinear` does: over the whole tensor, zero included.

    Returns:
        `[…, N]`, float32.
    """
    if scale is None or zero_point is None:
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        scale, zero_point = quantization(low, high)
    zero = zero_point.double()
    q = (torch.round(x / scale).double() + zero).clamp(0, 255) - zero
    product = (q @ weight.double()).to(x.dtype) * (scale * weight_scale)  # float64 holds every int32 sum
    return product if bias is None else product + bias


@int8_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def quantization(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32 and uint8, of values from low ≤ 0 to high ≥ 0 in 255 steps."""
    scale = (high - low).float() / 255
    scale = torch.where(scale == 0, 1, scale)
    return scale, torch.round(-low / scale).clamp(0, 255).to(torch.uint8)


class Int8Linear(nn.Module):
    """A linear layer in int8, made of one in float32.

    Args:
        linear: what it replaces.
        input_range: lowest and highest value of its input; None for the range at run time.
        mean: of its input, `[K]`: what rounding the weights does to it goes into the bias.
    """

    weight: Tensor
    weight_scale: Tensor
    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(
        self, linear: nn.Linear, input_range: tuple[float, float] | None = None, mean: Tensor | None = None
    ) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        scale = torch.where(scale == 0, 1, scale)
        self.register_buffer("weight", torch.round(weight / scale).to(torch.int8).T.contiguous())
        self.register_buffer("weight_scale", scale[:, 0])
        self.bias = linear.bias
        if mean is not None:
            lost = (weight.double() - self.weight.T * scale.double()) @ mean
            bias = 0.0 if linear.bias is None else linear.bias.detach().double()
            self.bias = nn.Parameter((bias + lost).to(weight.dtype))
        scale_of_input, zero_point = None, None
        if input_range is not None:
            low, high = min(input_range[0], 0.0), max(input_range[1], 0.0)
            scale_of_input, zero_point = quantization(torch.tensor(low), torch.tensor(high))
        self.register_buffer("scale", scale_of_input)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = int8_linear(x, self.weight, self.weight_scale, self.bias, self.scale, self.zero_point)
        return out


TORCH_OP = torch.ops.infexport.int8_linear.default


def translate(x: Any, weight: Any, weight_scale: Any, bias: Any, scale: Any, zero_point: Any) -> Any:
    """The op in standard ONNX operators, in the forms that runtimes fuse to one integer product.

    A fixed range is written as quantize–dequantize pairs, which TensorRT reads too; a range at run time needs
    `DynamicQuantizeLinear`.
    """
    from onnxscript import opset20 as op

    if scale is None:
        x, scale, zero_point = op.DynamicQuantizeLinear(x)
        product = op.Mul(op.Cast(op.MatMulInteger(x, weight, zero_point), to=1), op.Mul(scale, weight_scale))
    else:
        x = op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)
        product = op.MatMul(x, op.DequantizeLinear(weight, weight_scale, axis=1))
    return product if bias is None else op.Add(product, bias)
