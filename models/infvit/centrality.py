"""Centrality of tokens: the scores of Linear-InfSA, the Katz series, the principal eigenvectors.

Per head, with A = relu(q̂k̂ᵀ), Â = A/(‖A‖_F + ε) and S = ρÂ (arXiv 2603.00175):

    scores      aₙ / (Σ a + ε), what Linear-InfSA weighs the values with
    Katz        cᵀ = 1ᵀ Σ_{t=1..T} Sᵗ; its limit is 1ᵀ((I − S)⁻¹ − I)
    principal   pᵀA = λpᵀ (left) or Aw = λw (right), λ the spectral radius

Columns are tokens as they are attended to, rows as they attend: Aᵀ = relu(k̂q̂ᵀ), so the left of anything is its right
with q and k exchanged. Memory is linear in N, and time is N² for every term and step: N×N never exists.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import infsa_ops
from infsa_ops.linear_state import reference
from infsa_ops.neumann_kernel.bounds import a_posteriori_bound

MAX_TERMS = 100_000
"""Maximum number of terms of a series that is summed to its limit."""
Side = Literal["left", "right"]

SHIFT = 0.1
"""c of the iteration by A + c‖Ax‖I. At period 2 an error shrinks by (1 − c)/(1 + c) = 0.82 a step; elsewhere a second
eigenvalue of modulus r·λ costs at most (r + c)/(1 + c) instead of r."""


class Principal(NamedTuple):
    """The largest eigenvalue of a non-negative matrix and its eigenvector, as far as the steps went.

    Attributes:
        eigenvalue: λ of A, float64 `[B, H]`; 0 where no walk over the tokens is endless (nilpotent, or all zero).
        vector: non-negative, of unit length, float64 `[B, H, N]`; NaN where λ is 0, which leaves it undefined.
        steps: products with A that it took, `[B, H]`.
        residual: ‖Av − λv‖ / λ, `[B, H]`; 0 where λ is 0, which is found exactly.
    """

    eigenvalue: Tensor
    vector: Tensor
    steps: Tensor
    residual: Tensor


def linear_scores(q: Tensor, k: Tensor) -> Tensor:
    """Return aₙ / (Σ a + ε), aₙ = relu(q̄·k̂ₙ): `[B, H, N]`, dtype of `q`; q and k `[B, H, N, d]`, not yet scaled."""
    return reference.linear_scores(q, k, 1.0)


def _ones(q: Tensor) -> Tensor:
    return q.new_ones(*q.shape[:3], 1)


def row_sums(q: Tensor, k: Tensor, rho: Tensor | float) -> Tensor:
    """Return the row sums of S, `[B, H, N]`. If all are below 1, S is an absorbing Markov chain as it stands."""
    return infsa_ops.neumann_kernel(q, k, _ones(q), rho)[..., 0]


def katz(q: Tensor, k: Tensor, rho: Tensor | float, terms: int = 1) -> Tensor:
    """Katz centrality of the tokens that are attended to, T terms: 1ᵀ Σ_{t=1..T} Sᵗ.

    Args:
        q, k: `[B, H, N, d]`, floating, not yet scaled.
        rho: discount in (0, 1), a scalar or `[H]`.
        terms: T, at least 1.

    Returns:
        `[B, H, N]`, dtype of `q`.

    Raises:
        ValueError: ρ of another shape.
        RuntimeError: shapes that don't fit together, or `terms` below 1.
    """
    return infsa_ops.neumann_kernel(k, q, _ones(q), rho, terms)[..., 0]


def katz_limit(
    q: Tensor, k: Tensor, rho: Tensor | float, side: Side = "left", tolerance: float = 1e-8
) -> tuple[Tensor, int]:
    """Compute the limit of the series: 1ᵀ((I − S)⁻¹ − I) from the left, ((I − S)⁻¹ − I)1 from the right.

    Terms are added until `a_posteriori_bound` is within the tolerance. ‖S‖ ≤ ρ < 1, so this ends.

    Args:
        q, k: `[B, H, N, d]`, not yet scaled; computed in float64.
        rho: discount in (0, 1), a scalar or `[H]`.
        side: `left` ranks the tokens that are attended to, `right` those that attend.
        tolerance: relative, in the Euclidean norm.

    Returns:
        Float64 `[B, H, N]`, and how many terms it took.

    Raises:
        ValueError: ρ is not below 1, or the series needs more than MAX_TERMS.
    """
    if not (torch.as_tensor(rho) < 1).all():
        raise ValueError("a discount of 1: the series has no limit")
    q, k = q.double(), k.double()
    if side == "left":
        q, k = k, q
    term = total = infsa_ops.neumann_kernel(q, k, _ones(q), rho)
    terms = 1
    while (a_posteriori_bound(rho, term) > tolerance * torch.linalg.vector_norm(total, dim=(-2, -1))).any():
        term = infsa_ops.neumann_kernel(q, k, term, rho)
        total = total + term
        terms += 1
        if terms > MAX_TERMS:
            raise ValueError(f"the series has not converged in {MAX_TERMS} terms: a discount near 1")
    return total[..., 0], terms


def principal(q: Tensor, k: Tensor, side: Side = "left", tolerance: float = 1e-10, max_steps: int = 1000) -> Principal:
    """The principal eigenvector of relu(q̂k̂ᵀ), head by head, by power iteration in float64 from equal entries.

    Three things keep plain iteration from it, and each has a remedy that is exact:

    1. Other eigenvalues of the same modulus (a periodic matrix; with period 2, −λ): the iteration is by A + cI, which
       has A's eigenvectors and, with c > 0, λ + c larger in modulus than all others.
    2. Tokens from which every walk ends after a few steps: their entry is 0, and they are taken out.
    3. No token is left: A is nilpotent, λ = 0.

    Where λ is a multiple eigenvalue (tokens that fall apart into equal groups), the vector is one of several.

    Args:
        q, k: `[B, H, N, d]`, not yet scaled.
        side: `left` of tokens that are attended to, `right` of those that attend.
        tolerance: of the residual.
        max_steps: upper limit of the steps; the residual tells how far the iteration came.
    """
    shape = q.shape[:2]
    q, k = q.double().flatten(0, 1), k.double().flatten(0, 1)
    if side == "left":
        q, k = k, q
    heads = [_principal(q[None, i : i + 1], k[None, i : i + 1], tolerance, max_steps) for i in range(len(q))]
    columns = (torch.stack([torch.as_tensor(value) for value in column]) for column in zip(*heads, strict=True))
    return Principal(*(column.unflatten(0, shape) for column in columns))


def _principal(q: Tensor, k: Tensor, tolerance: float, max_steps: int) -> tuple[Tensor, Tensor, int, Tensor]:
    """Run `principal` for one head, `[1, 1, N, d]`, so that the affinities of a step fit in the cache."""
    vector = _ones(q) / math.sqrt(q.shape[2])
    walks = _ones(q)  # 1 if a walk of as many steps as made so far begins here
    zero = q.new_zeros(())
    eigenvalue, residual = zero, zero + math.inf
    for step in range(1, max_steps + 1):
        product, _ = infsa_ops.affinity_product(q, k, torch.cat([vector, walks], dim=-1))
        image, longer = product[..., :1], (product[..., 1:] > 0).to(vector.dtype)
        if not longer.any():
            return zero, torch.full_like(vector, math.nan).flatten(), step, zero
        eigenvalue = (vector * image).sum()
        residual = torch.linalg.vector_norm(image - eigenvalue * vector) / eigenvalue
        if residual <= tolerance and torch.equal(longer, walks):
            break
        if step < max_steps:
            walks = longer
            vector = (image + SHIFT * torch.linalg.vector_norm(image) * vector) * walks
            vector = vector / torch.linalg.vector_norm(vector)
    return eigenvalue, vector.flatten(), step, residual
