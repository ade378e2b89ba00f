"""`NeumannKernel` in ONNX: schema, translation from torch, and body in standard operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import onnxscript
import torch

from infsa_ops import onnx_tiling as tiles
from infsa_ops.common import DOMAIN, EPSILON, VERSION
from infsa_ops.neumann_kernel import op as _registration  # noqa: F401  (registers the torch op)
from infsa_ops.onnx_operator import OnnxOperator

NAME = "NeumannKernel"


def translate(q: Any, k: Any, v: Any, rho: Any, terms: int) -> Any:
    """Translate the torch op to its ONNX node, for `torch.onnx.export(custom_translation_table=…)`."""
    return onnxscript.values.Opset(DOMAIN, VERSION).NeumannKernel(q, k, v, rho, terms=terms)


def body(attributes: Mapping[str, ir.Attr], opset: int, dtype: ir.DataType) -> ir.Function:
    """Build the operator from standard ONNX operators of version `opset`, for tokens of `dtype` and T of `attributes`.

    ONNX functions can't unroll by an attribute, so a body serves one T. A Loop over the terms would serve all T, but
    TensorRT's parser refuses a Scan inside a Loop.
    """
    terms = attributes["terms"].as_int()

    def trace(op: Any, q: ir.Value, k: ir.Value, v: ir.Value, rho: ir.Value) -> ir.Value:
        cut = tiles.tiling(op, q, k, dtype)
        q, k, unit = tiles.scaled(op, q, k, dtype)
        values, values_unit = tiles.as_values(op, v, dtype)

        def following(op: Any, query: ir.Value, keys: ir.Value, values: ir.Value) -> list[ir.Value]:
            return [tiles.product(op, op.Relu(op.MatMul(query, keys)), values, dtype)]

        weighted, squares = tiles.product_and_squares(op, cut, q, k, values, v)
        norm = op.Add(op.Sqrt(squares), op.Div(EPSILON, unit))
        scale = op.Div(op.Reshape(op.Cast(rho, to=ir.DataType.FLOAT), [1, -1, 1, 1]), norm)
        total = values = op.Mul(weighted, op.Mul(scale, values_unit))
        for t in range(2, terms + 1):
            values, values_unit = tiles.as_values(op, values, dtype)
            (weighted,) = tiles.scan(op, f"term{t}", cut, following, 1, q, k, values)
            values = op.Mul(tiles.join(op, cut, weighted, v), op.Mul(scale, values_unit))
            total = op.Add(total, values)
        return op.Cast(total, to=dtype)

    inputs = [ir.Value(name=name) for name in ("q", "k", "v", "rho")]
    return onnxscript.build_function(
        trace, inputs, domain=DOMAIN, name=NAME, attributes=[attributes["terms"]], opset_imports={"": opset}
    )


OPERATOR = OnnxOperator(
    name=NAME,
    doc="The first `terms` terms of the Neumann series of relu(q k^T / d), Frobenius-normalised, applied to v.",
    torch_op=torch.ops.infsa.neumann_kernel.default,
    inputs=(
        ("q", "T", "[B, H, N, d]"),
        ("k", "T", "[B, H, N, d]"),
        ("v", "T", "[B, H, N, d_v]"),
        ("rho", "tensor(float)", "scalar or [H]"),
    ),
    outputs=(("out", "T", "[B, H, N, d_v]"),),
    translate=translate,
    body=body,
    attributes={"terms": "T, at least 1"},
)
