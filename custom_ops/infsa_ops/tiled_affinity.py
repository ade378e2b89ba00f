"""Passes over all pairs of tokens, from which Pure InfSA's operators are built, and the one that runs on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from infsa_ops.common import TILE


@dataclass(frozen=True)
class Sweeps:
    """Implementation of A v and Σ A² with A = relu(q̂k̂ᵀ). The N×M matrix is never stored.

    q is `[B, H, N, d]`, k `[B, H, M, d]` of q's dtype, v `[B, H, M, d_v]`. Products are contiguous `[B, H, N, d_v]`,
    float64 for float64 tokens, else float32; squares are float64 `[B, H]`.

    Attributes:
        product_and_squares: (q, k, v) → A v and Σ A².
        product: (q, k, v) → A v.
        squares: (q, k) → Σ A².
    """

    product_and_squares: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    product: Callable[[Tensor, Tensor, Tensor], Tensor]
    squares: Callable[[Tensor, Tensor], Tensor]


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield 256 rows of A at a time, with their slice."""
    dtype = torch.promote_types(q.dtype, torch.float32)  # in half precision squares of values above 255 overflow
    queries, keys = q.to(dtype), (k.to(dtype) / q.shape[-1]).transpose(-1, -2)
    for start in range(0, q.shape[2], TILE):
        rows = slice(start, start + TILE)
        yield rows, torch.relu(queries[:, :, rows] @ keys)


def _energy(affinity: Tensor) -> Tensor:
    # sum each row, then the rows: one float32 sum over all N² squares is off by 1e-4 at N = 4097
    return affinity.square().sum(-1).sum(-1, dtype=torch.float64)


def _like_product(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    values = v.to(torch.promote_types(q.dtype, torch.float32))
    return values, values.new_empty(*q.shape[:3], v.shape[-1])


def _product_and_squares(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    values, product = _like_product(q, v)
    total = q.new_zeros(q.shape[:2], dtype=torch.float64)
    for rows, affinity in _tiles(q, k):
        total += _energy(affinity)
        product[:, :, rows] = affinity @ values
    return product, total


def _product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values, product = _like_product(q, v)
    for rows, affinity in _tiles(q, k):
        product[:, :, rows] = affinity @ values
    return product


def _squares(q: Tensor, k: Tensor) -> Tensor:
    total = q.new_zeros(q.shape[:2], dtype=torch.float64)
    for _, affinity in _tiles(q, k):
        total += _energy(affinity)
    return total


TILED = Sweeps(_product_and_squares, _product, _squares)
"""Implementation in torch, one tile of queries at a time, for any device, any floating dtype and any width."""
