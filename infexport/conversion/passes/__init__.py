"""Passes that lower float32 graphs: the products that meet every token (`token_matmuls`), and nothing else.

Those are nearly all of the work. Norms, energies, states, the residual stream, biases, and values that are computed
once per image stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from infexport.conversion.passes.float32_accumulation import SumInFloat32
from infexport.conversion.passes.half_precision import ToHalfPrecision
from infexport.conversion.passes.quantization import ActivationStats, Quantize
from infexport.conversion.passes.token_matmuls import Unrepresentable, weight_key

__all__ = ["ActivationStats", "Unrepresentable", "lower", "passes_for", "weight_key"]

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def passes_for(
    precision: str, stats: Mapping[str, ActivationStats] | None = None, tensorrt: bool = False
) -> list[Callable[[ir.Model], object]]:
    """Return the passes that lower a graph, in order.

    Args:
        precision: `fp16`, `bf16` or `int8`; `fp32` needs none.
        stats: of the whole graph's activations, see `conversion.calibration`; they fix the ranges of int8. None finds
            the ranges at run time.
        tensorrt: in the forms that TensorRT needs. Products of half-precision factors are asked to be summed in
            float32. int8 has no zero points, so its ranges must be fixed. The operators of Pure InfSA, float32 on
            CPUs, are in float16.
    """
    passes: list[Callable[[ir.Model], object]] = []
    if precision in HALF:
        passes.append(ToHalfPrecision(HALF[precision]))
    elif precision == "int8":
        passes.append(Quantize(stats, signed=tensorrt))
        if tensorrt:  # on GPUs attention in float32 would take most of the time
            passes.append(ToHalfPrecision(ir.DataType.FLOAT16, attention_alone=True))
    else:
        return passes
    passes.append(RemoveUnusedNodesPass())
    if tensorrt:
        passes.append(SumInFloat32(HALF.get(precision, ir.DataType.FLOAT16)))
    return passes


def lower(
    model: ir.Model, precision: str, stats: Mapping[str, ActivationStats] | None = None, tensorrt: bool = False
) -> None:
    """Lower a graph of a bundle, the whole one or a stage's, in place.

    Args:
        model: float32, as it was exported or as it was loaded; every value has a shape.
        precision, stats, tensorrt: see `passes_for`.

    Raises:
        ValueError: a value without a shape, a product without statistics, or int8 for TensorRT without any.
        Unrepresentable: a weight that the precision has no numbers for.
    """
    for rewrite in passes_for(precision, stats, tensorrt):
        rewrite(model)
