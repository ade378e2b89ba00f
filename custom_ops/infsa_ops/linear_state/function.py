"""`LinearInfSAStateUpdate` in ONNX: schema, translation from torch, and body in standard operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import onnxscript
import torch

from infsa_ops.common import DOMAIN, VERSION
from infsa_ops.linear_state import op as _registration  # noqa: F401  (registers the torch op)
from infsa_ops.onnx_operator import OnnxOperator
from infsa_ops.onnx_tiling import nonempty

NAME = "LinearInfSAStateUpdate"


def translate(weights: Any, values: Any, mass: Any, moment: Any) -> Any:
    """Translate the torch op to its ONNX node, for `torch.onnx.export(custom_translation_table=…)`."""
    return onnxscript.values.Opset(DOMAIN, VERSION).LinearInfSAStateUpdate(weights, values, mass, moment)


def body(attributes: Mapping[str, ir.Attr], opset: int, dtype: ir.DataType) -> ir.Function:
    """Build the operator from standard ONNX operators of version `opset`, for tokens of any dtype."""

    def trace(op: Any, weights: ir.Value, values: ir.Value, mass: ir.Value, moment: ir.Value) -> list[ir.Value]:
        # float32 whatever the tokens are: in half precision a sum over 332k tokens overflows
        w = op.Cast(weights, to=ir.DataType.FLOAT)
        x = op.Cast(values, to=ir.DataType.FLOAT)
        # ONNX Runtime 1.24 leaves the axis where it sums over nothing
        mass_out = op.Add(mass, op.ReduceSum(nonempty(op, w), [-1], keepdims=0))
        # [B, G, H/G, N] times [B, G, N, d]: the heads of a group are the rows of one product
        shape, groups = op.Shape(w), op.Gather(op.Shape(x), [1])
        heads = op.Div(op.Gather(shape, [1]), op.Max(groups, [1]))
        split = op.Concat(op.Gather(shape, [0]), groups, heads, op.Gather(shape, [2]), axis=0)
        rows = op.Reshape(w, split, allowzero=1)  # a chunk may have no tokens
        added = op.Reshape(op.MatMul(rows, x), op.Shape(moment), allowzero=1)
        return [mass_out, op.Add(moment, added)]

    inputs = [ir.Value(name=name) for name in ("weights", "values", "mass", "moment")]
    return onnxscript.build_function(trace, inputs, domain=DOMAIN, name=NAME, opset_imports={"": opset})


OPERATOR = OnnxOperator(
    name=NAME,
    doc="mass + sum(weights) and moment + sum(weights * values) over the tokens.",
    torch_op=torch.ops.infsa.linear_state_update.default,
    inputs=(
        ("weights", "T", "[B, H, N]"),
        ("values", "T", "[B, G, N, d], G divides H"),
        ("mass", "tensor(float)", "[B, H]"),
        ("moment", "tensor(float)", "[B, H, d]"),
    ),
    outputs=(("mass_out", "tensor(float)", "[B, H]"), ("moment_out", "tensor(float)", "[B, H, d]")),
    translate=translate,
    body=body,
)
