"""Matrix products that meet every token."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from infexport.conversion.passes.graph_editor import first_input
from infexport.errors import InfexportError

SHAPING = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity"})
"""Operators whose output has the numbers of their first input."""


@dataclass(frozen=True)
class Product:
    """A product that meets every token.

    Attributes:
        node: its MatMul.
        weight: an initializer, float32 `[K, N]`.
        largest: magnitude that x never exceeds; None where only a calibration could tell, which is anywhere but in
            the patch embedding of uint8 pixels.
    """

    node: ir.Node
    weight: ir.Value
    largest: float | None

    @property
    def x(self) -> ir.Value:
        """The tokens, float32 `[…, N, K]`; another value once what gives them is rewritten."""
        return first_input(self.node)


def find_products(graph: ir.Graph) -> list[Product]:
    """Return the products that meet every token, in the graph's order.

    Raises:
        ValueError: the graph does not say what shape a value has.
    """
    found = []
    for node in graph:
        if (node.domain, node.op_type) != ("", "MatMul"):
            continue
        x, weight = first_input(node), node.inputs[1]
        assert weight is not None, f"{node.name} has one input"
        if x.shape is None or weight.shape is None:
            raise ValueError(f"{node.name} has inputs of unknown shape: infer shapes first")
        matrix = weight.is_initializer() and weight.dtype == ir.DataType.FLOAT and len(weight.shape) == 2
        # one token is the class token, or a mean; but where there are no inputs, it is on its way to all the others
        if matrix and len(x.shape) > 2 and (x.shape[-2] != 1 or not graph.inputs):
            found.append(Product(node, weight, _largest(x)))
    return found


def weight_key(product: Product) -> str:
    """Return a digest of the weight's numbers, which names it in every graph of a model."""
    return hashlib.sha256(array(product.weight).data).hexdigest()


class Unrepresentable(InfexportError):
    """A weight for which a precision has no numbers.

    Attributes:
        weight: in float32.
    """

    def __init__(self, product: Product, weight: NDArray[Any], precision: str, most: float) -> None:
        super().__init__(
            f"a weight does not fit {precision}: {product.weight.name}",
            f"received a value of {largest(weight):g}, expected at most {most:g} in magnitude",
            "keep the precision of the weights: --precision fp32",
        )
        self.weight = weight


def largest(weight: NDArray[Any]) -> float:
    """Return the number of the largest magnitude, with its sign."""
    return float(weight.flat[np.abs(weight).argmax()])


def array(initializer: ir.Value) -> NDArray[Any]:
    """Return an initializer's numbers, contiguous."""
    assert initializer.const_value is not None, f"{initializer.name} has no value"
    return np.ascontiguousarray(initializer.const_value.numpy())


def _largest(x: ir.Value) -> float | None:
    """Return the largest magnitude of uint8 pixels less a constant, in any shape; None for other values."""
    bounds = _bounds(x)
    return None if bounds is None else max(map(abs, bounds))


def _bounds(x: ir.Value) -> tuple[float, float] | None:
    """Return the smallest and the largest number that `_largest`'s x may have."""
    if x.dtype == ir.DataType.UINT8:
        return 0.0, 255.0
    node = x.producer()
    if node is None or node.domain != "" or node.op_type not in SHAPING | {"Cast", "Sub"}:
        return None
    bounds = _bounds(first_input(node))
    if bounds is None or node.op_type != "Sub":
        return bounds
    center = node.inputs[1]
    constant = None if center is None else ir.convenience.get_const_tensor(center)
    if constant is None or constant.size != 1:
        return None
    less = float(constant.numpy().item())
    return bounds[0] - less, bounds[1] - less
