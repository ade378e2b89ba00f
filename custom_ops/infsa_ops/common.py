"""Shared parts of the operators: ε, the tile size, the shape of ρ, and shape and dtype checks of q, k and v."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DOMAIN = "infsa"
"""ONNX domain and torch namespace of the operators."""

VERSION = 1
"""Version of the ONNX domain."""

EPSILON = 1e-6
"""ε, added to every divisor. The value is the reference package's."""

TILE = 256
"""Queries per tile in Pure InfSA. The N×N matrix is never stored."""


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype used to compute with tokens of `dtype`: float32, or wider."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Disable autocast on the device of `like`, so that products are not rounded to half precision."""
    device = like.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def per_head(rho: Tensor | float, like: Tensor) -> Tensor:
    """Return ρ as `[1, heads or 1, 1, 1]`, with the dtype and device of `like`.

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
    """Check that q, k and v fit together.

    Raises:
        RuntimeError: shapes are not `[B, H, N, d]`, `[B, H, N, d]` and `[B, H, N, d_v]`, or dtypes differ.
    """
    for name, tensor, expected in (
        ("q", q, ["B", "H", "N", "d"]),
        ("k", k, list(q.shape)),
        ("v", v, [*q.shape[:3], "d_v"]),
    ):
        if tensor.dim() != 4 or any(
            not isinstance(size, str) and actual != size for actual, size in zip(tensor.shape, expected, strict=True)
        ):
            raise RuntimeError(f"{name} has shape {list(tensor.shape)}, expected [{', '.join(map(str, expected))}]")
        if tensor.dtype != q.dtype:
            raise RuntimeError(f"{name} is {tensor.dtype}, expected q's dtype, {q.dtype}")


def check_qk(q: Tensor, k: Tensor) -> None:
    """Check that queries and keys fit together; N and M may differ.

    Raises:
        RuntimeError: shapes are not `[B, H, N, d]` and `[B, H, M, d]`, or dtypes differ.
    """
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4:
            raise RuntimeError(f"{name} has {tensor.dim()} dimensions, expected [B, H, tokens, d]")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.dtype != k.dtype:
        raise RuntimeError(
            f"k is {k.dtype} {list(k.shape)}, expected {q.dtype} "
            f"[{q.shape[0]}, {q.shape[1]}, M, {q.shape[3]}] to match q"
        )
