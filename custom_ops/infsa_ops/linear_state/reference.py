"""Linear-InfSA as in the paper, in the precision of the arguments. In float64 it is the reference result."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infsa_ops.common import EPSILON, per_head


def linear_state_update(weights: Tensor, values: Tensor, mass: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return mass + Σ wₙ and moment + Σ wₙ xₙ.

    Args:
        weights: w, `[B, H, N]`.
        values: x, `[B, G, N, d]`; H/G consecutive heads share the values of a group.
        mass: `[B, H]`.
        moment: `[B, H, d]`.

    Returns:
        The new mass and moment, in their own dtype.
    """
    weights, values = weights.to(moment.dtype), values.to(moment.dtype)
    values = values.repeat_interleave(weights.shape[1] // max(values.shape[1], 1), dim=1)
    return mass + weights.sum(-1), moment + (weights[..., None] * values).sum(-2)


def linear_scores(q: Tensor, k: Tensor, rho: Tensor | float) -> Tensor:
    """Return ρ · aₙ / (Σ a + ε), the weight of every token, `[B, H, N]`, for q and k `[B, H, N, d]`."""
    scale = 1 / math.sqrt(q.shape[-1])
    q, k = q * scale, k * scale
    energy = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    mean_query = (energy * q).sum(-2, keepdim=True) / (energy.sum(-2, keepdim=True) + EPSILON)
    score = torch.relu((mean_query * k).sum(-1))
    return per_head(rho, q)[..., 0] * score / (score.sum(-1, keepdim=True) + EPSILON)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, rho: Tensor | float) -> Tensor:
    """Return Σ scoreₙ vₙ, the same for every token: `[B, H, N, d_v]` for v `[B, H, N, d_v]`."""
    out = (linear_scores(q, k, rho)[..., None] * v).sum(-2, keepdim=True)
    return out.expand_as(v)
