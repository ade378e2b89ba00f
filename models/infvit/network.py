"""InfViT as trained: a pre-norm vision transformer with Infinite Self-Attention.

Parameter names are those of the reference package's own example, so its checkpoints load as they are and
every other layout is a renaming (`infvit.checkpoint`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

import infsa_ops
from infvit.config import InfViTConfig
from infvit.positions import interpolate_positions


class Attention(nn.Module):
    """Self-attention over tokens `[B, N, E]`, of the variant the config names."""

    rho_logit: Tensor | None

    def __init__(self, config: InfViTConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.variant = config.variant
        self.num_heads = config.num_heads
        self.neumann_terms = config.neumann_terms
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.out_proj = nn.Linear(width, width)
        self.dense = nn.Linear(width, width) if config.attention_dense else None
        if config.variant == "softmax":
            self.rho_logit = None
        else:
            shape = (config.num_heads,) if config.rho_per_head else ()
            # sigmoid(2.9444) = 0.95, the discount the reference package starts from
            self.rho_logit = nn.Parameter(torch.full(shape, 0.95).logit())

    @property
    def rho(self) -> Tensor:
        """ρ, the learned discount: a scalar or `[heads]`, in (0, 1)."""
        assert self.rho_logit is not None, "a softmax ViT has no discount"
        return torch.sigmoid(self.rho_logit)

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each `[B, heads, N, head_dim]`, for tokens `[B, N, E]`."""
        return (
            self._heads(self.q_proj(tokens)),
            self._heads(self.k_proj(tokens)),
            self._heads(self.v_proj(tokens)),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.project(tokens)
        if self.variant == "linear_infsa":
            mixed = infsa_ops.linear_attention(q, k, v, self.rho)
        elif self.variant == "pure_infsa":
            mixed = infsa_ops.neumann_kernel(q, k, v, self.rho, terms=self.neumann_terms)
        else:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.project_out(mixed.transpose(1, 2).flatten(2))

    def project_out(self, mixed: Tensor) -> Tensor:
        """Heads side by side, `[B, N, E]`, through the output projection and the second dense layer, if any."""
        out: Tensor = self.out_proj(mixed)
        return out if self.dense is None else self.dense(out)


class Layer(nn.Module):
    """Attention and MLP, each behind a LayerNorm and a residual."""

    def __init__(self, config: InfViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        # Dropout holds the reference's index of the second Linear, `ff.3`; it does nothing at inference.
        self.ff = nn.Sequential(
            nn.Linear(config.embed_dim, config.mlp_dim),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(config.mlp_dim, config.embed_dim),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.ff(self.norm2(tokens))


class Encoder(nn.Module):
    """All layers and the final norm, tokens `[B, N, E]` to tokens."""

    def __init__(self, config: InfViTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        out: Tensor = self.norm(tokens)
        return out


class InfViT(nn.Module):
    """A vision transformer whose attention is Infinite Self-Attention (arXiv 2603.00175)."""

    def __init__(self, config: InfViTConfig) -> None:
        super().__init__()
        width, grid = config.embed_dim, config.grid_size
        self.config = config
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid * grid, width).normal_(std=0.02))
        self.encoder = Encoder(config)
        self.pooler = nn.Linear(width, width) if config.pooler else None
        self.head = nn.Linear(width, config.num_classes)

    def embed(self, pixels: Tensor) -> Tensor:
        """Return tokens `[B, 1 + h·w, E]`, class token first, for normalised `pixels` `[B, 3, H, W]`."""
        patches = self.patch_embed(pixels)
        height, width = patches.shape[-2:]
        grid = self.config.grid_size
        trained = self.pos_embed[:, 1:].unflatten(1, (grid, grid))
        positions = interpolate_positions(trained[0], height, width)
        patches = patches.flatten(2).transpose(1, 2) + positions.flatten(0, 1)
        cls_token = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)

    @property
    def attentions(self) -> list[Attention]:
        """The attention of every layer, first to last."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def largest_rho(self) -> float:
        """The largest discount of any layer and head, in float64: where truncating the Neumann series costs most."""
        logits = [a.rho_logit.detach().double().max() for a in self.attentions if a.rho_logit is not None]
        return float(torch.sigmoid(torch.stack(logits).max()))

    def set_neumann_terms(self, terms: int) -> None:
        """Compute T = `terms` terms of the Neumann series in every layer of a `pure_infsa` network."""
        self.config = dataclasses.replace(self.config, neumann_terms=terms)
        for attention in self.attentions:
            attention.neumann_terms = terms

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Return the input of the head, `[B, E]`: the class token after the final norm and the pooler, if any."""
        features: Tensor = self.encoder(self.embed(pixels))[:, 0]
        return features if self.pooler is None else torch.tanh(self.pooler(features))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits `[B, num_classes]` for `pixels` `[B, 3, H, W]`, normalised; H and W multiples of the patch."""
        logits: Tensor = self.head(self.forward_features(pixels))
        return logits
