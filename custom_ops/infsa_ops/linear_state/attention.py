"""Linear-InfSA attention: two passes over the tokens that share only the state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infsa_ops.common import EPSILON, at_least_float32, check_qkv, no_autocast, per_head
from infsa_ops.linear_state.op import linear_state_update


def _state(values: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, _, width = values.shape
    return values.new_zeros((batch, heads)), values.new_zeros((batch, heads, width))


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    mass, moment = linear_state_update(weights, values, *_state(values))
    return moment / (mass[..., None] + EPSILON)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, rho: Tensor | float) -> Tensor:
    """Compute Linear-InfSA attention (arXiv 2603.00175): every token receives the same ρ-weighted mean of the values.

    Token n weighs aₙ = relu(q̄ · k̂ₙ), where q̄ is the mean query weighted by its norms and q̂, k̂ are scaled by 1/√d.
    Computed and differentiated in at least float32.

    Args:
        q, k: `[B, H, N, d]`, floating.
        v: `[B, H, N, d_v]`, dtype of `q`. With the identity, d_v = N, the rows of the result are the scores.
        rho: discount in (0, 1), a scalar or `[H]`.

    Returns:
        `[B, H, N, d_v]`, dtype of `v`; a broadcast view, equal along N.

    Raises:
        ValueError: ρ of another shape.
        RuntimeError: shapes or dtypes that don't fit together.
    """
    check_qkv(q, k, v)
    scale = 1 / math.sqrt(q.shape[-1])
    queries, keys, values = (x.to(at_least_float32(x.dtype)) for x in (q, k, v))
    queries, keys = queries * scale, keys * scale
    energy = torch.linalg.vector_norm(queries, dim=-1)
    mean_query = _mean(energy, queries)
    with no_autocast(keys):
        score = torch.relu(torch.matmul(keys, mean_query[..., None])[..., 0])
    out = per_head(rho, values) * _mean(score, values)[..., None, :]
    return out.to(v.dtype).expand(v.shape)
