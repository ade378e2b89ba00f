"""Folding changes only the amount of computation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from support import GOLDEN, MODELS, relative_error
from torch.utils.flop_counter import FlopCounterMode

from infvit.checkpoint import build_network, load_checkpoint
from infvit.config import InfViTConfig
from infvit.fold import ClassTokenPureAttention, fold, fold_normalisation
from infvit.network import Attention, InfViT

CONFIG = InfViTConfig(
    variant="linear_infsa", image_size=24, patch_size=8, depth=3, embed_dim=24, num_heads=3, mlp_dim=40, num_classes=5,
    norm_eps=1e-6,
)  # fmt: skip
SHAPES = [
    {}, {"depth": 1}, {"qkv_bias": False}, {"attention_dense": True}, {"pooler": True}, {"rho_per_head": True},
    {"num_heads": 1}, {"variant": "pure_infsa"}, {"variant": "pure_infsa", "neumann_terms": 3}, {"variant": "softmax"},
    {"variant": "pure_infsa", "attention_dense": True, "qkv_bias": False, "rho_per_head": True},
]  # fmt: skip


def random_network(scale=1.0, **changes) -> InfViT:
    """A float64 network none of whose weights is zero."""
    generator = torch.Generator().manual_seed(0)
    network = InfViT(dataclasses.replace(CONFIG, **changes)).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
            parameter.copy_(scale * spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return network


def both(network: InfViT, height=24, width=24) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        return fold(network)(pixels), network(pixels)


@pytest.mark.parametrize("name", MODELS)
def test_golden_models_in_float64(name):
    checkpoint = load_checkpoint(GOLDEN / f"{name}.safetensors", config_file=GOLDEN / f"{name}.json")
    io = load_file(GOLDEN / f"{name}.io.safetensors")
    with torch.no_grad():
        logits = fold(build_network(checkpoint).double())(io["pixels"].double())
    assert relative_error(logits, io["logits_f64"]) <= 1e-12


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("size", [(24, 24), (8, 8), (40, 16)])
def test_the_same_function(changes, size):
    folded, plain = both(random_network(**changes), *size)
    assert relative_error(folded, plain) <= 1e-12


def test_epsilon_stays_where_it_was():
    """Small weights make ε dominate the divisors, so a misplaced ε changes the result."""
    network = random_network()
    with torch.no_grad():
        for attention in network.attentions:
            attention.q_proj.weight *= 1e-4
            attention.q_proj.bias *= 1e-4
            attention.k_proj.weight *= 1e-4
            attention.k_proj.bias *= 1e-4
    folded, plain = both(network)
    assert relative_error(folded, plain) <= 1e-12


def test_the_network_stays_as_it_was_and_shares_its_weights():
    network = random_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold(network)
    assert {p.data_ptr() for p in folded.parameters()} == {p.data_ptr() for p in network.parameters()}
    assert network.state_dict().keys() == before.keys()
    pixels = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    assert network.encoder(network.embed(pixels)).shape == (1, 10, 24)  # every token, as the cut would not give
    assert folded.encoder(folded.embed(pixels)).shape == (1, 1, 24)


def multiply_adds_per_token(network: InfViT, tokens=1024) -> float:
    """Multiply-adds of matrix products in the encoder, per patch token and E²."""
    embedded = torch.randn(1, tokens, network.config.embed_dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.encoder(embedded)
    return counter.get_total_flops() / 2 / tokens / network.config.embed_dim**2


def test_the_work_is_what_the_mathematics_says():
    """4 layers of 12 E² become 28 E²; one vector per head against every token costs heads/E of an E² besides."""
    config = dataclasses.replace(CONFIG, depth=4, embed_dim=256, num_heads=2, mlp_dim=1024)
    network = InfViT(config)
    assert multiply_adds_per_token(network) == pytest.approx(48, rel=0.02)
    assert 28 <= multiply_adds_per_token(fold(network)) <= 28.5


def test_the_last_pure_layer_is_cut_to_the_norm_and_one_row():
    """4 layers of 13 E² + 2 N E become 3 of 12 E² + 2 N E, and 2 E² + N E (N² is not counted)."""
    config = dataclasses.replace(
        CONFIG, variant="pure_infsa", attention_dense=True, depth=4, embed_dim=256, num_heads=2, mlp_dim=1024
    )
    network = InfViT(config)
    assert multiply_adds_per_token(network) == pytest.approx(52, rel=0.02)
    assert 38 <= multiply_adds_per_token(fold(network)) <= 38.1
    ops = [type(layer).__name__ for layer in fold(network).encoder.layers]
    assert ops == ["Layer", "Layer", "Layer", "ClassTokenLayer"]
    assert fold(network).encoder.layers[3].layer.attn.__class__ is ClassTokenPureAttention


def test_normalisation_goes_into_the_patch_embedding():
    network, mean, std = random_network(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = torch.randint(0, 256, (2, 24, 40, 3), generator=torch.Generator().manual_seed(0))
    mean_, std_ = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    with torch.no_grad():
        plain = network((image.permute(0, 3, 1, 2).double() / 255 - mean_) / std_)
        folded = fold_normalisation(network, mean, std)(image.double())
    assert relative_error(folded, plain) <= 1e-12


# Rewrites that must not fire


class MeanPooled(InfViT):
    """Its head reads every token."""

    def forward_features(self, pixels):
        return self.encoder(self.embed(pixels)).mean(1)


class OtherEpsilon(Attention):
    def forward(self, tokens):
        q, k, v = (t.double() for t in self.project(tokens))
        score = torch.relu((q.mean(-2, keepdim=True) * k).sum(-1))
        return self.project_out(
            ((score[..., None] * v).sum(-2) / (score.sum(-1) + 1e-3)[..., None]).flatten(1)[:, None]
        )


class QueriesUsedTwice(Attention):
    """A gate on the queries: they are needed token by token, not as a sum alone."""

    def forward(self, tokens):
        return super().forward(tokens) * torch.sigmoid(self.q_proj(tokens))


def with_class(network, owner, cls):
    """The network with another class for some of its parts."""
    for part in owner(network):
        part.__class__ = cls
    return network


def kinds(network) -> list[str]:
    return [
        type(layer).__name__ + "/" + type(getattr(layer, "layer", layer).attn).__name__
        for layer in network.encoder.layers
    ]


PURE = {"variant": "pure_infsa", "attention_dense": True}
FOLDED, PLAIN = "Layer/FoldedLinearAttention", "Layer/Attention"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, [FOLDED] * 3), (PURE, [PLAIN] * 3), ({"variant": "softmax"}, [PLAIN] * 3)],
    ids=["linear", "pure", "softmax"],
)
def test_a_mean_pooled_head_keeps_every_token(changes, expected):
    network = with_class(random_network(**changes), lambda network: [network], MeanPooled)
    assert kinds(fold(network)) == expected
    folded, plain = both(network)
    assert relative_error(folded, plain) <= 1e-12


@pytest.mark.parametrize("changes", [{}, PURE], ids=["linear", "pure"])
def test_tokens_that_are_read_stay(changes):
    """A forward hook on the last layer asks for every token's output."""
    network, seen = random_network(**changes), []
    network.encoder.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    folded, plain = both(network)
    assert seen == [(2, 10, 24)] * 2
    assert relative_error(folded, plain) <= 1e-12
    assert "ClassTokenLayer" not in kinds(fold(network))[-1]


@pytest.mark.parametrize("read", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_projections_that_are_read_stay(read):
    network, seen = random_network(), []
    projection = getattr(network.encoder.layers[1].attn, read)
    projection.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    folded, plain = both(network)
    assert seen == [(2, 10, 24)] * 2
    assert relative_error(folded, plain) <= 1e-12
    assert kinds(fold(network))[1] == PLAIN
    assert kinds(fold(network))[0] == FOLDED


def test_two_projections_stay_two_where_the_first_is_read():
    network, seen = random_network(**PURE), []
    network.encoder.layers[0].attn.out_proj.register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    )
    folded, plain = both(network)
    assert len(seen) == 2
    assert relative_error(folded, plain) <= 1e-12


@pytest.mark.parametrize("cls", [OtherEpsilon, QueriesUsedTwice])
def test_another_attention_stays_as_it_is(cls):
    network = with_class(random_network(), lambda network: network.attentions, cls)
    assert kinds(fold(network)) == [f"Layer/{cls.__name__}"] * 2 + [f"ClassTokenLayer/{cls.__name__}"]
    folded, plain = both(network)
    assert relative_error(folded, plain) <= 1e-12


def test_several_neumann_terms_need_every_row():
    assert kinds(fold(random_network(**PURE)))[-1] == "ClassTokenLayer/ClassTokenPureAttention"
    assert kinds(fold(random_network(**PURE, neumann_terms=2)))[-1] == "ClassTokenLayer/Attention"


def test_weights_that_are_tied_stay_right():
    network = random_network()
    for attention in network.attentions:
        attention.k_proj = attention.q_proj
        attention.v_proj = attention.q_proj
    folded, plain = both(network)
    assert relative_error(folded, plain) <= 1e-12
