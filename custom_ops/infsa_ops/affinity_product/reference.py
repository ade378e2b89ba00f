"""relu(q̂k̂ᵀ)v and ‖relu(q̂k̂ᵀ)‖²_F with the whole N×M matrix. In float64 it is the reference result."""

from __future__ import annotations

import torch
from torch import Tensor


def affinity_product(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ relu(q̂k̂ᵀ)v over the keys, `[B, H, N, d_v]`, and Σ relu(q̂k̂ᵀ)² over all pairs, `[B, H]`.

    Args:
        q: `[B, H, N, d]`.
        k: `[B, H, M, d]`.
        v: `[B, H, M, d_v]`.
    """
    affinity = torch.relu(q @ k.transpose(-1, -2) / q.shape[-1])
    return affinity @ v, affinity.square().sum((-2, -1))
