"""Float32 graphs in less than float32: the products that meet every token (`products`), and nothing else.

Those are nearly all of the work. Norms, energies, states, the residual stream, biases, and whatever is computed once
per image stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from infexport.conversion.passes.float32_accumulation import sum_in_float32
from infexport.conversion.passes.half_precision import to_half
from infexport.conversion.passes.quantization import ActivationStats, to_int8
from infexport.conversion.passes.token_matmuls import Unrepresentable, weight_key

__all__ = ["ActivationStats", "Unrepresentable", "lower", "weight_key"]

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def lower(
    model: ir.Model, precision: str, met: Mapping[str, ActivationStats] | None = None, tensorrt: bool = False
) -> None:
    """Lower a graph of a bundle, the whole one or a stage's, in place.

    Args:
        model: float32, as it was exported or as it was loaded; every value has a shape.
        precision: `fp16`, `bf16` or `int8`; `fp32` changes nothing.
        met: ranges of the whole graph's activations, see `conversion.calibration`, which fix the ranges of int8. None
            finds them at run time.
        tensorrt: in the forms that TensorRT needs: products of half-precision factors are asked to be summed in float32
            (`accumulate`); int8 has no zero points, so its ranges must be fixed, and the operators of Pure InfSA,
            float32 on CPUs, are in float16.

    Raises:
        ValueError: a value without a shape, a product that `met` does not know, or int8 for TensorRT without `met`.
        Unrepresentable: a weight that the precision has no numbers for.
    """
    if precision in HALF:
        to_half(model, HALF[precision])
    elif precision == "int8":
        to_int8(model.graph, met, signed=tensorrt)
        if tensorrt:  # for GPUs, where attention in float32 would take most of the time
            to_half(model, ir.DataType.FLOAT16, attention_alone=True)
    else:
        return
    RemoveUnusedNodesPass()(model)
    if tensorrt:
        sum_in_float32(model, HALF.get(precision, ir.DataType.FLOAT16))
