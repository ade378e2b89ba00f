"""Configuration of an InfViT, and the sizes named in the paper."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

Variant = Literal["linear_infsa", "pure_infsa", "softmax"]
MAX_TERMS = 1000
"""Maximum number of terms of the Neumann series; each is a pass over all pairs of tokens, unrolled in a graph."""
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True)
class InfViTConfig:
    """Everything that decides an InfViT's computation, apart from its weights.

    Attributes:
        variant: attention of every layer. `softmax` is the ordinary ViT, kept as the twin to compare with.
        image_size: side of the square images it was trained on, in pixels; a multiple of `patch_size`.
        patch_size: side of a patch, in pixels.
        depth: number of layers.
        embed_dim: E, width of a token.
        num_heads: h, attention heads; divides `embed_dim`.
        mlp_dim: width of the hidden layer of each MLP.
        num_classes: width of the logits.
        norm_eps: epsilon of every LayerNorm.
        attention_dense: a second E→E layer follows each attention's output projection
            (the `transformers4_wrapped` layout).
        pooler: an E→E layer with tanh stands before the head.
        qkv_bias: query, key and value projections have a bias.
        rho_per_head: ρ is one learned scalar per head rather than one per layer.
        neumann_terms: T, terms of the Neumann series in `pure_infsa`; the reference package computes 1.

    Raises:
        ValueError: fields that contradict each other.
    """

    variant: Variant
    image_size: int
    patch_size: int
    depth: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    num_classes: int
    norm_eps: float
    attention_dense: bool = False
    pooler: bool = False
    qkv_bias: bool = True
    rho_per_head: bool = False
    neumann_terms: int = 1

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}, expected one of {', '.join(VARIANTS)}")
        positive = (
            "image_size", "patch_size", "depth", "embed_dim", "num_heads", "mlp_dim", "num_classes", "neumann_terms"
        )  # fmt: skip
        for field in positive:
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected at least 1")
        if self.neumann_terms > MAX_TERMS:
            raise ValueError(f"neumann_terms is {self.neumann_terms}, expected at most {MAX_TERMS}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps is {self.norm_eps}, expected more than 0")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads} does not divide embed_dim = {self.embed_dim}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size = {self.patch_size} does not divide image_size = {self.image_size}")

    @property
    def head_dim(self) -> int:
        """d, width of one head."""
        return self.embed_dim // self.num_heads

    @property
    def grid_size(self) -> int:
        """Patches along a side of a trained image."""
        return self.image_size // self.patch_size

    def tokens(self, height: int, width: int) -> int:
        """Return N, the tokens of an image: its patches and the class token.

        Args:
            height, width: of the image in pixels; multiples of `patch_size`.
        """
        return height * width // self.patch_size**2 + 1

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InfViTConfig:
        return cls(**values)


def _paper_size(variant: Variant, depth: int) -> InfViTConfig:
    # The published parameter counts hold with Hugging Face's pooler, and for pure with the second dense layer.
    return InfViTConfig(
        variant=variant,
        image_size=224,
        patch_size=16,
        depth=depth,
        embed_dim=1024,
        num_heads=16,
        mlp_dim=4096,
        num_classes=1000,
        norm_eps=1e-12,
        attention_dense=variant == "pure_infsa",
        pooler=True,
    )


SIZES: dict[str, InfViTConfig] = {
    "infvit_linear_4l": _paper_size("linear_infsa", 4),
    "infvit_pure_4l": _paper_size("pure_infsa", 4),
    "infvit_pure_24l": _paper_size("pure_infsa", 24),
}
"""The sizes of arXiv 2603.00175, at ImageNet's 1000 classes: 53.5M, 57.7M and 330.6M parameters."""
