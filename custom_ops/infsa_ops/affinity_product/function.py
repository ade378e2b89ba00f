"""`AffinityProduct` in ONNX: schema, translation from torch, and body in standard operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import onnxscript
import torch

from infsa_ops import onnx_tiling as tiles
from infsa_ops.affinity_product import op as _registration  # noqa: F401  (registers the torch op)
from infsa_ops.common import DOMAIN, VERSION
from infsa_ops.onnx_operator import OnnxOperator

NAME = "AffinityProduct"


def translate(q: Any, k: Any, v: Any) -> Any:
    """Translate the torch op to its ONNX node, for `torch.onnx.export(custom_translation_table=…)`."""
    return onnxscript.values.Opset(DOMAIN, VERSION).AffinityProduct(q, k, v)


def body(attributes: Mapping[str, ir.Attr], opset: int, dtype: ir.DataType) -> ir.Function:
    """Build the operator from standard ONNX operators of version `opset`, for queries and keys of `dtype`."""

    def trace(op: Any, q: ir.Value, k: ir.Value, v: ir.Value) -> list[ir.Value]:
        cut = tiles.tiling(op, q, k, dtype)
        q, k, unit = tiles.scaled(op, q, k, dtype)
        values, values_unit = tiles.as_values(op, v, dtype)
        weighted, squares = tiles.product_and_squares(op, cut, q, k, values, v)
        product = op.Mul(weighted, op.Mul(unit, values_unit))
        return [product, op.Squeeze(op.Mul(squares, op.Mul(unit, unit)), [-2, -1])]

    inputs = [ir.Value(name=name) for name in ("q", "k", "v")]
    return onnxscript.build_function(trace, inputs, domain=DOMAIN, name=NAME, opset_imports={"": opset})


OPERATOR = OnnxOperator(
    name=NAME,
    doc="relu(q k^T / d) v, and the sum of relu(q k^T / d)^2 over all pairs of tokens.",
    torch_op=torch.ops.infsa.affinity_product.default,
    inputs=(("q", "T", "[B, H, N, d]"), ("k", "T", "[B, H, M, d]"), ("v", "V", "[B, H, M, d_v]")),
    outputs=(("product", "tensor(float)", "[B, H, N, d_v]"), ("squared_norm", "tensor(float)", "[B, H]")),
    translate=translate,
    body=body,
    types={"T": "dtype of queries and keys", "V": "dtype of the values"},
)
