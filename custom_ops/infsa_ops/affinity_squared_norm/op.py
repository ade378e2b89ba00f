"""`infsa::affinity_squared_norm`, registered with torch: kernel and shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from infsa_ops.common import TILE, check_qk


@torch.library.custom_op("infsa::affinity_squared_norm", mutates_args=())
def affinity_squared_norm(q: Tensor, k: Tensor) -> Tensor:
    """‖relu(q̂k̂ᵀ)‖²_F, a tile of queries at a time (ONNX `infsa::AffinitySquaredNorm`).

    What `neumann_kernel` divides by, for whoever needs no more of it: a class-token head's last layer, or a sweep
    over chunks. Squares add over disjoint sets of queries or keys. q̂ and k̂ are scaled by 1/√d. No gradient.

    Args:
        q: `[B, H, N, d]`, floating.
        k: `[B, H, M, d]`, dtype of `q`.

    Returns:
        `[B, H]`, float64 for float64 tokens, else float32.

    Raises:
        RuntimeError: shapes or dtypes that don't fit together.
    """
    check_qk(q, k)
    dtype = torch.promote_types(q.dtype, torch.float32)  # in half precision squares above 255² overflow
    queries, keys = q.to(dtype), (k.to(dtype) / q.shape[-1]).transpose(-1, -2)
    total = q.new_zeros(q.shape[:2], dtype=torch.float64)
    for start in range(0, q.shape[2], TILE):
        affinity = torch.relu(queries[:, :, start : start + TILE] @ keys)
        # row by row, then over rows: one float32 sum over all N² squares is off by 1e-4 at N = 4097
        total += affinity.square().sum(-1).sum(-1, dtype=torch.float64)
    return total.to(dtype)


@affinity_squared_norm.register_fake
def _(q: Tensor, k: Tensor) -> Tensor:
    check_qk(q, k)
    return q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
