"""`infsa::affinity_squared_norm`, registered with torch: kernels, shapes, derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from infsa_ops.affinity_squared_norm import reference
from infsa_ops.common import at_least_float32, check_qk, no_autocast
from infsa_ops.derivatives import register_derivatives
from infsa_ops.tiled_affinity import TILED, Sweeps
from infsa_ops.triton.affinity_launch import sweeps_for


def _sweep(sweeps: Sweeps, q: Tensor, k: Tensor) -> Tensor:
    with no_autocast(q):
        return sweeps.squares(q, k).to(at_least_float32(q.dtype))


@torch.library.custom_op("infsa::affinity_squared_norm", mutates_args=())
def affinity_squared_norm(q: Tensor, k: Tensor) -> Tensor:
    """Compute ‖relu(q̂k̂ᵀ)‖²_F, one tile at a time (ONNX `infsa::AffinitySquaredNorm`).

    This is the squared divisor of `neumann_kernel`, apart from ε, for callers that need only that: a class-token
    head's last layer, or a pass over chunks. Squares add over disjoint sets of queries or keys. q̂ and k̂ are scaled by
    1/√d. Derivatives form the whole N×M matrix.

    Args:
        q: `[B, H, N, d]`, floating.
        k: `[B, H, M, d]`, dtype of `q`.

    Returns:
        `[B, H]`, float64 for float64 tokens, else float32.

    Raises:
        RuntimeError: shapes or dtypes that don't fit together.
    """
    check_qk(q, k)
    return _sweep(TILED, q, k)


@affinity_squared_norm.register_kernel("cuda")
def _on_gpu(q: Tensor, k: Tensor) -> Tensor:
    check_qk(q, k)
    return _sweep(sweeps_for(q, k), q, k)


@affinity_squared_norm.register_fake
def _(q: Tensor, k: Tensor) -> Tensor:
    check_qk(q, k)
    return q.new_empty(q.shape[:2], dtype=at_least_float32(q.dtype))


def _definition(q: Tensor, k: Tensor) -> Tensor:
    dtype = at_least_float32(q.dtype)
    with no_autocast(q):
        return reference.affinity_squared_norm(q.to(dtype), k.to(dtype))


register_derivatives(affinity_squared_norm, _definition)
