"""A folded network cut into sweeps over its tokens, which meet only in sums that add.

Each is a module over a chunk of tokens; whoever adds what the chunks give has what the network would have had at once:

    linear      start, embed, [score, apply]×(L−1), score, head
    pure        start, embed, [attend, again×(T−1), apply]×(L−1), and norm, row, head (one term)
                                                              or attend, again×(T−1), head

and, where somebody asks which tokens are attended to, columns×T before each apply, row and head of pure; the scores of
linear come by the way.

`apply` of one layer gathers for the next, so that tokens are read and written once. In pure `attend` meets blocks of
queries and keys; its last layer, cut to the class token (`infvit.fold`), needs the norm of A and one row of it.

Names are what they are in `infsa_ops`. Token by token: `tokens` `[B, n, E]`, `q`, `k`, `v` and `mixed` `[B, n, E]`,
heads side by side; `centrality` `[B, n, H]`. Sums: `mass` `[B, H]`, `moment` `[B, H, ·]`, `squared_norm` `[B, H]`. Of
the first token: `query`.
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
    """One of the modules; `forward` takes `inputs` and returns a tuple of `outputs`.

    Attributes:
        name: of its file.
        over: the tokens that it is called for.
        inputs, outputs: names, in order.
        optional: only for the centrality of tokens.
    """

    name = ""
    over = StageScope.TOKENS
    optional = False
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


class Gather(nn.Module):
    """What a layer takes of a chunk of its tokens before any sum over all of them is known: `outputs`."""

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
    """Names of what `_apply` needs besides tokens."""
    if isinstance(layer.attn, FoldedLinearAttention):
        return "mass", "moment"
    return ("mass", "moment", "squared_norm") if isinstance(layer.attn, ClassTokenPureAttention) else _MIXED


_MIXED = ("mixed", "squared_norm")


def _apply(layer: Layer, tokens: Tensor, *needed: Tensor) -> Tensor:
    """A layer's output for a chunk of its tokens."""
    attention = layer.attn
    if isinstance(attention, Attention):
        mixed, squared_norm = needed
        tokens = tokens + attention.project_out(_scaled(mixed, squared_norm, attention.rho, attention.num_heads))
    else:
        tokens = tokens + attention.out(*needed)
    out: Tensor = tokens + layer.ff(layer.norm2(tokens))
    return out


def _scaled(mixed: Tensor, squared_norm: Tensor, rho: Tensor, heads: int) -> Tensor:
    """ρ A V / (‖A‖_F + ε) of A V `[B, n, E]` and ‖A‖²_F `[B, H]`."""
    scale = rho.reshape(-1) / (squared_norm.sqrt() + EPSILON)
    return (mixed.unflatten(-1, (heads, -1)) * scale[:, None, :, None]).flatten(2)


class Embed(StageModule):
    """A strip of the image, whole patches, to tokens and what the first layer gathers.

    Args:
        network: folded.
        layer: its first.
        normalise: a strip as it lies in the image to what the network's patch embedding takes.
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
        """Positions of a strip whose first patch is at (`row`, `column`) of a grid; both `[1]`, at least float32."""
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
    """The class token, `[1, 1, E]`, and what the first layer gathers of it."""

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
    """Scores of Linear-InfSA, and their sums, of the sums of energies."""

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
    """`Attend` for one more term of the Neumann series: the values are V and, scaled, what the term before gave."""

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
    """A block of queries and keys where the norm of A is all that is needed."""

    name = "norm"
    inputs = ("q", "k")
    outputs = ("squared_norm",)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (infsa_ops.affinity_squared_norm(self._heads(q), self._heads(k)),)


class ColumnSums(Attend):
    """A block of keys and queries: its share of the column sums of Σ_{t=1..T} (ρÂ)ᵗ, Katz centrality.

    The same series with queries and keys exchanged, applied to ones; by Horner's scheme, each time adding one to what
    the time before gave.
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
    """A layer's output, and what the following layer gathers of it."""

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
    """Refuse a module that is not plain: given a chunk of the tokens, it may do something else."""
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
    """The sweeps of a network, in order.

    Args:
        network: as `infvit.fold.fold` returns it, linear or pure.
        normalise: as of `Embed`.

    Returns:
        A module for each; the same one for what is the same again.

    Raises:
        ValueError: a network that is not folded, whose head may read other tokens than the class token; or a module
            that may mix tokens, which is named.
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
