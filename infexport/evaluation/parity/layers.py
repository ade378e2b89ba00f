"""Error of every part of a network, given the inputs that it had.

A part's own error is how far what it gives is from what the float64 network's part gives for the same input: what came
in wrong is not held against it. Its budget is derived: MULTIPLE times what rounding at random does to the float64 part
(Monte Carlo arithmetic; Parker, "Monte Carlo Arithmetic", 1997). Rounded are the results of all sums, as float32
rounds them: each of n additions uniformly by at most u = 2⁻²⁴ of a partial sum that grows with the square root of its
terms, which comes to u·√(n/6). Where the precision is lower, so are the factors of products, by half a step.

An output of few numbers, as the head's is, gets no such draw: one says nothing of the next, and a sum near zero has
no size of its own. There the variance is summed over the terms themselves, see `sum_variance`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import infsa_ops
from infexport.evaluation.parity.tracing import Trace
from infsa_ops import EPSILON
from infvit.network import Attention, InfViT, Layer

MULTIPLE = 4
"""Standard deviations."""
DRAWS, LEAST_DRAWS, DRAWN_TOKENS = 24, 4, 2**15
"""Times that a layer is rounded: at most, at least, and tokens in between. What few numbers say needs many: an image's
features are one token, and in int8 they err in few directions."""
FLOAT32 = 2.0**-24
"""Half a step of float32, relative."""
SMALLEST = 2.0**-126
"""Least number of float32 with all of its digits: what is smaller may count as zero."""
HALF_STEPS = {"tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""The same of the factors of products; int8 has steps of the range that it meets."""

FP16_LEAST = 2.0**-25
"""Half the distance of float16's smallest numbers; the other types' are below all that counts."""

States = dict[str, Tensor]


@dataclass(frozen=True)
class Error:
    """Relative, Frobenius.

    Attributes:
        local_error: against the float64 part, given the same input.
        budget: what `local_error` may be.
    """

    local_error: float
    budget: float

    def __bool__(self) -> bool:
        return self.local_error <= self.budget < math.inf  # false of what is no number, too

    @property
    def share(self) -> float:
        """Share of the budget; infinite where there is none, or it cannot be told."""
        if math.isnan(self.local_error) or not self.budget < math.inf:
            return math.inf
        return self.local_error / self.budget if self.budget else math.inf if self.local_error else 0.0

    def to_dict(self) -> dict[str, float]:
        return {"adds": self.local_error, "budget": self.budget}


@dataclass(frozen=True)
class Part:
    """The embedding, a layer, or the head.

    Attributes:
        name: `embed`, `layers.0`, … or `head`.
        output: its own error.
        states: the same of what its operators give: sums, scores, mixed values.
        cumulative_error: of its output against the float64 network's, which was given the image.
        torch_local_error, torch_cumulative_error: both of PyTorch's float32.
    """

    name: str
    output: Error
    states: dict[str, Error]
    cumulative_error: float
    torch_local_error: float
    torch_cumulative_error: float

    def __bool__(self) -> bool:
        return bool(self.output) and all(self.states.values())

    @property
    def out(self) -> list[tuple[str, Error]]:
        """Return the outputs that are over their budget, with their errors: states first, since they are computed
        first.
        """
        return [(name, error) for name, error in [*self.states.items(), ("its output", self.output)] if not error]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "output": self.output.to_dict(),
            "states": {name: error.to_dict() for name, error in self.states.items()},
            "total": self.cumulative_error,
            "torch_adds": self.torch_local_error,
            "torch_total": self.torch_cumulative_error,
            "passed": bool(self),
        }


@dataclass(frozen=True)
class Arithmetic:
    """Arithmetic of a bundle, or of its engine.

    Attributes:
        precision: of the products that meet every token.
        folded: with the rewrites of `infvit.fold`: Linear-InfSA forms keys, values and outputs once per image.
    """

    precision: str
    folded: bool


def judge(
    network: InfViT, arithmetic: Arithmetic, bundle: Trace, eager: Trace, truth: Trace, pixels: Tensor
) -> list[Part]:
    """Every part of a network, first to last.

    Args:
        network: float64, as trained.
        arithmetic: of what is judged.
        bundle: of what is judged; its states are those that are compared.
        eager, truth: of PyTorch in float32, and of the network.
        pixels: that all three were given, normalised, float64.
    """
    with torch.no_grad():
        return list(_Judge(network, arithmetic, bundle, eager, truth).parts(pixels))


def judge_head(head: nn.Linear, features: Tensor, logits: Tensor) -> Error:
    """Judge logits `[B, classes]` of the head, float64, by the features `[B, E]` that it was given.

    Rounding to float32 is allowed `MULTIPLE` of its standard deviations, all logits together. That both are divided by
    the norm of the exact logits decides nothing, so a single logit near zero is judged as any other.
    """
    features = features.double()
    exact = head(features)
    variance = sum_variance(summand_size(head, features).square(), exact, head.in_features + 1)
    deviation = float(variance.sum().sqrt()) / (float(torch.linalg.vector_norm(exact)) or 1.0)
    return Error(_relative(logits, exact), MULTIPLE * deviation)


def summand_size(head: nn.Linear, features: Tensor) -> Tensor:
    """Root of the sum of squares of the terms of every logit, `[B, classes]`: products with features, and the bias."""
    return (features.square() @ head.weight.square().T + head.bias.square()).sqrt()


def sum_variance(squares: Tensor, total: Tensor, terms: int) -> Tensor:
    """Variance of what float32 rounds in sums of so many products, whatever their order.

    Every product and every partial sum s is rounded uniformly by at most u·|s|: variance u²s²/3. As s² counts Q + T²,
    with Q the sum of squares of the terms and T the total: a random walk of all the terms, and the way to the total.
    In a random order the mean is less, Q/6 + T²/3, but of one sum it says little: s² varies as much as it is, and what
    is rounded has the tails e^(−π·x), x in units of u·√(n·Q/3). At `MULTIPLE` = 4 that is less than a normal
    variable's.

    Args:
        squares: Q.
        total: T.
        terms: n.
    """
    return FLOAT32**2 / 3 * (squares + terms * (squares + total.square()))


class _Judge:
    def __init__(self, network: InfViT, arithmetic: Arithmetic, bundle: Trace, eager: Trace, truth: Trace) -> None:
        self._network, self._bundle, self._eager, self._traces = network, bundle, eager, (bundle, eager, truth)
        self._arithmetic, self._noise = arithmetic, Noise(arithmetic)

    def parts(self, pixels: Tensor) -> Iterator[Part]:
        exact, noisy = self._network.embed(pixels), self._noise.embedding(self._network, pixels)
        yield self._part("embed", exact, [noisy], exact, [trace.tokens[0] for trace in self._traces], {})
        layers = self._network.encoder.layers
        for index, layer in enumerate(layers):
            yield self._layer(index, cast(Layer, layer), last=index + 1 == len(layers))
        head = self._network.head
        logits = [trace.logits for trace in self._traces]
        own = judge_head(head, self._bundle.features, logits[0])
        eager = judge_head(head, self._eager.features, logits[1])
        yield Part("head", own, {}, _relative(logits[0], logits[2]), eager.local_error, _relative(logits[1], logits[2]))

    def _layer(self, index: int, layer: Layer, last: bool) -> Part:
        """The last layer with all that follows it but the head."""
        tokens, states = self._bundle.tokens[index].double(), self._bundle.states[index]
        folded, finish = self._arithmetic.folded, self._features if last else _same
        exact, exact_states = _run(layer, tokens, states, folded)
        count = tokens.shape[1]
        times = max(LEAST_DRAWS, min(DRAWS, DRAWN_TOKENS // count))
        draws = [_run(self._noise.layer(layer, count, last), tokens, states, folded) for _ in range(times)]
        eager, _ = _run(layer, self._eager.tokens[index].double(), (), folded)
        accumulated = FLOAT32 * math.sqrt(count / 6)  # a state is a sum over all tokens
        lost = SMALLEST * count**2  # by products too small for float32, at most one for every pair of tokens
        errors = {
            name: Error(
                _relative(value, exact_states[name]),
                MULTIPLE * (_rms([drawn[name] for _, drawn in draws], exact_states[name]) + accumulated)
                + _relative(exact_states[name] + lost, exact_states[name]),
            )
            for name, value in states.items()
        }
        given = [trace.features if last else trace.tokens[index + 1] for trace in self._traces]
        noisy = [finish(out, self._noise) for out, _ in draws]
        return self._part(f"layers.{index}", finish(exact, None), noisy, finish(eager, None), given, errors)

    def _features(self, tokens: Tensor, noise: Noise | None) -> Tensor:
        """Return the head's input, from the last layer's output."""
        features: Tensor = self._network.encoder.norm(tokens[:, :1])[:, 0]
        features = features if noise is None else noise.sums(features, 1)
        pooler = self._network.pooler
        if pooler is None:
            return features
        pooled = pooler(features)
        return torch.tanh(pooled if noise is None else noise.sums(pooled, pooler.in_features))

    def _part(
        self,
        name: str,
        exact: Tensor,
        noisy: list[Tensor],
        eager_exact: Tensor,
        given: list[Tensor],
        states: dict[str, Error],
    ) -> Part:
        """Compare a part's outputs in the bundle, in PyTorch and in float64, each for the inputs that it had."""
        bundle, eager, truth = given
        return Part(
            name=name,
            output=Error(_relative(bundle, exact), MULTIPLE * _rms(noisy, exact)),
            states=states,
            cumulative_error=_relative(bundle, truth),
            torch_local_error=_relative(eager, eager_exact),
            torch_cumulative_error=_relative(eager, truth),
        )


def _same(tokens: Tensor, noise: Noise | None) -> Tensor:
    return tokens


class Noise:
    """Rounds at random what an arithmetic rounds, in float64; the same each time."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        self._arithmetic = arithmetic
        self._random = torch.Generator().manual_seed(0)

    def sums(self, x: Tensor, terms: int) -> Tensor:
        """Results of float32 sums of so many terms, rows along the last axis."""
        size = x.square().mean(-1, keepdim=True).sqrt()
        noise = torch.randn(x.shape, generator=self._random, dtype=x.dtype)
        return x + FLOAT32 * math.sqrt(terms / 6) * size * noise

    def embedding(self, network: InfViT, pixels: Tensor) -> Tensor:
        """`network.embed(pixels)`: the patch embedding stays float32 in int8."""
        embed = copy.deepcopy(network.patch_embed)
        terms = embed.weight[0].numel()
        if self._arithmetic.precision in HALF_STEPS:
            embed.weight.copy_(self._factors(embed.weight))
            pixels = self._factors(pixels)
        embed.register_forward_hook(lambda _, __, out: self.sums(out.movedim(1, -1), terms).movedim(-1, 1))
        rounded = copy.copy(network)
        rounded._modules = {**network._modules, "patch_embed": embed}
        tokens = rounded.embed(pixels)
        # a point of the grid is known to a step of float32, where there are grid_size of them
        positions = network.pos_embed.square().mean().sqrt()
        return tokens + FLOAT32 * (1 + network.config.grid_size) * positions * self._uniform(tokens)

    def layer(self, layer: Layer, count: int, last: bool) -> Layer:
        """A layer, perhaps the last, that rounds what it computes of so many tokens."""
        rounded = copy.deepcopy(layer)
        attention = rounded.attn
        for name, module in rounded.named_modules():
            if isinstance(module, nn.Linear):
                self._linear(module, self._lowered(name, attention, last))
            elif isinstance(module, nn.LayerNorm):
                module.register_forward_hook(lambda _, __, out: self.sums(out, 1))
        if self._attends_lowered(attention):
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.register_forward_hook(lambda _, __, out: self._factors(out))
            attention.out_proj.register_forward_pre_hook(lambda _, given: (self._factors(given[0]),))
        attention.out_proj.register_forward_pre_hook(lambda _, given: (self.sums(given[0], count),))
        rounded.register_forward_hook(lambda _, __, out: self.sums(out, 2))
        return rounded

    def _lowered(self, name: str, attention: Attention, last: bool) -> bool:
        """Tell whether a matrix of a layer meets every token, and so is multiplied in the lower precision."""
        once: set[str] = set()
        if self._arithmetic.folded:
            outputs = {"attn.v_proj", "attn.out_proj", "attn.dense"}
            once |= outputs | {"attn.k_proj"} if attention.variant == "linear_infsa" else set()
            once |= {"ff.0", "ff.3"} if last else set()
            once |= outputs if last and attention.neumann_terms == 1 else set()
        return self._arithmetic.precision != "fp32" and name not in once

    def _attends_lowered(self, attention: Attention) -> bool:
        return self._arithmetic.precision in HALF_STEPS and attention.variant != "linear_infsa"

    def _linear(self, linear: nn.Linear, lowered: bool) -> None:
        if lowered:
            linear.weight.copy_(self._factors(linear.weight, by_row=True))
            linear.register_forward_pre_hook(lambda _, given: (self._factors(given[0]),))
        linear.register_forward_hook(lambda _, __, out: self.sums(out, linear.in_features))

    def _factors(self, x: Tensor, by_row: bool = False) -> Tensor:
        """Factors of products in the lower precision; in int8 all have one step, or every row its own."""
        if self._arithmetic.precision != "int8":
            half_steps = HALF_STEPS[self._arithmetic.precision] * x.abs()
            if self._arithmetic.precision == "fp16":
                half_steps = half_steps.clamp(min=FP16_LEAST)
            return x + half_steps * self._uniform(x)
        step = x.abs().amax(-1, keepdim=True) / 127 if by_row else (x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
        return x + step / 2 * self._uniform(x)

    def _uniform(self, x: Tensor) -> Tensor:
        """From −1 to 1."""
        return 2 * torch.rand(x.shape, generator=self._random, dtype=x.dtype) - 1


def _run(layer: Layer, tokens: Tensor, wanted: Collection[str], folded: bool) -> tuple[Tensor, States]:
    """Return a layer's output, `[B, N, E]`, and its operators' outputs, by the names of `conversion.activations`."""
    seen: States = {}
    attention = layer.attn

    def see(name: str) -> Any:
        return lambda _, __, out: seen.__setitem__(name, out)

    modules = {"tokens": layer.norm1, "q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
    hooks = [module.register_forward_hook(see(name)) for name, module in modules.items()]
    hooks.append(attention.out_proj.register_forward_pre_hook(lambda _, given: seen.__setitem__("mixed", given[0])))
    try:
        out: Tensor = layer(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    if not wanted:
        return out, {}
    heads = attention.num_heads
    q, k, v, mixed = (seen[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q", "k", "v", "mixed"))
    if attention.variant == "linear_infsa":
        return out, _linear_states(q, k, seen["tokens"][:, None] if folded else v)
    states = {"mixed": mixed}
    if "squared_norm" in wanted:
        states["squared_norm"] = infsa_ops.affinity_squared_norm(q, k)
    if "row.mass" in wanted:
        row = torch.relu(q[:, :, :1] @ k.transpose(-1, -2) / q.shape[-1])
        states |= {"row.mass": row[:, :, 0].sum(-1), "row.moment": (row @ seen["tokens"][:, None])[:, :, 0]}
    return out, states


def _linear_states(q: Tensor, k: Tensor, values: Tensor) -> States:
    """Return the states of Linear-InfSA from q and k `[B, H, N, d]` and the values that scores weigh, `[B, H or 1, N,
    ·]`.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    energy = torch.linalg.vector_norm(q * scale, dim=-1)
    mass, moment = energy.sum(-1), (energy[..., None] * q * scale).sum(-2)
    mean = moment / (mass[..., None] + EPSILON)
    scores = torch.relu((k * scale @ mean[..., None])[..., 0])
    return {
        "energy.mass": mass,
        "energy.moment": moment,
        "scores": scores,
        "score.mass": scores.sum(-1),
        "score.moment": (scores[:, :, None] @ values)[:, :, 0],
    }


def _rms(draws: list[Tensor], truth: Tensor) -> float:
    return math.sqrt(sum(_relative(x, truth) ** 2 for x in draws) / len(draws))


def _relative(x: Tensor, truth: Tensor) -> float:
    """‖x − truth‖ / ‖truth‖; the absolute error where the truth is zero, and infinite where x is not finite."""
    error = float(torch.linalg.vector_norm(x.double() - truth)) / (float(torch.linalg.vector_norm(truth)) or 1.0)
    return error if math.isfinite(error) else math.inf
