"""`AffinitySquaredNorm` in ONNX: schema, translation from torch, and body in standard operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import onnxscript
import torch

from infsa_ops import onnx_tiling as tiles
from infsa_ops.affinity_squared_norm import op as _registration  # noqa: F401  (registers the torch op)
from infsa_ops.common import DOMAIN, VERSION
from infsa_ops.onnx_operator import OnnxOperator

NAME = "AffinitySquaredNorm"


def translate(q: Any, k: Any) -> Any:
    """Translate the torch op to its ONNX node, for `torch.onnx.export(custom_translation_table=…)`."""
    return onnxscript.values.Opset(DOMAIN, VERSION).AffinitySquaredNorm(q, k)


def body(attributes: Mapping[str, ir.Attr], opset: int, dtype: ir.DataType) -> ir.Function:
    """Build the operator from standard ONNX operators of version `opset`, for tokens of `dtype`."""

    def trace(op: Any, q: ir.Value, k: ir.Value) -> ir.Value:
        cut = tiles.tiling(op, q, k, dtype)
        q, k, unit = tiles.scaled(op, q, k, dtype)

        def step(op: Any, query: ir.Value, keys: ir.Value) -> list[ir.Value]:
            return [tiles.squares(op, op.Relu(op.MatMul(query, keys)))]

        (squares,) = tiles.scan(op, "squares", cut, step, 1, q, k)
        return op.Squeeze(op.Mul(tiles.total(op, cut, squares), op.Mul(unit, unit)), [-2, -1])

    inputs = [ir.Value(name=name) for name in ("q", "k")]
    return onnxscript.build_function(trace, inputs, domain=DOMAIN, name=NAME, opset_imports={"": opset})


OPERATOR = OnnxOperator(
    name=NAME,
    doc="The sum of relu(q k^T / d)^2 over all pairs of tokens.",
    torch_op=torch.ops.infsa.affinity_squared_norm.default,
    inputs=(("q", "T", "[B, H, N, d]"), ("k", "T", "[B, H, M, d]")),
    outputs=(("squared_norm", "tensor(float)", "[B, H]"),),
    translate=translate,
    body=body,
)
