"""Triton kernel of Pure InfSA on tensor cores: relu(q kᵀ) v and Σ relu(q kᵀ)². The N×N matrix is never stored.

One program takes a block of the queries of one head and loops over all keys. Tokens past the end and columns past the
width are loaded as zeros, whose affinities relu(0) add exactly zero, so only loads and the last store are masked.
The scale 1/d is applied after the sums, where it costs nothing.

Sums inside a tensor core round towards zero. In tf32x3 Triton adds each block of keys to the accumulator outside the
tensor core, rounding to nearest. In 16 bits the accumulator stays inside and loses at most M/8 · 2⁻²³ of Σ |A v|:
5e-3 at M = 331,777.

`affinity_launch` chooses the blocks and launches the kernel. Nothing else imports this module: it needs triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(start, row_stride, column_stride, rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Load `[ROWS, PADDED]` from `start`; rows from `rows` on and columns from WIDTH on are zero.

    Offsets within a tile are 32 bits wide: counted from `start` they are at most 128 strides.
    """
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    inside = row < rows
    if WIDTH != PADDED:
        inside = inside & (column < WIDTH)
    return tl.load(start + row * row_stride + column * column_stride, mask=inside, other=0.0)


@triton.jit
def _head(tensor, stride, batch, head):
    """Return the address of a head, computed in 64 bits because B·H·N·d exceeds 2³¹."""
    return tensor + batch.to(tl.int64) * stride[0] + head.to(tl.int64) * stride[1]


@triton.jit(do_not_specialize=["heads", "queries", "keys"])  # images of every size share one compiled kernel
def affinity(
    q, k, v, longest, product, squares,
    q_stride, k_stride, v_stride, product_stride,
    heads, queries, keys,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    PADDED: tl.constexpr, PADDED_VALUE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRODUCT: tl.constexpr, SQUARES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Compute A V and d² ‖A‖²_F for one block of queries of one head, with A = relu(q kᵀ / d).

    Args:
        q, k: `[B, H, N, d]` and `[B, H, M, d]` of one dtype, float32, float16 or bfloat16, any strides.
        v: `[B, H, M, d_v]` of that dtype, any strides.
        longest: float32 `[B·H]`, the largest Euclidean norm of a key of each head; read where SCALED.
        product: float32 `[B, H, N, d_v]`, any strides; written where PRODUCT, else v and product are None.
        squares: float32 `[B·H, blocks of queries]`; written where SQUARES, else None.
        *_stride: the four strides of a tensor.
        heads, queries, keys: H, N, M.
        WIDTH, VALUE_WIDTH: d, d_v.
        PADDED, PADDED_VALUE: d and d_v rounded up to powers of two, at least 16.
        QUERIES, KEYS: queries and keys per tile.
        PRODUCT, SQUARES: outputs to compute.
        SCALED: scale affinities to at most 1 before they are rounded to v's dtype: float16 ends at 65504.
    """
    blocks = tl.cdiv(queries, QUERIES)
    program = tl.program_id(0)
    first = (program % blocks) * QUERIES  # programs that run together share a head: its keys stay in the L2 cache
    batch, head = program // blocks // heads, program // blocks % heads
    query_at = _head(q, q_stride, batch, head) + first.to(tl.int64) * q_stride[2]
    query = _tile(query_at, q_stride[2], q_stride[3], queries - first, QUERIES, WIDTH, PADDED)
    if SCALED:
        # Cauchy–Schwarz: no affinity of a row is above ‖q‖ times the longest key
        exact = query.to(tl.float32)
        unit = tl.sqrt(tl.sum(exact * exact, 1)) * tl.load(longest + program // blocks)
        inverse = 1.0 / tl.where(unit == 0.0, 1.0, unit)
    key_at = _head(k, k_stride, batch, head)
    if PRODUCT:
        value_at = _head(v, v_stride, batch, head)
        weighted = tl.zeros([QUERIES, PADDED_VALUE], tl.float32)
    if SQUARES:
        # row by row, with compensation: over 331,777 equal tokens a plain float32 sum is off by 4e-5
        energy = tl.zeros([QUERIES], tl.float32)
        lost = tl.zeros([QUERIES], tl.float32)
    for start in range(0, keys, KEYS):
        key = _tile(key_at, k_stride[2], k_stride[3], keys - start, KEYS, WIDTH, PADDED)
        tile = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        tile = tl.maximum(tile, 0.0, propagate_nan=tl.PropagateNan.ALL)
        key_at += KEYS * k_stride[2]
        if SQUARES:
            addend = tl.sum(tile * tile, 1) - lost
            total = energy + addend
            lost = (total - energy) - addend
            energy = total
        if PRODUCT:
            value = _tile(value_at, v_stride[2], v_stride[3], keys - start, KEYS, VALUE_WIDTH, PADDED_VALUE)
            value_at += KEYS * v_stride[2]
            if SCALED:
                tile *= inverse[:, None]
            weighted = tl.dot(tile.to(value.dtype), value, weighted, input_precision="tf32x3")
    if SQUARES:
        tl.store(squares + program, tl.sum(energy, 0))
    if PRODUCT:
        if SCALED:
            weighted *= unit[:, None]
        row, column = tl.arange(0, QUERIES)[:, None], tl.arange(0, PADDED_VALUE)[None, :]
        product_at = _head(product, product_stride, batch, head) + first.to(tl.int64) * product_stride[2]
        tl.store(
            product_at + row * product_stride[2] + column * product_stride[3],
            weighted * (1.0 / WIDTH),
            mask=(row < queries - first) & (column < VALUE_WIDTH),
        )
