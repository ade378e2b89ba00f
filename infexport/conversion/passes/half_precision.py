"""Graphs in float16 or bfloat16, for GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from infexport.conversion.passes.base import Pass
from infexport.conversion.passes.graph_editor import Editor, first_input
from infexport.conversion.passes.token_matmuls import SHAPING, Product, Unrepresentable, array, find_products

KERNEL = {"NeumannKernel": 3, "AffinityProduct": 2, "AffinitySquaredNorm": 2}
"""Operators of Pure InfSA, as much work again as the products → how many of their inputs are in the half type.

They sum in float32; `AffinityProduct` rounds its values itself, after it has scaled them.
"""

SUFFIX = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
"""Name of each half type, in names of values."""

LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: 3.3895313892515355e38}
"""Largest finite number of each half type."""

ROWS = frozenset({"q", "k", "v", "query"})
"""Names of queries, keys and values among a stage's inputs and outputs."""


class ToHalfPrecision(Pass):
    """Compute the products that meet every token, and the operators of Pure InfSA, in a half type.

    In float16 the stages exchange queries, keys and values in float16, too, so that half as much is stored of an
    image. Numpy has no bfloat16: there they are float32.

    Requires shapes of all values, and weights that the half type has numbers for. Ensures that no product of a float32
    weight meets every token.

    Args:
        dtype: FLOAT16 or BFLOAT16.
        attention_alone: lower the operators of Pure InfSA, and nothing else.
    """

    def __init__(self, dtype: ir.DataType, attention_alone: bool = False) -> None:
        self._dtype, self._attention_alone = dtype, attention_alone
        self._weights: dict[ir.Node, HalfWeight] = {}

    def requires(self, model: ir.Model) -> None:
        products = [] if self._attention_alone else find_products(model.graph)
        self._weights = {product.node: half_weight(product, self._dtype) for product in products}

    def apply(self, model: ir.Model) -> None:
        graph, half = model.graph, _Half(model.graph, self._dtype)
        products = {} if self._attention_alone else {product.node: product for product in find_products(graph)}
        kernel = {node for node in graph if node.domain == "infsa" and node.op_type in KERNEL}
        is_stored = self._dtype == ir.DataType.FLOAT16 and not self._attention_alone
        if is_stored:
            half.take_rows()
        for node in list(graph):
            if node in products:
                half.multiply(products[node], self._weights.pop(node))
            elif node in kernel:
                half.attend(node)
        if is_stored:
            half.give_rows()
        if kernel:
            # this imports torch, and is needed for nothing else
            from infexport.conversion.onnx_export import attach_bodies

            model.functions.clear()
            attach_bodies(model)

    def ensures(self, model: ir.Model) -> None:
        left = [] if self._attention_alone else find_products(model.graph)
        assert not left, f"{left[0].node.name} is in float32"


@dataclass(frozen=True)
class HalfWeight:
    """A weight in a half type.

    Attributes:
        rounded: `[K, N]`, in units of `unit`.
        unit: a power of two for every column `[N]`, float32; None where the weight is not scaled.
    """

    rounded: NDArray[Any]
    unit: NDArray[np.float32] | None


def half_weight(product: Product, dtype: ir.DataType) -> HalfWeight:
    """Round the weight of a product to a half type.

    Raises:
        Unrepresentable: a value would be infinite.
    """
    weight, unit = array(product.weight), None
    if product.largest is not None and dtype == ir.DataType.FLOAT16:
        # powers of two, so that no sum exceeds 2^15 and small weights keep their digits
        sums = np.maximum(product.largest * np.abs(weight.astype(np.float64)).sum(0), 2.0**-100)
        unit = np.exp2(np.ceil(np.log2(sums)) - 15).astype(np.float32)
        weight = weight / unit
    with np.errstate(over="ignore"):
        rounded = weight.astype(dtype.numpy())
    if not np.isfinite(rounded.astype(np.float32)).all():
        raise Unrepresentable(product, array(product.weight), SUFFIX[dtype], LARGEST[dtype])
    return HalfWeight(rounded, unit)


class _Half:
    """Rewrites of one graph, node after node, which cast no tensor twice."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self._graph, self._edit, self._dtype = graph, Editor(graph), dtype
        self._suffix = SUFFIX[dtype]
        self._made: dict[ir.Value, ir.Value] = {}

    def multiply(self, product: Product, weight: HalfWeight) -> None:
        """Compute a product in the half type, and cast its output to float32."""
        node, edit = product.node, self._edit
        edit.here = node
        name = f"{product.weight.name}_{self._suffix}"
        factors = [self._of(product.x), edit.initializer(name, weight.rounded)]
        out = self._wide(edit.add("MatMul", factors, self._like(node.outputs[0])))
        if weight.unit is not None:
            scaled = ir.val(f"{name}_scaled", ir.DataType.FLOAT, out.shape)
            out = edit.add("Mul", [out, edit.initializer(f"{name}_unit", weight.unit)], scaled)
        edit.replace(node, out)

    def attend(self, node: ir.Node) -> None:
        """Compute an operator of Pure InfSA in the half type, and cast its output to float32."""
        edit = self._edit
        edit.here = node
        for i, value in enumerate(node.inputs[: KERNEL[node.op_type]]):
            assert value is not None, f"{node.name} lacks an input"
            node.replace_input_with(i, self._of(value))
        if node.op_type == "NeumannKernel":
            out = self._like(node.outputs[0])
            edit.add(node.op_type, node.inputs, out, node.attributes, node.domain)
            edit.replace(node, self._wide(out))

    def take_rows(self) -> None:
        """Take queries, keys and values, where they are inputs of the graph, in the half type."""
        self._edit.here = next(iter(self._graph), None)
        for value in self._graph.inputs:
            if value.name in ROWS:
                readers = list(value.uses())
                value.type = ir.TensorType(self._dtype)  # not its dtype alone: copies of a graph share types
                wide = self._wide(value)
                for reader, index in readers:
                    reader.replace_input_with(index, wide)

    def give_rows(self) -> None:
        """Give queries, keys and values, where they are outputs of the graph, in the half type."""
        self._edit.here = None
        for index, value in enumerate(self._graph.outputs):
            name = value.name
            if name in ROWS:
                value.name = f"{name}_exact"
                half = self._of(value)
                half.name = name
                self._graph.outputs[index] = half

    def _of(self, x: ir.Value) -> ir.Value:
        """Return x in the half type, cast before operators that change no more than its shape."""
        if x not in self._made:
            node = x.producer()
            if node is not None and node.op_type == "Cast" and first_input(node).dtype == self._dtype:
                return first_input(node)
            if node is not None and node.domain == "" and node.op_type in SHAPING:
                inputs = [self._of(first_input(node)), *node.inputs[1:]]
                self._made[x] = self._edit.add(node.op_type, inputs, self._like(x), node.attributes)
            else:
                self._made[x] = self._edit.add("Cast", [x], self._like(x), {"to": self._dtype})
        return self._made[x]

    def _like(self, x: ir.Value) -> ir.Value:
        return ir.val(f"{x.name}_{self._suffix}", self._dtype, x.shape)

    def _wide(self, x: ir.Value) -> ir.Value:
        """Return x, which has the half type, in float32."""
        wide = ir.val(f"{x.name}_float", ir.DataType.FLOAT, x.shape)
        return self._edit.add("Cast", [x], wide, {"to": ir.DataType.FLOAT})
