"""`infsa::neumann_kernel`, registered with torch: kernels, shapes, derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from infsa_ops.common import EPSILON, at_least_float32, check_qkv, no_autocast, per_head
from infsa_ops.derivatives import register_derivatives
from infsa_ops.neumann_kernel import reference
from infsa_ops.tiled_affinity import TILED, Sweeps
from infsa_ops.triton.affinity_launch import sweeps_for


def _check(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, terms: int) -> None:
    check_qkv(q, k, v)
    torch._check(terms >= 1, lambda: f"terms is {terms}, expected at least 1")
    per_head(rho, q)


def _series(sweeps: Sweeps, q: Tensor, k: Tensor, v: Tensor, rho: Tensor, terms: int) -> Tensor:
    with no_autocast(q):
        product, squares = sweeps.product_and_squares(q, k, v)
        scale = per_head(rho, product) / (squares.sqrt().to(product.dtype)[..., None, None] + EPSILON)
        term = product.mul_(scale)
        total = term
        for _ in range(terms - 1):
            term = sweeps.product(q, k, term).mul_(scale)
            total = total + term
    return torch.empty_like(v).copy_(total)


@torch.library.custom_op("infsa::neumann_kernel", mutates_args=())
def _neumann_kernel(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, terms: int) -> Tensor:
    _check(q, k, v, rho, terms)
    return _series(TILED, q, k, v, rho, terms)


@_neumann_kernel.register_kernel("cuda")
def _on_gpu(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, terms: int) -> Tensor:
    _check(q, k, v, rho, terms)
    return _series(sweeps_for(q, k, v), q, k, v, rho, terms)


@_neumann_kernel.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, terms: int) -> Tensor:
    _check(q, k, v, rho, terms)
    return torch.empty_like(v)


def _definition(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, terms: int) -> Tensor:
    """Compute the series with the whole N×N matrix; the derivatives' memory is quadratic in N."""
    dtype = at_least_float32(q.dtype)
    with no_autocast(q):
        return reference.neumann_kernel(q.to(dtype), k.to(dtype), v.to(dtype), rho, terms).to(v.dtype)


register_derivatives(_neumann_kernel, _definition)


def neumann_kernel(q: Tensor, k: Tensor, v: Tensor, rho: Tensor | float, terms: int = 1) -> Tensor:
    """Compute Σ_{t=1..T} (ρÂ)ᵗ V with Â = relu(q̂k̂ᵀ) / (‖relu(q̂k̂ᵀ)‖_F + ε) (ONNX `infsa::NeumannKernel`).

    This is the Neumann series of Pure InfSA (arXiv 2603.00175), one tile at a time. Memory is linear in N, time is
    T·N². q̂ and k̂ are scaled by 1/√d.

    Args:
        q, k: `[B, H, N, d]`, floating.
        v: `[B, H, N, d_v]`, dtype of `q`. With the identity, d_v = N, one term is the scores ρÂ.
        rho: discount in (0, 1), a scalar or `[H]`.
        terms: T, at least 1; the reference package computes 1.

    Returns:
        `[B, H, N, d_v]`, dtype of `v`.

    Raises:
        ValueError: ρ of another shape.
        RuntimeError: shapes that don't fit together, or `terms` below 1.
    """
    rho = torch.as_tensor(rho, dtype=at_least_float32(q.dtype), device=q.device)
    out: Tensor = _neumann_kernel(q, k, v, rho, terms)
    return out
