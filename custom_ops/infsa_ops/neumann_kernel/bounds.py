"""Bounds on the distance of T terms from the limit of the series.

‖Â‖₂ ≤ ‖Â‖_F ≤ 1, so the remainder of the series after T terms is at most Σ_{t>T} ρᵗ⁻ᵀ‖S_T‖ = ρ/(1−ρ)·‖S_T‖, with
S_T = (ρÂ)ᵀV the last term.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infsa_ops.neumann_kernel.op import neumann_kernel


def a_priori_bound(rho: float, terms: int) -> float:
    """Return ρ^(T+1) / (1−ρ), a bound on the remainder relative to ‖V‖_F, for any tokens, with ρ in (0, 1)."""
    return float(rho ** (terms + 1) / (1 - rho))


def a_posteriori_bound(rho: Tensor | float, last_term: Tensor) -> Tensor:
    """Return ρ/(1−ρ) · ‖S_T‖_F `[B, H]`, a bound on the remainder's Frobenius norm; the last term is `[B, H, N, d]`."""
    rho = torch.as_tensor(rho, dtype=last_term.dtype, device=last_term.device)
    return rho / (1 - rho) * torch.linalg.vector_norm(last_term, dim=(-2, -1))


def series_term(q: Tensor, k: Tensor, v: Tensor, rho: Tensor | float, terms: int) -> Tensor:
    """Return S_T = (ρÂ)ᵀV in float64, `[B, H, N, d_v]`, by T single steps: subtracting two series would cancel."""
    term = v.double()
    for _ in range(terms):
        term = neumann_kernel(q.double(), k.double(), term, rho)
    return term


def terms_for(rho: float, tolerance: float) -> int:
    """Return the smallest T whose a-priori bound is at most `tolerance`.

    Raises:
        ValueError: ρ or the tolerance is not in (0, 1), or not positive.
    """
    if not 0 < rho < 1 or not 0 < tolerance < math.inf:
        raise ValueError(f"rho = {rho}, tolerance = {tolerance}: expected 0 < rho < 1 and a tolerance above 0")
    terms = max(1, math.ceil((math.log(tolerance) + math.log1p(-rho)) / math.log(rho)) - 1)
    # the logarithms are rounded: step to the exact T
    while a_priori_bound(rho, terms) > tolerance:
        terms += 1
    while terms > 1 and a_priori_bound(rho, terms - 1) <= tolerance:
        terms -= 1
    return terms
