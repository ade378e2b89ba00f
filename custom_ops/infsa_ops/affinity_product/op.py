"""`infsa::affinity_product`, registered with torch: kernels, shapes, derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from infsa_ops.affinity_product import reference
from infsa_ops.common import at_least_float32, check_qk, no_autocast
from infsa_ops.derivatives import register_derivatives
from infsa_ops.tiled_affinity import TILED, Sweeps
from infsa_ops.triton.affinity_launch import sweeps_for


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_qk(q, k)
    torch._check(v.dim() == 4, lambda: f"v has {v.dim()} dimensions, expected [B, H, M, d_v]")
    torch._check(
        v.shape[:3] == k.shape[:3],
        lambda: f"v has shape {list(v.shape)}, expected [{', '.join(map(str, k.shape[:3]))}, d_v] to match k",
    )


def _sweep(sweeps: Sweeps, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    with no_autocast(q):
        product, squares = sweeps.product_and_squares(q, k, v)
    return product, squares.to(product.dtype)


@torch.library.custom_op("infsa::affinity_product", mutates_args=())
def affinity_product(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute relu(q̂k̂ᵀ)v and ‖relu(q̂k̂ᵀ)‖²_F, one tile at a time (ONNX `infsa::AffinityProduct`).

    This is a block of Pure InfSA before normalisation. Products add over disjoint sets of keys, squares over disjoint
    sets of queries or keys. A pass over chunks of both therefore gives the result of `neumann_kernel`. q̂ and k̂ are
    scaled by 1/√d. Derivatives form the whole N×M matrix.

    Args:
        q: `[B, H, N, d]`, floating.
        k: `[B, H, M, d]`, dtype of `q`.
        v: `[B, H, M, d_v]`, floating.

    Returns:
        The product `[B, H, N, d_v]` and the squared norm `[B, H]`, float64 for float64 tokens, else float32.

    Raises:
        RuntimeError: shapes or dtypes that don't fit together.
    """
    _check(q, k, v)
    return _sweep(TILED, q, k, v)


@affinity_product.register_kernel("cuda")
def _on_gpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    _check(q, k, v)
    return _sweep(sweeps_for(q, k, v), q, k, v)


@affinity_product.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    _check(q, k, v)
    dtype = at_least_float32(q.dtype)
    return v.new_empty(*q.shape[:3], v.shape[-1], dtype=dtype), q.new_empty(q.shape[:2], dtype=dtype)


def _definition(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype = at_least_float32(q.dtype)
    with no_autocast(q):
        return reference.affinity_product(q.to(dtype), k.to(dtype), v.to(dtype))


register_derivatives(affinity_product, _definition)
