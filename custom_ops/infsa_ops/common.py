"""What the operators share: ε, the tile, the shape of ρ, and what q, k and v must be to each other."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6
"""ε, added to every divisor; the reference package's value."""

TILE = 256
"""Queries at a time in Pure InfSA: N×N never exists."""


def per_head(rho: Tensor | float, like: Tensor) -> Tensor:
    """ρ as `[1, heads or 1, 1, 1]`, dtype and device of `like`.

    Raises:
        ValueError: ρ is neither a scalar nor one value per head of `like` `[B, H, N, d]`.
    """
    rho = torch.as_tensor(rho, dtype=like.dtype, device=like.device)
    if rho.dim() > 1 or (rho.dim() == 1 and rho.shape[0] not in (1, like.shape[1])):
        raise ValueError(
            f"rho has shape {tuple(rho.shape)}, expected a scalar or one value per head, [{like.shape[1]}]"
        )
    return rho.reshape(1, -1, 1, 1)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse q, k and v that don't fit together.

    Raises:
        RuntimeError: not `[B, H, N, d]`, `[B, H, N, d]` and `[B, H, N, d_v]`, or of several dtypes.
    """
    for name, tensor, expected in (
        ("q", q, ["B", "H", "N", "d"]),
        ("k", k, list(q.shape)),
        ("v", v, [*q.shape[:3], "d_v"]),
    ):
        fits = tensor.dim() == 4 and all(
            isinstance(size, str) or actual == size for actual, size in zip(tensor.shape, expected, strict=False)
        )
        torch._check(
            fits,
            lambda name=name, tensor=tensor, expected=expected: (
                f"{name} has shape {list(tensor.shape)}, expected [{', '.join(map(str, expected))}]"
            ),
        )
        torch._check(
            tensor.dtype == q.dtype,
            lambda name=name, tensor=tensor: f"{name} is {tensor.dtype}, expected q's dtype, {q.dtype}",
        )


def check_qk(q: Tensor, k: Tensor) -> None:
    """Refuse queries and keys, as many as there may be of each, that don't fit together.

    Raises:
        RuntimeError: not `[B, H, N, d]` and `[B, H, M, d]`, or of several dtypes.
    """
    for name, tensor in (("q", q), ("k", k)):
        torch._check(tensor.dim() == 4, lambda name=name, tensor=tensor: (
            f"{name} has {tensor.dim()} dimensions, expected [B, H, tokens, d]"
        ))  # fmt: skip
    torch._check(
        q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3] and q.dtype == k.dtype,
        lambda: (
            f"k is {k.dtype} {list(k.shape)}, expected {q.dtype} "
            f"[{q.shape[0]}, {q.shape[1]}, M, {q.shape[3]}] to match q"
        ),
    )
