"""Graphs in int8: uint8 activations for CPUs, signed ones for TensorRT.

Weights are int8, symmetric, a scale per output channel. Activations have one scale per tensor, in a range that is
fixed (calibrated) or found at run time (dynamic): uint8, asymmetric, or int8, symmetric. Products are summed in int32,
everything else is float32. uint8 by int8 is the pair that ONNX Runtime's CPU kernels are fast for: int8 by int8 ran at
a twelfth of its rate. TensorRT knows no zero points.

The patch embedding stays float32: it is 3% of the work, and in int8 would be half of the error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from infexport.conversion.passes.base import Pass
from infexport.conversion.passes.graph_editor import Editor
from infexport.conversion.passes.token_matmuls import Product, array, find_products, weight_key


@dataclass(frozen=True)
class ActivationStats:
    """Statistics of a product's activations: the range of all values, and the mean of all tokens `[K]`, float64."""

    low: float
    high: float
    mean: NDArray[np.float64]


class Quantize(Pass):
    """Compute the products that meet every token in int8, but for the patch embedding.

    Requires shapes of all values; statistics of every product where there are any, and these for signed activations.
    Ensures that no product of a float32 weight meets every token, but for the patch embedding.

    Args:
        stats: by `weight_key`. They fix the range of every activation, and the effect of rounding the weights on the
            average token goes into the bias. None finds ranges at run time, over all images and tokens of a call.
        signed: activations in int8, symmetric.
    """

    def __init__(self, stats: Mapping[str, ActivationStats] | None = None, signed: bool = False) -> None:
        self._stats, self._signed = stats, signed
        self._by_node: dict[ir.Node, ActivationStats] = {}

    def requires(self, model: ir.Model) -> None:
        if self._signed and self._stats is None:
            raise ValueError("signed activations need ranges that are fixed, and there are none")
        self._by_node = {}
        if self._stats is None:
            return
        for product in _lowered(model.graph):
            found = self._stats.get(weight_key(product))
            if found is None:
                raise ValueError(f"{product.weight.name} was not calibrated: the calibration is of another model")
            self._by_node[product.node] = found

    def apply(self, model: ir.Model) -> None:
        rewrite = _Int8(model.graph)
        for product in _lowered(model.graph):
            if self._stats is None:
                rewrite.dynamic(product)
            else:
                rewrite.fixed(product, self._by_node.pop(product.node), self._signed)

    def ensures(self, model: ir.Model) -> None:
        left = _lowered(model.graph)
        assert not left, f"{left[0].node.name} is in float32"


def _lowered(graph: ir.Graph) -> list[Product]:
    """Return the products that meet every token, but for the patch embedding."""
    return [product for product in find_products(graph) if product.largest is None]


def quantization(low: float, high: float, signed: bool = False) -> tuple[np.float32, np.uint8 | np.int8]:
    """Return scale and zero point of values from `low` to `high`, and 0 always: 255 steps, or signed, 254 around 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = max(-low, high) / 127 if signed else (high - low) / 255
    scale = np.float32(step) or np.float32(1)
    return (scale, np.int8(0)) if signed else (scale, np.uint8(np.clip(np.rint(-low / scale), 0, 255)))


def quantized_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return a weight `[K, N]` in int8, and the scale of every column `[N]`."""
    scale = np.abs(weight).max(0) / np.float32(127)
    scale[scale == 0] = 1
    # a scale that has few digits itself, below 1e-38, may be too small by half
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale


class _Int8:
    """Rewrites of one graph, product after product, which quantize no tensor twice."""

    def __init__(self, graph: ir.Graph) -> None:
        self._edit = Editor(graph)
        self._dynamic: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._fixed: dict[tuple[ir.Value, float, int], ir.Value] = {}

    def dynamic(self, product: Product) -> None:
        """Rewrite a product so that ONNX Runtime fuses it to one integer product, its range found at run time."""
        edit, out = self._edit, product.node.outputs[0]
        edit.here = product.node
        weight, weight_scale = self._weight(product, *quantized_weight(array(product.weight)))
        x, scale, zero = self._quantized(product.x)
        total = edit.add("MatMulInteger", [x, weight, zero], ir.val(f"{out.name}_int32", ir.DataType.INT32, out.shape))
        exact = edit.add("Cast", [total], _float(f"{out.name}_sums", out.shape), {"to": ir.DataType.FLOAT})
        unit = edit.add("Mul", [scale, weight_scale], _float(f"{out.name}_unit", weight_scale.shape))
        edit.replace(product.node, edit.add("Mul", [exact, unit], _float(f"{out.name}_product", out.shape)))

    def fixed(self, product: Product, inputs: ActivationStats, signed: bool) -> None:
        """Rewrite a product as quantize–dequantize pairs, which runtimes fuse to one integer product."""
        edit, out = self._edit, product.node.outputs[0]
        edit.here = product.node
        exact = array(product.weight)
        weight, scale = quantized_weight(exact)
        lost = inputs.mean @ (exact - weight * scale.astype(np.float64))
        factor = _float(f"{out.name}_weight", product.weight.shape)
        edit.add("DequantizeLinear", self._weight(product, weight, scale), factor, {"axis": 1})
        x = self._rounded(product.x, *quantization(inputs.low, inputs.high, signed))
        made = edit.add("MatMul", [x, factor], _float(f"{out.name}_product", out.shape))
        if (found := _bias(out, lost.shape)) is None:
            bias = edit.initializer(f"{out.name}_bias", lost.astype(np.float32))
            made = edit.add("Add", [made, bias], _float(f"{out.name}_sum", out.shape))
        else:
            reader, index, bias = found
            corrected = (array(bias) + lost).astype(np.float32)
            reader.replace_input_with(index, edit.initializer(f"{out.name}_bias", corrected))
        edit.replace(product.node, made)

    def _weight(
        self, product: Product, weight: NDArray[np.int8], scale: NDArray[np.float32]
    ) -> tuple[ir.Value, ir.Value]:
        name = f"{product.weight.name}_int8"
        return self._edit.initializer(name, weight), self._edit.initializer(f"{name}_scale", scale)

    def _quantized(self, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return x in uint8, its scale and its zero point, found at run time."""
        if x not in self._dynamic:
            zero, scale = ir.val(f"{x.name}_zero", ir.DataType.UINT8, []), _float(f"{x.name}_scale", [])
            q = ir.val(f"{x.name}_uint8", ir.DataType.UINT8, x.shape)
            self._edit.add("DynamicQuantizeLinear", [x], q, more=[scale, zero])
            self._dynamic[x] = q, scale, zero
        return self._dynamic[x]

    def _rounded(self, x: ir.Value, scale: np.float32, zero: np.uint8 | np.int8) -> ir.Value:
        """Return x, rounded to 8 bits."""
        key = (x, float(scale), int(zero))
        if key not in self._fixed:
            # several ranges of one tensor are those of several weights, of which one is another layer's as well
            name = f"{x.name}_{len(self._fixed)}"
            units = [
                self._edit.initializer(f"{name}_{kind}", np.asarray(value))
                for kind, value in (("scale", scale), ("zero", zero))
            ]
            q = self._edit.add("QuantizeLinear", [x, *units], ir.val(f"{name}_q", units[1].dtype, x.shape))
            self._fixed[key] = self._edit.add("DequantizeLinear", [q, *units], _float(f"{name}_rounded", x.shape))
        return self._fixed[key]


def _float(name: str, shape: Any) -> ir.Value:
    return ir.val(name, ir.DataType.FLOAT, shape)


def _bias(product: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Node, int, ir.Value] | None:
    """Find the bias `[N]` that is added to a product: the node, the index of its input, and the bias."""
    readers = list(product.uses())
    if len(readers) != 1 or product.is_graph_output() or readers[0].node.op_type != "Add":
        return None
    node, index = readers[0].node, 1 - readers[0].idx
    bias = node.inputs[index]
    if bias is None or not bias.is_initializer() or bias.shape != shape:
        return None
    return node, index, bias
