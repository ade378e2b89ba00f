"""Tiles of queries in ONNX: N×N never exists, whatever N is, in one graph. Shared by the bodies of Pure InfSA.

In half precision the operands are scaled to at most 1, so that nothing overflows, and every sum is float32.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from infsa_ops.common import TILE


def largest(op: Any, x: ir.Value) -> ir.Value:
    """The largest magnitude per head of x `[B, H, N, d]`, float32 `[B, H, 1, 1]`; 1 where all of it is zero."""
    magnitude = op.ReduceMax(op.Abs(op.Cast(x, to=ir.DataType.FLOAT)), [-2, -1], keepdims=1)
    return op.Where(op.Equal(magnitude, 0.0), 1.0, magnitude)


def scaled(op: Any, q: ir.Value, k: ir.Value, dtype: ir.DataType) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries, and keys transposed `[B, H, d, M]`, whose product are affinities in `unit`, float32 `[B, H, 1, 1]`.

    In float32 the unit is 1. In float16 it makes every affinity at most 1.
    """
    width = op.Cast(op.Gather(op.Shape(q), [3]), to=ir.DataType.FLOAT)
    keys = op.Transpose(k, perm=[0, 1, 3, 2])
    if dtype == ir.DataType.FLOAT:
        return q, op.Div(keys, width), op.Expand(1.0, [1, 1, 1, 1])
    q_unit, k_unit = largest(op, q), largest(op, k)
    queries = op.Cast(op.Div(op.Cast(q, to=ir.DataType.FLOAT), q_unit), to=dtype)
    keys = op.Cast(op.Div(op.Cast(keys, to=ir.DataType.FLOAT), op.Mul(k_unit, width)), to=dtype)
    return queries, keys, op.Mul(q_unit, k_unit)


def split(op: Any, q: ir.Value) -> tuple[ir.Value, ir.Value]:
    """q `[B, H, N, d]` as tiles `[tiles, B, H, rows, d]`, even in size, and N `[1]`.

    The last tile is filled up with zero queries, whose affinities relu(0) add exactly nothing.
    """
    shape = op.Shape(q)
    n = op.Gather(shape, [2])
    tiles = op.Div(op.Add(n, [TILE - 1]), [TILE])
    rows = op.Div(op.Sub(op.Add(n, tiles), [1]), tiles)
    missing = op.Sub(op.Mul(tiles, rows), n)
    padded = op.Pad(q, op.Concat([0, 0, 0, 0, 0, 0], missing, [0], axis=0))
    shape_of_tiles = op.Concat(op.Gather(shape, [0, 1]), tiles, rows, op.Gather(shape, [3]), axis=0)
    return op.Transpose(op.Reshape(padded, shape_of_tiles), perm=[2, 0, 1, 3, 4]), n


def join(op: Any, tiles: ir.Value, v: ir.Value, n: ir.Value) -> ir.Value:
    """Tiles `[tiles, B, H, rows, d_v]` as `[B, H, N, d_v]`, the filling cut off."""
    shape = op.Shape(v)
    whole = op.Reshape(
        op.Transpose(tiles, perm=[1, 2, 0, 3, 4]),
        op.Concat(op.Gather(shape, [0, 1]), [-1], op.Gather(shape, [3]), axis=0),
    )
    return op.Slice(whole, [0], n, [2])


def scan(op: Any, name: str, tile: Any, queries: ir.Value, dtype: ir.DataType) -> Any:
    """Scan `tile(op, energy, query) -> (energy, output)` over the tiles of `queries`, the energy starting at zero.

    Energy is float32 `[B, H, 1, 1]`, queries are of `dtype`, the output is float32. (TensorRT's parser refuses a Scan
    that carries nothing, so one that needs no energy passes it through.)
    """

    def value(kind: str, shape: list[Any], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return ir.val(f"{name}.{kind}", dtype, shape)

    zero = op.Expand(0.0, op.Concat(op.Slice(op.Shape(queries), [1], [3]), [1, 1], axis=0))
    op.builder.push_module(name)  # names inside a body must not shadow the names around it
    graph = op.builder.subgraph(
        tile,
        [value("energy", ["B", "H", 1, 1]), value("query", ["B", "H", "rows", "d"], dtype)],
        [value("energy_out", ["B", "H", 1, 1]), value("output", [None] * 4)],
        name=name,
    )
    op.builder.pop_module()
    return op.Scan(zero, queries, body=graph, num_scan_inputs=1, _outputs=2)
