"""Exact rewrites for inference: the same function of the pixels, with less to compute.

In Linear-InfSA the output is one vector per head, so the projections around it commute with the sums over tokens:

1. Keys are never formed: q̄·k̂ₙ = (W_kᵀq̄)·yₙ + q̄·b_k, one E-vector per head against the tokens yₙ.
2. Values are never formed: Σ aₙ(W_v yₙ + b_v) = W_v Σ aₙyₙ + b_v Σ aₙ.
3. The output projection takes one vector, not N.

For every variant:

4. Where the head reads the class token alone, everything behind the last layer's sums is computed for it alone. Of
   one term of Pure InfSA that leaves the class token's own row of A, whose values are again a sum over tokens (2),
   and ‖A‖_F.
5. Two projections in a row, the output projection and a second dense layer, are one.
6. Pixels are normalised by the patch embedding's weights.

Per token, a linear layer's 12 E² multiply-adds become 9 E², and the last layer's 1 E²; a pure layer's 13 E² + 2 N E
become 12 E² + 2 N E, and the last layer's 2 E² + N E. ε stays where it was.

A rewrite fires only where every module it relies on is plain (`infvit.rewrite.is_plain`): of exactly the class in
`infvit.network`, without hooks, parametrizations, replaced methods or tensors of other classes. Anything else stays as
it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import infsa_ops
from infsa_ops import EPSILON
from infvit.network import Attention, Encoder, InfViT, Layer
from infvit.rewrite import is_plain, is_untouched, with_children


class FoldedLinearAttention(nn.Module):
    """Linear-InfSA by rewrites 1 to 3: tokens `[B, N, E]` to the output shared by all tokens, `[B, 1, E]`.

    Its steps are sums over tokens, so each step can run chunk by chunk (`infvit.stages`).
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def energy(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ eₙ `[B, H]` and Σ eₙq̂ₙ `[B, H, d]`."""
        queries = self.attention.q_proj(tokens).unflatten(-1, (self.attention.num_heads, -1)).transpose(1, 2)
        queries = queries * self._scale(tokens)
        return _sums(torch.linalg.vector_norm(queries, dim=-1), queries)

    def scores(self, tokens: Tensor, mass: Tensor, moment: Tensor) -> Tensor:
        """Return aₙ `[B, H, N]`, from the sums of `energy`."""
        heads = self.attention.num_heads
        mean_query = moment / (mass[..., None] + EPSILON) * self._scale(tokens)
        # one key direction per head, [B, H, E], instead of N keys
        key = (mean_query[..., None, :] @ self.attention.k_proj.weight.unflatten(0, (heads, -1)))[..., 0, :]
        score = key @ tokens.transpose(1, 2)
        if self.attention.k_proj.bias is not None:
            bias = self.attention.k_proj.bias.unflatten(0, (heads, -1))
            score = score + (mean_query * bias).sum(-1, keepdim=True)
        return torch.relu(score)

    def gather(self, scores: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ aₙ `[B, H]` and Σ aₙyₙ `[B, H, E]`."""
        return _sums(scores, tokens[:, None])

    def out(self, mass: Tensor, moment: Tensor) -> Tensor:
        """Return the output shared by all tokens, `[B, 1, E]`, from the sums of `gather`."""
        value = _values(self.attention, mass, moment)
        mixed = self.attention.rho.reshape(-1, 1) * value / (mass[..., None] + EPSILON)
        return self.attention.project_out(mixed.flatten(1)[:, None])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(*self.gather(self.scores(tokens, *self.energy(tokens)), tokens))

    def _scale(self, tokens: Tensor) -> float:
        return 1 / math.sqrt(tokens.shape[-1] // self.attention.num_heads)


def _sums(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Σ wₙ `[B, H]` and Σ wₙxₙ `[B, H, d]` of weights `[B, H, N]` and values `[B, G, N, d]`: a state from nothing."""
    batch, heads, _ = weights.shape
    mass, moment = values.new_zeros(batch, heads), values.new_zeros(batch, heads, values.shape[-1])
    return infsa_ops.linear_state_update(weights, values, mass, moment)


def _values(attention: Attention, mass: Tensor, moment: Tensor) -> Tensor:
    """Σ wₙvₙ `[B, H, d]` by rewrite 2, of Σ wₙ `[B, H]` and Σ wₙyₙ `[B, H, E]`."""
    value = (attention.v_proj.weight.unflatten(0, (attention.num_heads, -1)) @ moment[..., None])[..., 0]
    if attention.v_proj.bias is not None:
        value = value + attention.v_proj.bias.unflatten(0, (attention.num_heads, -1)) * mass[..., None]
    return value


class ClassTokenPureAttention(nn.Module):
    """One term of Pure InfSA for the class token alone (rewrite 4): tokens `[B, N, E]` to `[B, 1, E]`."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def row(self, query: Tensor, keys: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Σ aₙ `[B, H]` and Σ aₙyₙ `[B, H, E]` of the row of A of one query `[B, H, 1, d]`; keys `[B, H, N, d]`."""
        query, keys = query.to(tokens.dtype) / query.shape[-1], keys.to(tokens.dtype)  # they may be of lower precision
        return _sums(torch.relu(query @ keys.transpose(-1, -2))[:, :, 0], tokens[:, None])

    def out(self, mass: Tensor, moment: Tensor, squared_norm: Tensor) -> Tensor:
        """Return the class token's output, `[B, 1, E]`, from the sums of `row` and ‖A‖²_F `[B, H]`."""
        value = _values(self.attention, mass, moment)
        mixed = self.attention.rho.reshape(-1, 1) * value / (torch.sqrt(squared_norm)[..., None] + EPSILON)
        return self.attention.project_out(mixed.flatten(1)[:, None])

    def forward(self, tokens: Tensor) -> Tensor:
        q, k = (
            proj(tokens).unflatten(-1, (self.attention.num_heads, -1)).transpose(1, 2)
            for proj in (self.attention.q_proj, self.attention.k_proj)
        )
        squared_norm = infsa_ops.affinity_squared_norm(q, k)
        return self.out(*self.row(q[:, :, :1], k, tokens), squared_norm)


class ClassTokenLayer(nn.Module):
    """The last layer for the class token alone (rewrite 4): tokens `[B, N, E]` to `[B, 1, E]`."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor) -> Tensor:
        layer = self.layer
        token = tokens[:, :1] + layer.attn(layer.norm1(tokens))[:, :1]
        return token + layer.ff(layer.norm2(token))


class PixelPatchEmbed(nn.Module):
    """The patch embedding of pixels as they are (rewrite 6): `[B, H, W, 3]`, 0 to 255, to `[B, E, h, w]`.

    Attributes:
        proj: of patches `[…, 3p²]` of pixels less `center`, a whole number.

    Args:
        embed: of normalised pixels `[B, 3, H, W]`.
        mean, std: of the pixels in [0, 1], per channel.
    """

    def __init__(self, embed: nn.Conv2d, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.patch = embed.kernel_size[0]
        weight = embed.weight.detach().double()
        mean_, std_ = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        bias = torch.zeros(len(weight)).double() if embed.bias is None else embed.bias.detach().double()
        # a whole number near the mean, so that the products of an even patch need not cancel against the bias
        self.center = round(255 * float(mean_.mean()))
        bias = bias + (weight * (self.center / 255 - mean_) / std_).sum((1, 2, 3))
        # rows of a patch, columns, channels: the order in which its pixels lie in an image
        flat = (weight / (255 * std_)).permute(0, 2, 3, 1).flatten(1)
        self.proj = _linear(flat, bias, embed.weight.dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        p = self.patch
        patches = pixels.unflatten(2, (-1, p)).unflatten(1, (-1, p)).transpose(2, 3).flatten(3)
        return self.proj(patches - self.center).permute(0, 3, 1, 2)


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.to(dtype))
    if bias is not None:
        made.bias = nn.Parameter(bias.to(dtype))
    return made


def is_plain_attention(attention: nn.Module | None) -> bool:
    """Return whether an attention and all its projections are plain."""
    if type(attention) is not Attention or not is_untouched(attention):
        return False
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    dense = attention.dense is None or is_plain(attention.dense, nn.Linear)
    return dense and all(is_plain(projection, nn.Linear) for projection in projections)


def is_plain_norm(norm: nn.Module | None) -> bool:
    """Return whether a norm is a plain LayerNorm of each token by itself."""
    return isinstance(norm, nn.LayerNorm) and is_plain(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1


def is_plain_mlp(mlp: nn.Module | None) -> bool:
    """Return whether an MLP, and all it is made of, is plain."""
    if not isinstance(mlp, nn.Sequential) or not is_plain(mlp, nn.Sequential):
        return False
    return all(any(is_plain(part, kind) for kind in (nn.Linear, nn.GELU, nn.Dropout)) for part in mlp)


def _merge_projections(attention: Attention) -> Attention:
    """Apply rewrite 5, with the product formed in float64. Layers whose product overflows the dtype stay two."""
    out, dense = attention.out_proj, attention.dense
    if dense is None:
        return attention
    first, second = out.weight.detach().double(), dense.weight.detach().double()
    bias = None if dense.bias is None else dense.bias.detach().double()
    if out.bias is not None:
        moved = second @ out.bias.detach().double()
        bias = moved if bias is None else moved + bias
    merged = _linear(second @ first, bias, out.weight.dtype)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in merged.parameters()):
        return attention
    return with_children(attention, out_proj=merged, dense=None)


def _fold_layer(layer: nn.Module) -> nn.Module:
    attention = getattr(layer, "attn", None)
    if not is_plain(layer, Layer) or not is_plain_attention(attention):
        return layer
    assert isinstance(attention, Attention)
    if attention.variant == "linear_infsa":
        return with_children(layer, attn=FoldedLinearAttention(attention))
    return with_children(layer, attn=_merge_projections(attention))


def _cut(layer: nn.Module) -> nn.Module:
    if type(layer) is not Layer or not all(map(is_untouched, layer.modules())):
        return layer
    if not is_plain_norm(layer.norm2) or not is_plain_mlp(layer.ff):
        return layer  # it may mix tokens
    attention = layer.attn
    if is_plain_attention(attention) and attention.variant == "pure_infsa" and attention.neumann_terms == 1:
        layer = with_children(layer, attn=ClassTokenPureAttention(attention))
    return ClassTokenLayer(layer)


def fold(network: InfViT) -> InfViT:
    """Return a network that computes the same logits and features with rewrites 1 to 5.

    `network` stays as it was, and the weights are shared but for those of rewrite 5. The class-token cut needs an
    `InfViT` and an `Encoder` as they are: a subclass may read other tokens.
    """
    encoder = network.encoder
    if not is_plain(encoder, Encoder) or not is_plain(encoder.layers, nn.ModuleList):
        return network
    layers = [_fold_layer(layer) for layer in encoder.layers]
    if is_plain(network, InfViT) and is_plain_norm(encoder.norm):
        layers[-1] = _cut(layers[-1])
    return with_children(network, encoder=with_children(encoder, layers=nn.ModuleList(layers)))


def can_fold_normalisation(network: InfViT) -> bool:
    """Return whether the patch embedding is the plain convolution of whole patches that rewrite 6 takes."""
    embed = network.patch_embed
    if not is_plain(network, InfViT) or not is_plain(embed, nn.Conv2d):
        return False
    patches = len(set(embed.kernel_size)) == 1 and embed.stride == embed.kernel_size and embed.in_channels == 3
    return patches and (embed.padding, embed.dilation, embed.groups) == ((0, 0), (1, 1), 1)


def fold_normalisation(network: InfViT, mean: Sequence[float], std: Sequence[float]) -> InfViT:
    """Return a network that takes unnormalised pixels, `[B, H, W, 3]` from 0 to 255, by rewrite 6.

    Args:
        network: takes normalised pixels `[B, 3, H, W]`; stays as it was.
        mean, std: of the pixels in [0, 1], per channel.

    Raises:
        ValueError: `can_fold_normalisation` returns false for the network.
    """
    if not can_fold_normalisation(network):
        raise ValueError("patch_embed is not the plain convolution of InfViT: its normalisation cannot be folded")
    return with_children(network, patch_embed=PixelPatchEmbed(network.patch_embed, mean, std))
