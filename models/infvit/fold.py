"""Exact rewrites for inference: the same function of the pixels, with less to compute.

In Linear-InfSA the output is one vector per head, so the projections around it commute with the sums over tokens:

1. Keys are never formed: q̄·k̂ₙ = (W_kᵀq̄)·yₙ + q̄·b_k, one E-vector per head against the tokens yₙ.
2. Values are never formed: Σ aₙ(W_v yₙ + b_v) = W_v Σ aₙyₙ + b_v Σ aₙ.
3. The output projection meets one vector, not N.

4. The head reads the class token alone, so everything behind the last layer's sums is computed for it alone.

Per token, a linear layer's 12 E² multiply-adds become 9 E², and the last layer's 1 E². ε stays where it was, and so
do the learned weights: `fold` copies none.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

import infsa_ops
from infsa_ops import EPSILON
from infvit.network import Attention, InfViT, Layer

Module = TypeVar("Module", bound=nn.Module)


class FoldedLinearAttention(nn.Module):
    """Linear-InfSA of tokens `[B, N, E]` by rewrites 1 to 3: what all tokens receive, `[B, 1, E]`."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, tokens: Tensor) -> Tensor:
        attention = self.attention
        heads = attention.num_heads
        scale = 1 / math.sqrt(tokens.shape[-1] // heads)
        queries = attention.q_proj(tokens).unflatten(-1, (heads, -1)).transpose(1, 2) * scale
        batch, _, _, head_dim = queries.shape
        mass, moment = infsa_ops.linear_state_update(
            torch.linalg.vector_norm(queries, dim=-1),
            queries,
            queries.new_zeros(batch, heads),
            queries.new_zeros(batch, heads, head_dim),
        )
        mean_query = moment / (mass[..., None] + EPSILON) * scale
        # one key direction per head, [B, H, E], instead of N keys
        key = (mean_query[..., None, :] @ attention.k_proj.weight.unflatten(0, (heads, -1)))[..., 0, :]
        score = key @ tokens.transpose(1, 2)
        if attention.k_proj.bias is not None:
            score = score + (mean_query * attention.k_proj.bias.unflatten(0, (heads, -1))).sum(-1, keepdim=True)
        mass, moment = infsa_ops.linear_state_update(
            torch.relu(score),
            tokens[:, None],
            tokens.new_zeros(batch, heads),
            tokens.new_zeros(batch, heads, tokens.shape[-1]),
        )
        value = (attention.v_proj.weight.unflatten(0, (heads, -1)) @ moment[..., None])[..., 0]
        if attention.v_proj.bias is not None:
            value = value + attention.v_proj.bias.unflatten(0, (heads, -1)) * mass[..., None]
        mixed = attention.rho.reshape(-1, 1) * value / (mass[..., None] + EPSILON)
        return attention.project_out(mixed.flatten(1)[:, None])


class ClassTokenLayer(nn.Module):
    """The last layer for the class token alone (rewrite 4): tokens `[B, N, E]` to `[B, 1, E]`."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor) -> Tensor:
        layer = self.layer
        token = tokens[:, :1] + layer.attn(layer.norm1(tokens))[:, :1]
        return token + layer.ff(layer.norm2(token))


def _with(module: Module, **children: nn.Module) -> Module:
    """The module with other children: a shallow copy, weights shared, the original as it was."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


def fold(network: InfViT) -> InfViT:
    """A network that computes the same logits and features with the rewrites of this module.

    The weights are shared with `network`, which stays as it was. Attention that is not linear keeps its form; the
    class-token cut serves every variant, since the head of an InfViT reads the class token.
    """
    layers: list[nn.Module] = []
    for layer in network.encoder.layers:
        assert isinstance(layer, Layer)
        linear = layer.attn.variant == "linear_infsa"
        layers.append(_with(layer, attn=FoldedLinearAttention(layer.attn)) if linear else layer)
    last = layers[-1]
    assert isinstance(last, Layer)
    layers[-1] = ClassTokenLayer(last)
    return _with(network, encoder=_with(network.encoder, layers=nn.ModuleList(layers)))
