"""Stages of a folded network: modules over chunks of its tokens, which share only sums that add.

Adding the outputs of all chunks gives the result of the whole network. A stage is a `StageModule`, known by its name:

    start    Start               embed    Embed                score    Score
    attend   Attend              again    NeumannTerm          apply    Apply
    norm     AffinityNorm        row      ClassTokenRow        head     Head
    columns  ColumnSums          columnsagain  NextColumnSums

The stages of a network with L layers and T terms run in this order:

    linear      start, embed, [score, apply]×(L−1), score, head
    pure        start, embed, [attend, again×(T−1), apply]×(L−1), and norm, row, head (one term)
                                                              or attend, again×(T−1), head

If token centrality is wanted, pure also runs columns (the first term) and columnsagain×(T−1) before each apply, row and
head. The scores of linear are its centrality and need no further stage.

`apply` of one layer also gathers for the next, so tokens are read and written once. In pure, `attend` takes blocks of
queries and keys. With one term the last layer, cut to the class token (`infvit.fold`), needs the norm of A and one row.

Names are those of `infsa_ops`. Per token: `tokens` `[B, n, E]`; `q`, `k`, `v` and `mixed` `[B, n, E]`, with the heads
concatenated; `centrality` `[B, n, H]`. Sums: `mass` `[B, H]`, `moment` `[B, H, ·]`, `squared_norm` `[B, H]`. The first
token only: `query`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

import infsa_ops
from infsa_ops import EPSILON
from infvit.fold import (
    ClassTokenLayer,
    ClassTokenPureAttention,
    FoldedLinearAttention,
    PixelPatchEmbed,
    can_fold_normalisation,
    is_plain_attention,
    is_plain_mlp,
    is_plain_norm,
)
from infvit.network import Attention, InfViT, Layer
from infvit.positions import cubic_weights, resample
from infvit.rewrite import is_plain
from infvit.stage_scope import StageScope


class StageModule(nn.Module):
    """Base class of the stages; `forward` takes `inputs` and returns a tuple of `outputs`.

    Attributes:
        name: name of its file.
        over: tokens it is called for.
        inputs, outputs: names, in order.
        optional: true for a stage that serves only token centrality.
    """

    name = ""
    over = StageScope.TOKENS
    optional = False
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


class Gather(nn.Module):
    """Outputs that a layer computes from a chunk of its tokens before any sum over all tokens is known."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.norm, self.attention = layer.norm1, layer.attn
        self.outputs: tuple[str, ...] = ("q", "k", "v")
        if isinstance(layer.attn, FoldedLinearAttention):
            self.outputs = ("mass", "moment")
        elif isinstance(layer.attn, ClassTokenPureAttention):
            self.outputs = ("q", "k")

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        normed, attention = self.norm(tokens), self.attention
        if isinstance(attention, FoldedLinearAttention):
            return attention.energy(normed)
        attention = attention.attention if isinstance(attention, ClassTokenPureAttention) else attention
        return tuple(getattr(attention, f"{name}_proj")(normed) for name in self.outputs)


def _needs(layer: Layer) -> tuple[str, ...]:
    """Return the names of the inputs of `_apply` besides tokens."""
    if isinstance(layer.attn, FoldedLinearAttention):
        return "mass", "moment"
    return ("mass", "moment", "squared_norm") if isinstance(layer.attn, ClassTokenPureAttention) else _MIXED


_MIXED = ("mixed", "squared_norm")


def _apply(layer: Layer, tokens: Tensor, *needed: Tensor) -> Tensor:
    """Compute a layer's output for a chunk of its tokens."""
    attention = layer.attn
    if isinstance(attention, Attention):
        mixed, squared_norm = needed
        tokens = tokens + attention.project_out(_scaled(mixed, squared_norm, attention.rho, attention.num_heads))
    else:
        tokens = tokens + attention.out(*needed)
    out: Tensor = tokens + layer.ff(layer.norm2(tokens))
    return out


def _scaled(mixed: Tensor, squared_norm: Tensor, rho: Tensor, heads: int) -> Tensor:
    """Return ρ A V / (‖A‖_F + ε) for A V `[B, n, E]` and ‖A‖²_F `[B, H]`."""
    scale = rho.reshape(-1) / (squared_norm.sqrt() + EPSILON)
    return (mixed.unflatten(-1, (heads, -1)) * scale[:, None, :, None]).flatten(2)


class Embed(StageModule):
    """Stage from a strip of the image, in whole patches, to tokens and the outputs of the first layer's `Gather`.

    Args:
        network: folded network.
        layer: its first layer.
        normalise: converts a strip of the image to the input of the network's patch embedding.
    """

    name = "embed"
    over = StageScope.IMAGE
    inputs = ("image", "row", "column", "grid_height", "grid_width")

    def __init__(self, network: InfViT, layer: Layer, normalise: nn.Module) -> None:
        super().__init__()
        self.normalise, self.patch_embed, self.gather = normalise, network.patch_embed, Gather(layer)
        self.pos_embed, self.side = network.pos_embed, network.config.grid_size
        self.outputs = ("tokens", *self.gather.outputs)

    def forward(
        self, image: Tensor, row: Tensor, column: Tensor, grid_height: Tensor, grid_width: Tensor
    ) -> tuple[Tensor, ...]:
        """Embed a strip whose first patch is at (`row`, `column`) of the grid; both are `[1]`, at least float32."""
        patches = self.patch_embed(self.normalise(image))
        height, width = patches.shape[-2:]
        rows, columns = (
            cubic_weights(first + torch.arange(count, dtype=row.dtype, device=row.device), size, self.side)
            for first, count, size in ((row, height, grid_height), (column, width, grid_width))
        )
        here = resample(self.pos_embed[0, 1:].unflatten(0, (self.side, self.side)), rows, columns).to(patches.dtype)
        tokens = patches.flatten(2).transpose(1, 2) + here.flatten(0, 1)
        return tokens, *self.gather(tokens)


class Start(StageModule):
    """The class token, `[1, 1, E]`, and the outputs of the first layer's `Gather` for it."""

    name = "start"
    over = StageScope.ONCE
    inputs = ()

    def __init__(self, network: InfViT, layer: Layer) -> None:
        super().__init__()
        self.cls_token, self.pos_embed, self.gather = network.cls_token, network.pos_embed, Gather(layer)
        self.outputs = ("tokens", *self.gather.outputs)

    def forward(self) -> tuple[Tensor, ...]:
        tokens = self.cls_token + self.pos_embed[:, :1]
        return tokens, *self.gather(tokens)


class Score(StageModule):
    """Scores of Linear-InfSA and their sums, computed from the sums of energies."""

    name = "score"
    inputs = ("tokens", "mass", "moment")
    outputs = ("mass", "moment", "centrality")

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.norm, self.attention = layer.norm1, cast(FoldedLinearAttention, layer.attn)

    def forward(self, tokens: Tensor, mass: Tensor, moment: Tensor) -> tuple[Tensor, ...]:
        normed = self.norm(tokens)
        scores = self.attention.scores(normed, mass, moment)
        return *self.attention.gather(scores, normed), scores.transpose(1, 2)


class Attend(StageModule):
    """A block of queries and keys of Pure InfSA: its share of A V and of ‖A‖²_F."""

    name = "attend"
    over = StageScope.PAIRS
    inputs: tuple[str, ...] = ("q", "k", "v")
    outputs: tuple[str, ...] = _MIXED

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        product, squared_norm = infsa_ops.affinity_product(*map(self._heads, (q, k, v)))
        return product.transpose(1, 2).flatten(2), squared_norm


class NeumannTerm(Attend):
    """`Attend` for one more term of the Neumann series: the values are V plus the scaled previous output."""

    name = "again"
    inputs = ("q", "k", "v", *_MIXED)
    outputs = ("mixed",)

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention)
        self.rho_logit = cast(Tensor, attention.rho_logit)

    def forward(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, mixed: Tensor, squared_norm: Tensor
    ) -> tuple[Tensor, ...]:
        rho = torch.sigmoid(self.rho_logit)
        return super().forward(q, k, v.to(mixed.dtype) + _scaled(mixed, squared_norm, rho, self.num_heads))[:1]


class AffinityNorm(Attend):
    """Share of a block of queries and keys in ‖A‖²_F, for layers that need only the norm of A."""

    name = "norm"
    inputs = ("q", "k")
    outputs = ("squared_norm",)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (infsa_ops.affinity_squared_norm(self._heads(q), self._heads(k)),)


class ColumnSums(Attend):
    """A block of keys and queries: its share of the column sums of Σ_{t=1..T} (ρÂ)ᵗ, Katz centrality.

    This is the same series with queries and keys exchanged, applied to ones. It is computed by Horner's scheme: each
    term adds one to the output of the previous term.
    """

    name = "columns"
    inputs: tuple[str, ...] = ("k", "q", "squared_norm")
    outputs = ("centrality",)
    optional = True

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention)
        self.rho_logit = cast(Tensor, attention.rho_logit)

    def forward(  # type: ignore[override]
        self, k: Tensor, q: Tensor, squared_norm: Tensor, centrality: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        keys, queries = self._heads(k), self._heads(q)
        ones = torch.ones_like(queries[..., :1], dtype=squared_norm.dtype)
        values = ones if centrality is None else ones + centrality.transpose(1, 2)[..., None]
        sums, _ = infsa_ops.affinity_product(keys, queries, values)
        scale = torch.sigmoid(self.rho_logit).reshape(-1) / (squared_norm.sqrt() + EPSILON)
        return ((sums[..., 0] * scale[..., None]).transpose(1, 2),)


class NextColumnSums(ColumnSums):
    """`ColumnSums` for one more term."""

    name = "columnsagain"
    inputs = ("k", "q", "squared_norm", "centrality")


class ClassTokenRow(StageModule):
    """The class token's row of A, and the sums of the tokens it weighs."""

    name = "row"
    inputs = ("tokens", "k", "query")
    outputs = ("mass", "moment")

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.norm, self.attention = layer.norm1, cast(ClassTokenPureAttention, layer.attn)

    def forward(self, tokens: Tensor, k: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        heads = self.attention.attention.num_heads
        query, keys = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, k))
        return self.attention.row(query, keys, self.norm(tokens))


class Apply(StageModule):
    """A layer's output and the outputs of the following layer's `Gather` for it."""

    name = "apply"

    def __init__(self, layer: Layer, following: Layer) -> None:
        super().__init__()
        self.layer, self.gather = layer, Gather(following)
        self.inputs = ("tokens", *_needs(layer))
        self.outputs = ("tokens", *self.gather.outputs)

    def forward(self, tokens: Tensor, *needed: Tensor) -> tuple[Tensor, ...]:
        tokens = _apply(self.layer, tokens, *needed)
        return tokens, *self.gather(tokens)


class Head(StageModule):
    """The class token through the last layer and the head."""

    name = "head"
    over = StageScope.CLASS_TOKEN
    outputs = ("logits", "features")

    def __init__(self, network: InfViT, layer: Layer) -> None:
        super().__init__()
        self.layer, self.norm, self.pooler, self.head = layer, network.encoder.norm, network.pooler, network.head
        self.inputs = ("tokens", *_needs(layer))

    def forward(self, tokens: Tensor, *needed: Tensor) -> tuple[Tensor, ...]:
        features = self.norm(_apply(self.layer, tokens, *needed))[:, 0]
        features = features if self.pooler is None else torch.tanh(self.pooler(features))
        return self.head(features), features


def _check_plain(network: InfViT, layers: Sequence[Layer]) -> None:
    """Refuse a module that is not plain: on a chunk of the tokens its result may differ."""
    plain = {
        "network": is_plain(network, InfViT),
        "patch_embed": isinstance(network.patch_embed, PixelPatchEmbed) or can_fold_normalisation(network),
    }
    for index, layer in enumerate(layers):
        attention: nn.Module = layer.attn
        if isinstance(attention, FoldedLinearAttention | ClassTokenPureAttention):
            attention = attention.attention
        plain |= {
            f"encoder.layers.{index}": is_plain(layer, Layer),
            f"encoder.layers.{index}.norm1": is_plain_norm(layer.norm1),
            f"encoder.layers.{index}.attn": is_plain_attention(attention),
            f"encoder.layers.{index}.norm2": is_plain_norm(layer.norm2),
            f"encoder.layers.{index}.ff": is_plain_mlp(layer.ff),
        }
    wrong = [name for name, good in plain.items() if not good]
    if wrong:
        raise ValueError(f"{wrong[0]} is not the plain module of InfViT: chunks of tokens may not be given to it")


def make_stages(network: InfViT, normalise: nn.Module) -> list[StageModule]:
    """Build the stages of a network, in order.

    Args:
        network: result of `infvit.fold.fold`, linear or pure.
        normalise: see `Embed`.

    Returns:
        One module per stage; identical stages share one module.

    Raises:
        ValueError: the network is not folded, so its head may read other tokens than the class token; or a module may
            mix tokens. The message names the module.
    """
    *layers, last = network.encoder.layers
    if not isinstance(last, ClassTokenLayer) or network.config.variant == "softmax":
        raise ValueError("expected a folded network, linear or pure")
    cut_layers = [cast(Layer, layer) for layer in (*layers, last.layer)]
    _check_plain(network, cut_layers)
    cut: list[StageModule] = [Start(network, cut_layers[0]), Embed(network, cut_layers[0], normalise)]
    for layer, following in zip(cut_layers, [*cut_layers[1:], None], strict=True):
        attention = layer.attn
        if isinstance(attention, FoldedLinearAttention):
            cut.append(Score(layer))
        elif isinstance(attention, ClassTokenPureAttention):
            cut += [AffinityNorm(attention.attention), ColumnSums(attention.attention), ClassTokenRow(layer)]
        else:
            again = attention.neumann_terms - 1
            cut += [Attend(attention), *[NeumannTerm(attention)] * again]
            cut += [ColumnSums(attention), *[NextColumnSums(attention)] * again]
        cut.append(Head(network, layer) if following is None else Apply(layer, following))
    return cut
