"""Cost of a model's matrix products: the least time it can take on a machine whose products are measured."""

from __future__ import annotations

from dataclasses import dataclass

from infvit.config import InfViTConfig


@dataclass(frozen=True)
class MatmulCost:
    """Multiply-adds of the matrix products in the encoder, for one image.

    Left out is what an image costs once, whatever its size, and the patch embedding.

    Attributes:
        dense: of tokens with weights.
        attention: of tokens with tokens, by 16 bits in fp16 and bf16, else by float32.
    """

    dense: int
    attention: int

    def seconds(self, dense_rate: float, attention_rate: float) -> float:
        """The time it takes at two rates, in multiply-adds per second."""
        return self.dense / dense_rate + self.attention / attention_rate


def matmul_cost(config: InfViTConfig, folded: bool, tokens: int) -> MatmulCost:
    """The work for an image of so many tokens.

    Args:
        config: the fields of `infvit.InfViTConfig`, as a manifest records them.
        folded: with the exact rewrites of `infvit.fold`.
        tokens: N, one for every patch and the class token.
    """
    first, last = _folded(config, tokens) if folded else _plain(config, tokens)
    layers = config.depth - 1
    return MatmulCost(
        tokens * (layers * first.dense + last.dense), tokens * (layers * first.attention + last.attention)
    )


def embedding_cost(config: InfViTConfig, tokens: int) -> int:
    """Multiply-adds of the patch embedding, for an image of so many tokens, the class token among them."""
    return (tokens - 1) * 3 * config.patch_size**2 * config.embed_dim


def _plain(config: InfViTConfig, tokens: int) -> tuple[MatmulCost, MatmulCost]:
    """Return the cost of one token in a layer before the last, and in the last."""
    width = config.embed_dim
    # queries, keys, values, the output projection, perhaps a second one; the MLP
    dense = (5 if config.attention_dense else 4) * width**2 + 2 * width * config.mlp_dim
    layer = MatmulCost(dense, _terms(config) * 2 * tokens * width)
    return layer, layer


def _folded(config: InfViTConfig, tokens: int) -> tuple[MatmulCost, MatmulCost]:
    """Return the cost of one token in a layer before the last, and in the last, passed by the class token alone."""
    width = config.embed_dim
    mlp = 2 * width * config.mlp_dim
    if config.variant == "linear_infsa":  # queries alone meet every token
        return MatmulCost(width**2 + mlp, 0), MatmulCost(width**2, 0)
    attention = _terms(config) * 2 * tokens * width
    first = MatmulCost(4 * width**2 + mlp, attention)  # a second output projection is merged with the first
    if config.variant == "pure_infsa" and _terms(config) == 1:
        return first, MatmulCost(2 * width**2, tokens * width)  # queries and keys, for the norm of A
    return first, MatmulCost(3 * width**2, attention)


def _terms(config: InfViTConfig) -> int:
    """Sweeps over all pairs of tokens: each forms A and applies it."""
    if config.variant == "linear_infsa":
        return 0
    terms: int = config.neumann_terms if config.variant == "pure_infsa" else 1
    return terms
