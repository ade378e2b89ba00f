"""`NeumannKernel` in ONNX: schema, translation from torch, and body in standard operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch

from infsa_ops.common import EPSILON
from infsa_ops.neumann_kernel import op as _registration

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
        onnx.defs.OpSchema.FormalParameter("rho", "T", "scalar or [H]"),
    ],
    outputs=[onnx.defs.OpSchema.FormalParameter("out", "T", "[B, H, N, d_v]")],
    attributes=[onnx.defs.OpSchema.Attribute("terms", onnx.defs.OpSchema.AttrType.INT, "T, at least 1")],
    type_constraints=[("T", ["tensor(float)"], "dtype of the tokens")],
)


def translate(q: Any, k: Any, v: Any, rho: Any, terms: int) -> Any:
    """The torch op's node, for `torch.onnx.export(custom_translation_table=…)`."""
    return onnxscript.values.Opset("infsa", 1).NeumannKernel(q, k, v, rho, terms=terms)


def _split(op: Any, q: ir.Value) -> tuple[ir.Value, ir.Value]:
    """q `[B, H, N, d]` as tiles `[tiles, B, H, rows, d]`, even in size, and N `[1]`.

    The last tile is filled up with zero queries, whose affinities relu(0) add exactly nothing.
    """
    shape = op.Shape(q)
    n = op.Gather(shape, [2])
    tile = _registration.TILE
    tiles = op.Div(op.Add(n, [tile - 1]), [tile])
    rows = op.Div(op.Sub(op.Add(n, tiles), [1]), tiles)
    missing = op.Sub(op.Mul(tiles, rows), n)
    padded = op.Pad(q, op.Concat([0, 0, 0, 0, 0, 0], missing, [0], axis=0))
    split = op.Reshape(padded, op.Concat(op.Gather(shape, [0, 1]), tiles, rows, op.Gather(shape, [3]), axis=0))
    return op.Transpose(split, perm=[2, 0, 1, 3, 4]), n


def _join(op: Any, tiles: ir.Value, v: ir.Value, n: ir.Value) -> ir.Value:
    """Tiles `[tiles, B, H, rows, d_v]` as `[B, H, N, d_v]`, the filling cut off."""
    shape = op.Shape(v)
    whole = op.Reshape(
        op.Transpose(tiles, perm=[1, 2, 0, 3, 4]),
        op.Concat(op.Gather(shape, [0, 1]), [-1], op.Gather(shape, [3]), axis=0),
    )
    return op.Slice(whole, [0], n, [2])


def _scan(op: Any, name: str, tile: Any, energy: ir.Value, queries: ir.Value) -> Any:
    """Scan `tile(op, energy, query) -> (energy, output)` over the tiles of `queries`."""

    def value(kind: str, shape: list[Any]) -> ir.Value:
        return ir.val(f"{name}.{kind}", ir.DataType.FLOAT, shape)

    op.builder.push_module(name)  # names inside a body must not shadow the names around it
    graph = op.builder.subgraph(
        tile,
        [value("energy", ["B", "H", 1, 1]), value("query", ["B", "H", "rows", "d"])],
        [value("energy_out", ["B", "H", 1, 1]), value("weighted", [None] * 4)],
        name=name,
    )
    op.builder.pop_module()
    return op.Scan(energy, queries, body=graph, num_scan_inputs=1, _outputs=2)


def body(attributes: Mapping[str, ir.Attr], opset: int) -> ir.Function:
    """The operator in standard ONNX operators of version `opset`, for the T that `attributes` name.

    ONNX functions can't unroll by an attribute, so a body serves one T. (A Loop over the terms would serve all;
    TensorRT's parser refuses a Scan inside a Loop.)
    """
    terms = attributes["terms"].as_int()

    def trace(op: Any, q: ir.Value, k: ir.Value, v: ir.Value, rho: ir.Value) -> ir.Value:
        queries, n = _split(op, q)
        width = op.Cast(op.Gather(op.Shape(q), [3]), to=ir.DataType.FLOAT)
        keys = op.Div(op.Transpose(k, perm=[0, 1, 3, 2]), width)

        def first(op: Any, energy: ir.Value, query: ir.Value) -> list[ir.Value]:
            affinity = op.Relu(op.MatMul(query, keys))
            # along rows, then over rows: one float32 sum over all squares is off by 1e-4 at N = 4097
            by_row = op.ReduceSumSquare(affinity, [-1], keepdims=1)
            return [op.Add(energy, op.ReduceSum(by_row, [-2], keepdims=1)), op.MatMul(affinity, v)]

        def following(op: Any, energy: ir.Value, query: ir.Value) -> list[ir.Value]:
            # the energy only passes through: TensorRT's parser refuses a Scan that carries nothing
            return [op.Identity(energy), op.MatMul(op.Relu(op.MatMul(query, keys)), term)]

        zero = op.Expand(0.0, op.Concat(op.Gather(op.Shape(q), [0, 1]), [1, 1], axis=0))
        energy, tiles = _scan(op, "first", first, zero, queries)
        scale = op.Div(op.Reshape(rho, [1, -1, 1, 1]), op.Add(op.Sqrt(energy), EPSILON))
        term = op.Mul(_join(op, tiles, v, n), scale)
        total = term
        for t in range(2, terms + 1):
            _, tiles = _scan(op, f"term{t}", following, zero, queries)
            term = op.Mul(_join(op, tiles, v, n), scale)
            total = op.Add(total, term)
        return total

    inputs = [ir.Value(name=name) for name in ("q", "k", "v", "rho")]
    return onnxscript.build_function(
        trace, inputs, domain="infsa", name=NAME, attributes=[attributes["terms"]], opset_imports={"": opset}
    )
