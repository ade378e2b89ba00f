"""`NeumannKernel` in ONNX: schema, translation from torch, and body in standard operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch

from infsa_ops import tiles
from infsa_ops.common import EPSILON
from infsa_ops.neumann_kernel import op as _registration  # noqa: F401  (registers the torch op)

NAME = "NeumannKernel"
TORCH_OP = torch.ops.infsa.neumann_kernel.default

SCHEMA = onnx.defs.OpSchema(
    NAME,
    "infsa",
    1,
    doc="The first `terms` terms of the Neumann series of relu(q k^T / d), Frobenius-normalised, applied to v.",
    inputs=[
        onnx.defs.OpSchema.FormalParameter("q", "T", "[B, H, N, d]"),
        onnx.defs.OpSchema.FormalParameter("k", "T", "[B, H, N, d]"),
        onnx.defs.OpSchema.FormalParameter("v", "T", "[B, H, N, d_v]"),
        onnx.defs.OpSchema.FormalParameter("rho", "tensor(float)", "scalar or [H]"),
    ],
    outputs=[onnx.defs.OpSchema.FormalParameter("out", "T", "[B, H, N, d_v]")],
    attributes=[onnx.defs.OpSchema.Attribute("terms", onnx.defs.OpSchema.AttrType.INT, "T, at least 1")],
    type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "dtype of the tokens")],
)


ROW_SUM, TINY = 256.0, 1e-30


def translate(q: Any, k: Any, v: Any, rho: Any, terms: int) -> Any:
    """The torch op's node, for `torch.onnx.export(custom_translation_table=…)`."""
    return onnxscript.values.Opset("infsa", 1).NeumannKernel(q, k, v, rho, terms=terms)


def _product(op: Any, affinity: ir.Value, values: ir.Value) -> ir.Value:
    return op.MatMul(affinity, values)


def _as_they_are(op: Any, x: ir.Value, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    return x, op.Expand(1.0, [1, 1, 1, 1])


def _half_product(op: Any, affinity: ir.Value, values: ir.Value) -> ir.Value:
    """Affinities `[…, rows, N]` times values of at most 1, in half precision, finite for any N; float32.

    Every row is brought to the sum 256 first: its product is 256 times a convex combination of the values, and an
    even weight over 332k tokens, 8e-4, is still a normal number.
    """
    exact = op.Cast(affinity, to=ir.DataType.FLOAT)
    mass = op.Div(op.ReduceSum(exact, [-1], keepdims=1), ROW_SUM)
    weights = op.CastLike(op.Div(exact, op.Max(mass, TINY)), affinity)
    return op.Mul(op.Cast(op.MatMul(weights, values), to=ir.DataType.FLOAT), mass)


def _to_half(op: Any, x: ir.Value, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """x / unit in `dtype`, none of it above 1, and the unit, float32 per head."""
    unit = tiles.largest(op, x)
    return op.Cast(op.Div(op.Cast(x, to=ir.DataType.FLOAT), unit), to=dtype), unit


def body(attributes: Mapping[str, ir.Attr], opset: int, dtype: ir.DataType) -> ir.Function:
    """The operator in standard ONNX operators of version `opset`, for tokens of `dtype` and the T of `attributes`.

    ONNX functions can't unroll by an attribute, so a body serves one T. (A Loop over the terms would serve all;
    TensorRT's parser refuses a Scan inside a Loop.)
    """
    terms = attributes["terms"].as_int()
    half = dtype != ir.DataType.FLOAT
    product, as_values = (_half_product, _to_half) if half else (_product, _as_they_are)

    def trace(op: Any, q: ir.Value, k: ir.Value, v: ir.Value, rho: ir.Value) -> ir.Value:
        cut = tiles.tiling(op, q, dtype)
        q, k, unit = tiles.scaled(op, q, k, dtype)
        values, values_unit = as_values(op, v, dtype)

        def first(op: Any, query: ir.Value, keys: ir.Value, values: ir.Value) -> list[ir.Value]:
            affinity = op.Relu(op.MatMul(query, keys))
            return [tiles.squares(op, affinity), product(op, affinity, values)]

        def following(op: Any, query: ir.Value, keys: ir.Value, values: ir.Value) -> list[ir.Value]:
            return [product(op, op.Relu(op.MatMul(query, keys)), values)]

        squares, weighted = tiles.scan(op, "first", cut, first, 2, q, k, values)
        norm = op.Add(op.Sqrt(tiles.total(op, cut, squares)), op.Div(EPSILON, unit))
        scale = op.Div(op.Reshape(op.Cast(rho, to=ir.DataType.FLOAT), [1, -1, 1, 1]), norm)
        total = values = op.Mul(tiles.join(op, cut, weighted, v), op.Mul(scale, values_unit))
        for t in range(2, terms + 1):
            values, values_unit = as_values(op, values, dtype)
            (weighted,) = tiles.scan(op, f"term{t}", cut, following, 1, q, k, values)
            values = op.Mul(tiles.join(op, cut, weighted, v), op.Mul(scale, values_unit))
            total = op.Add(total, values)
        return op.Cast(total, to=dtype)

    inputs = [ir.Value(name=name) for name in ("q", "k", "v", "rho")]
    return onnxscript.build_function(
        trace, inputs, domain="infsa", name=NAME, attributes=[attributes["terms"]], opset_imports={"": opset}
    )
