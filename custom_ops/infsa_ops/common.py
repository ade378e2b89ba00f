"""What both operators share: ε and the shape of ρ."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6
"""ε, added to every divisor; the reference package's value."""


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
