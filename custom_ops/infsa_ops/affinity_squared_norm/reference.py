"""‖relu(q̂k̂ᵀ)‖²_F with the whole N×M matrix, in the precision of the arguments: the reference in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def affinity_squared_norm(q: Tensor, k: Tensor) -> Tensor:
    """Return Σ relu(q̂k̂ᵀ)² over all pairs of tokens, `[B, H]`, for q `[B, H, N, d]` and k `[B, H, M, d]`."""
    return torch.relu(q @ k.transpose(-1, -2) / q.shape[-1]).square().sum((-2, -1))
