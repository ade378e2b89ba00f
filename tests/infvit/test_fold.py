"""Folding changes nothing but the work."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from support import GOLDEN, MODELS, relative_error
from torch.utils.flop_counter import FlopCounterMode

from infvit.checkpoint import build_network, load_checkpoint
from infvit.config import InfViTConfig
from infvit.fold import fold
from infvit.network import InfViT

CONFIG = InfViTConfig(
    variant="linear_infsa", image_size=24, patch_size=8, depth=3, embed_dim=24, num_heads=3, mlp_dim=40, num_classes=5,
    norm_eps=1e-6,
)  # fmt: skip
SHAPES = [
    {}, {"depth": 1}, {"qkv_bias": False}, {"attention_dense": True}, {"pooler": True}, {"rho_per_head": True},
    {"num_heads": 1}, {"variant": "pure_infsa"}, {"variant": "pure_infsa", "neumann_terms": 3}, {"variant": "softmax"},
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
    """With weights this small, ε decides the divisors: misplaced, the result would be another."""
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
    """Of matrix products in the encoder, per patch token and E²."""
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
