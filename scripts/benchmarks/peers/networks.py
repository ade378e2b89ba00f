"""The networks of the families, and the peers': the paper's formulas in plain torch."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from infvit.config import SIZES, InfViTConfig
from infvit.network import Attention, InfViT

EPSILON = 1e-6
CONFIGS: dict[str, InfViTConfig] = {
    "linear": SIZES["infvit_linear_4l"],
    "pure": SIZES["infvit_pure_4l"],
    "softmax": dataclasses.replace(SIZES["infvit_linear_4l"], variant="softmax"),
}


def linear_attention(q: Tensor, k: Tensor, v: Tensor, rho: Tensor) -> Tensor:
    """Linear-InfSA as the paper has it, every token on its own: `[B, H, N, d]` each; ρ a scalar or `[H]`."""
    q, k = q / math.sqrt(q.shape[-1]), k / math.sqrt(q.shape[-1])
    energy = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    mean_query = (energy * q).sum(-2, keepdim=True) / (energy.sum(-2, keepdim=True) + EPSILON)
    score = torch.relu(k @ mean_query.transpose(-1, -2))
    score = rho.reshape(-1, 1, 1) * score / (score.sum(-2, keepdim=True) + EPSILON)
    return (score * v).sum(-2, keepdim=True).expand_as(v)


def pure_attention(q: Tensor, k: Tensor, v: Tensor, rho: Tensor) -> Tensor:
    """One term of Pure InfSA as the paper has it, with the whole matrix: `[B, H, N, d]` each; ρ a scalar or `[H]`."""
    q, k = q / math.sqrt(q.shape[-1]), k / math.sqrt(q.shape[-1])
    affinity = torch.relu(q @ k.transpose(-1, -2))
    affinity = affinity / (torch.linalg.vector_norm(affinity, dim=(-2, -1), keepdim=True) + EPSILON)
    return (rho.reshape(-1, 1, 1) * affinity) @ v


class ReferenceAttention(nn.Module):
    """An attention of `infvit` that computes the paper's formula in plain torch."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, tokens: Tensor) -> Tensor:
        mix = {"linear_infsa": linear_attention, "pure_infsa": pure_attention}[self.attention.variant]
        mixed = mix(*self.attention.project(tokens), self.attention.rho)
        return self.attention.project_out(mixed.transpose(1, 2).flatten(2))


def network_of(family: str) -> InfViT:
    """The family's network as trained, its random weights the same every time."""
    torch.manual_seed(0)
    return InfViT(CONFIGS[family]).eval()


def peer_of(family: str) -> InfViT:
    """The family's network without infsa_ops."""
    network = network_of(family)
    if family != "softmax":  # whose attention is torch's own already
        for layer in network.encoder.layers:
            layer.attn = ReferenceAttention(layer.attn)
    return network
