"""Tiles of queries in ONNX, shared by the function bodies of Pure InfSA. One graph serves every N; N×N is never stored.

Every axis may be empty. Internally an empty axis is padded to one zero: ONNX Runtime refuses a Scan without steps, and
version 1.24 crashes on an integer division by zero.

A step takes the queries of one tile and all keys, of one head or of all heads of an image. In float32 it takes one head
if all heads would not fit in a CPU's cache: that made a layer of 4097 tokens faster by a sixth. Half types are meant
for GPUs and take all heads. Their operands are scaled to at most 1, so nothing overflows, and every sum is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from infsa_ops.common import TILE

CACHED = 1 << 22
"""Maximum number of affinities in a step of several heads: 16 MiB of float32."""

ROW_SUM, TINY = 256.0, 1e-30


@dataclass(frozen=True)
class Tiling:
    """Division of q `[B, H, N, d]` into tiles. Numbers are ONNX values of shape `[1]`.

    Attributes:
        dtype: dtype of q.
        outer: (B, H) as one value of shape `[2]`.
        tokens: N.
        batch, heads: B and H, each at least 1.
        groups: B·H / per.
        per: heads per step.
        count: tiles per head.
        rows: queries per tile. The last tile is padded with zero queries, whose affinities relu(0) add exactly zero.
    """

    dtype: ir.DataType
    outer: ir.Value
    tokens: ir.Value
    batch: ir.Value
    heads: ir.Value
    groups: ir.Value
    per: ir.Value
    count: ir.Value
    rows: ir.Value


def tiling(op: Any, q: ir.Value, k: ir.Value, dtype: ir.DataType) -> Tiling:
    """Return the tiling of queries `[B, H, N, d]` of `dtype` for keys `[B, H, M, d]`."""
    outer, tokens = op.Shape(q, end=2), op.Shape(q, start=2, end=3)
    batch, heads = (op.Max(op.Shape(q, start=axis, end=axis + 1), [1]) for axis in range(2))
    largest = 2 * TILE if dtype == ir.DataType.FLOAT else TILE
    queries = op.Max(tokens, [1])
    count = op.Div(op.Add(queries, [largest - 1]), [largest])
    rows = op.Div(op.Sub(op.Add(queries, count), [1]), count)
    groups = batch
    if dtype == ir.DataType.FLOAT:
        cached = op.LessOrEqual(op.Mul(op.Mul(heads, rows), op.Shape(k, start=2, end=3)), [CACHED])
        groups = op.Where(cached, batch, op.Mul(batch, heads))
    return Tiling(dtype, outer, tokens, batch, heads, groups, op.Div(op.Mul(batch, heads), groups), count, rows)


def nonempty(op: Any, x: ir.Value) -> ir.Value:
    """Return x with every empty axis padded to a length of one, with a zero."""
    shape = op.Shape(x)
    return op.Pad(x, op.Concat(op.Sub(shape, shape), op.Max(op.Sub([1], shape), [0]), axis=0))


def largest(op: Any, x: ir.Value) -> ir.Value:
    """Return the largest magnitude per head of x `[B, H, N, d]`, float32 `[B, H, 1, 1]`; 1 if all values are zero."""
    magnitude = op.ReduceMax(op.Abs(op.Cast(nonempty(op, x), to=ir.DataType.FLOAT)), [-2, -1], keepdims=1)
    return op.Where(op.Equal(magnitude, 0.0), 1.0, magnitude)


def scaled(op: Any, q: ir.Value, k: ir.Value, dtype: ir.DataType) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return queries, transposed keys `[B, H, d, M]`, and the unit of their product, float32 `[B, H, 1, 1]`.

    Their product times the unit is q kᵀ / d. In float32 the unit is 1. In half types it makes every affinity at most 1.
    """
    width = op.Cast(op.Shape(q, start=3), to=ir.DataType.FLOAT)
    keys = op.Transpose(k, perm=[0, 1, 3, 2])
    if dtype == ir.DataType.FLOAT:
        return q, op.Div(keys, width), op.Expand(1.0, [1, 1, 1, 1])
    q_unit, k_unit = largest(op, q), largest(op, k)
    queries = op.Cast(op.Div(op.Cast(q, to=ir.DataType.FLOAT), q_unit), to=dtype)
    keys = op.Cast(op.Div(op.Cast(keys, to=ir.DataType.FLOAT), op.Mul(k_unit, width)), to=dtype)
    return queries, keys, op.Mul(q_unit, k_unit)


def as_values(op: Any, x: ir.Value, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """Return x `[B, H, M, d_v]` as values of `dtype`, divided by a unit, and the unit, float32 `[B, H, 1, 1]`.

    Affinities of `dtype` are applied to these values. In float32 the unit is 1. In half types it makes every value at
    most 1.
    """
    if dtype == ir.DataType.FLOAT:
        return op.Cast(x, to=dtype), op.Expand(1.0, [1, 1, 1, 1])
    unit = largest(op, x)
    return op.Cast(op.Div(op.Cast(x, to=ir.DataType.FLOAT), unit), to=dtype), unit


def product(op: Any, affinity: ir.Value, values: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Multiply affinities `[…, rows, M]` by `as_values`: float32 `[…, rows, d_v]`, finite for any M in half types too.

    In half types every row is first scaled to the sum 256. Its product is then 256 times a convex combination of the
    values, and an even weight over 332k tokens, 8e-4, is still a normal number.
    """
    if dtype == ir.DataType.FLOAT:
        return op.MatMul(affinity, values)
    exact = op.Cast(affinity, to=ir.DataType.FLOAT)
    mass = op.Div(op.ReduceSum(exact, [-1], keepdims=1), ROW_SUM)
    weights = op.CastLike(op.Div(exact, op.Max(mass, TINY)), affinity)
    return op.Mul(op.Cast(op.MatMul(weights, values), to=ir.DataType.FLOAT), mass)


def squares(op: Any, affinity: ir.Value) -> ir.Value:
    """Return Σ A² of a tile `[per, rows, N]`: float32 `[per, 1, 1]`.

    It sums along each row, then over the rows: one float32 sum over all N² squares is off by 1e-4 at N = 4097. It uses
    a product and a sum, because ONNX Runtime's ReduceSumSquare adds the numbers one by one.
    """
    exact = op.Cast(affinity, to=ir.DataType.FLOAT)
    return op.ReduceSum(op.ReduceSum(op.Mul(exact, exact), [-1], keepdims=1), [-2], keepdims=1)


def total(op: Any, cut: Tiling, tiles: ir.Value) -> ir.Value:
    """Sum `[steps, per, 1, 1]` over all tiles: `[B, H, 1, 1]`."""
    by_tile = op.Reshape(tiles, op.Concat(cut.groups, cut.count, cut.per, axis=0))
    whole = op.Reshape(op.ReduceSum(by_tile, [1], keepdims=0), op.Concat(cut.batch, cut.heads, [1, 1], axis=0))
    return op.Slice(whole, [0, 0], cut.outer, [0, 1])


def product_and_squares(
    op: Any, cut: Tiling, q: ir.Value, k: ir.Value, values: ir.Value, v: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Return A·V `[B, H, N, d_v]` and Σ A² `[B, H, 1, 1]`, in the units of `scaled` q and k and of v `as_values`."""

    def step(op: Any, query: ir.Value, keys: ir.Value, values: ir.Value) -> list[ir.Value]:
        affinity = op.Relu(op.MatMul(query, keys))
        return [squares(op, affinity), product(op, affinity, values, cut.dtype)]

    by_tile, weighted = scan(op, "first", cut, step, 2, q, k, values)
    return join(op, cut, weighted, v), total(op, cut, by_tile)


def join(op: Any, cut: Tiling, tiles: ir.Value, v: ir.Value) -> ir.Value:
    """Join tiles `[steps, per, rows, d_v]` to `[B, H, N, d_v]` without the padding; d_v is taken from v."""
    width = op.Max(op.Shape(v, start=3), [1])
    by_tile = op.Reshape(tiles, op.Concat(cut.groups, cut.count, cut.per, cut.rows, width, axis=0))
    by_head = op.Transpose(by_tile, perm=[0, 2, 1, 3, 4])
    whole = op.Reshape(by_head, op.Concat(cut.batch, cut.heads, [-1], width, axis=0))
    ends = op.Concat(cut.outer, cut.tokens, op.Shape(v, start=3), axis=0)
    return op.Slice(whole, [0, 0, 0, 0], ends, [0, 1, 2, 3])


def scan(
    op: Any,
    name: str,
    cut: Tiling,
    step: Callable[..., list[ir.Value]],
    outputs: int,
    q: ir.Value,
    *operands: ir.Value,
) -> list[ir.Value]:
    """Scan `step(op, query, *operands)` over all tiles.

    Args:
        name: name of the scan, unique in the body.
        cut: tiling of `q`.
        step: takes queries `[per, rows, d]` and the part of every operand for its heads, `[per, …, …]`; returns
            `outputs` values.
        outputs: number of outputs of a step.
        q: `[B, H, N, d]`.
        operands: `[B, H, …, …]`, such as keys and values.

    Returns:
        Each output stacked over all steps, `[groups·count, …]`; `total` and `join` combine them.
    """
    width = op.Shape(q, start=3)
    filled = op.Concat(cut.batch, cut.heads, op.Mul(cut.count, cut.rows), width, axis=0)
    padded = op.Pad(q, op.Concat([0, 0, 0, 0], op.Sub(filled, op.Shape(q)), axis=0))
    by_tile = op.Reshape(padded, op.Concat(cut.groups, cut.per, cut.count, cut.rows, width, axis=0))
    by_tile = op.Transpose(by_tile, perm=[0, 2, 1, 3, 4])
    queries = op.Reshape(by_tile, op.Concat([-1], cut.per, cut.rows, width, axis=0))
    grouped = []
    for operand in (nonempty(op, x) for x in operands):
        grouped.append(op.Reshape(operand, op.Concat(cut.groups, cut.per, op.Shape(operand, start=2), axis=0)))
    steps = op.Squeeze(op.Mul(cut.groups, cut.count))
    group_of = op.Div(op.Range(0, steps, 1), op.Squeeze(cut.count))

    def inner(op: Any, carried: ir.Value, query: ir.Value, group: ir.Value) -> list[ir.Value]:
        # TensorRT's parser refuses a Scan that carries nothing
        return [op.Identity(carried), *step(op, query, *(op.Gather(x, group, axis=0) for x in grouped))]

    def value(kind: str, shape: list[Any], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return ir.val(f"{name}.{kind}", dtype, shape)

    op.builder.push_module(name)  # names inside a body must not shadow the names around it
    graph = op.builder.subgraph(
        inner,
        [
            value("carried", [1]),
            value("query", ["per", "rows", "d"], cut.dtype),
            value("group", [], ir.DataType.INT64),
        ],
        [value("carried_out", [1]), *(value(f"output{i}", [None] * 3) for i in range(outputs))],
        name=name,
    )
    op.builder.pop_module()
    result = op.Scan(op.Expand(0.0, [1]), queries, group_of, body=graph, num_scan_inputs=2, _outputs=1 + outputs)
    return list(result[1:])
