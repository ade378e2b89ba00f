"""Pure InfSA with the whole N×N matrix, in the precision of the arguments. In float64 it is the reference result."""

from __future__ import annotations

import torch
from torch import Tensor

from infsa_ops.common import EPSILON, per_head


def neumann_scores(q: Tensor, k: Tensor, rho: Tensor | float) -> Tensor:
    """Return ρÂ with A = relu(q̂ k̂ᵀ) and Â = A / (‖A‖_F + ε): `[B, H, N, N]` for q and k `[B, H, N, d]`."""
    affinity = torch.relu(q @ k.transpose(-1, -2) / q.shape[-1])
    # rows, then columns: in float32 one sum over all of N² is off by 2e-4 at N = 4097, and so are the derivatives
    norm = torch.linalg.vector_norm(affinity, dim=-1, keepdim=True)
    norm = torch.linalg.vector_norm(norm, dim=-2, keepdim=True)
    return per_head(rho, q) * affinity / (norm + EPSILON)


def neumann_kernel(q: Tensor, k: Tensor, v: Tensor, rho: Tensor | float, terms: int = 1) -> Tensor:
    """Return Σ_{t=1..T} (ρÂ)ᵗ V, `[B, H, N, d_v]` for v `[B, H, N, d_v]`."""
    scores = neumann_scores(q, k, rho)
    term = scores @ v
    total = term
    for _ in range(terms - 1):
        term = scores @ term
        total = total + term
    return total


def neumann_limit(q: Tensor, k: Tensor, v: Tensor, rho: Tensor | float) -> Tensor:
    """Return the limit of the series, ((I − ρÂ)⁻¹ − I) V, by a dense solve in float64.

    This is Katz centrality's kernel; the fundamental matrix of an absorbing Markov chain, less the identity.
    """
    scores = neumann_scores(q.double(), k.double(), rho)
    identity = torch.eye(scores.shape[-1], dtype=scores.dtype, device=scores.device)
    # ((I − S)⁻¹ − I) V = (I − S)⁻¹ S V, which doesn't cancel where S is small
    return torch.linalg.solve(identity - scores, scores @ v.double())
