"""The network: sizes of the paper, golden checkpoints, variants, and what a config refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import infsa_ops
from infsa_ops.linear_state import reference as linear
from infsa_ops.neumann_kernel import reference as pure
from infvit.checkpoint import build_network, load_checkpoint
from infvit.config import SIZES, InfViTConfig
from infvit.network import InfViT, Layer

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.name.removesuffix(".io.safetensors") for path in GOLDEN.glob("*.io.safetensors"))
SMALL = InfViTConfig(
    variant="pure_infsa",
    image_size=8,
    patch_size=4,
    depth=2,
    embed_dim=12,
    num_heads=3,
    mlp_dim=20,
    num_classes=5,
    norm_eps=1e-6,
)


def network_of(**changes) -> InfViT:
    """A small network in float64 with random weights everywhere."""
    network = InfViT(dataclasses.replace(SMALL, **changes)).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    return network


def pixels_from(height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    assert actual.shape == truth.shape
    return (torch.linalg.vector_norm(actual - truth) / torch.linalg.vector_norm(truth)).item()


@pytest.fixture
def reference_operators(monkeypatch):
    """The network computes with the reference functions."""

    def install() -> None:
        monkeypatch.setattr(infsa_ops, "linear_attention", linear.linear_attention)
        monkeypatch.setattr(infsa_ops, "neumann_kernel", pure.neumann_kernel)

    return install


# Sizes


@pytest.mark.parametrize(
    ("size", "count", "published"),
    [
        ("infvit_linear_4l", 53_451_756, "53.5M"),
        ("infvit_pure_4l", 57_650_156, "57.7M"),
        ("infvit_pure_24l", 330_566_656, "330.6M"),
    ],
)
def test_parameter_counts_of_the_paper(size, count, published):
    with torch.device("meta"):
        network = InfViT(SIZES[size])
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert f"{count / 1e6:.1f}M" == published


def test_every_size_is_tested():
    assert set(SIZES) == {"infvit_linear_4l", "infvit_pure_4l", "infvit_pure_24l"}


# Golden


def test_all_cases_are_here():
    assert len(CASES) == 10


@pytest.mark.parametrize("case", CASES)
def test_golden_logits(case):
    checkpoint = load_checkpoint(GOLDEN / f"{case}.safetensors", config_file=GOLDEN / f"{case}.json")
    network = build_network(checkpoint)
    io = load_file(GOLDEN / f"{case}.io.safetensors")
    with torch.inference_mode():
        single, double = network(io["pixels"]), network.double()(io["pixels"].double())
    assert relative_error(single.double(), io["logits_f64"]) <= 5e-6
    assert relative_error(double, io["logits_f64"]) <= 1e-9


# Variants


@pytest.mark.parametrize("variant", ["linear_infsa", "pure_infsa"])
@pytest.mark.parametrize("rho_per_head", [False, True])
def test_network_is_the_reference(variant, rho_per_head, reference_operators):
    network = network_of(variant=variant, rho_per_head=rho_per_head)
    logits = network(pixels_from(12, 20))
    reference_operators()
    assert relative_error(logits, network(pixels_from(12, 20))) <= 1e-12


@pytest.mark.parametrize("variant", ["linear_infsa", "pure_infsa"])
def test_rho_per_head(variant):
    one, each = network_of(variant=variant), network_of(variant=variant, rho_per_head=True)
    shapes = {key: tensor.shape for key, tensor in each.state_dict().items() if key.endswith("rho_logit")}
    assert shapes == {f"encoder.layers.{layer}.attn.rho_logit": (3,) for layer in range(2)}
    state = one.state_dict()
    each.load_state_dict({key: state[key].expand(3) if key in shapes else state[key] for key in state})
    assert relative_error(each(pixels_from()), one(pixels_from())) <= 1e-12

    # a head's ρ reaches that head alone
    attention = each.attentions[0]
    attention.out_proj.weight.data = torch.eye(12, dtype=torch.float64)
    tokens = torch.randn(1, 7, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before = attention(tokens)
    attention.rho_logit.data[1] += 1
    changed = (attention(tokens) - before).abs().amax((0, 1)).unflatten(0, (3, 4)).amax(1)
    assert changed[1] > 1e-3
    assert changed[[0, 2]].max() == 0


def test_rho_starts_where_the_reference_package_does():
    network = InfViT(SMALL)
    assert network.largest_rho() == pytest.approx(0.95, abs=1e-6)
    network.attentions[1].rho_logit.data.fill_(5.0)
    assert network.largest_rho() == pytest.approx(torch.tensor(5.0).sigmoid().item())


def test_softmax_layer_is_a_transformer_layer():
    layer = network_of(variant="softmax").encoder.layers[0]
    assert isinstance(layer, Layer)
    twin = nn.TransformerEncoderLayer(
        12, 3, 20, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True, dtype=torch.float64
    ).eval()
    attention = layer.attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    twin.self_attn.in_proj_weight.data = torch.cat([projection.weight for projection in projections])
    twin.self_attn.in_proj_bias.data = torch.cat([projection.bias for projection in projections])
    twin.self_attn.out_proj = attention.out_proj
    twin.norm1, twin.norm2, twin.linear1, twin.linear2 = layer.norm1, layer.norm2, layer.ff[0], layer.ff[3]
    tokens = torch.randn(2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative_error(layer(tokens), twin(tokens)) <= 1e-12


def test_softmax_network_has_no_discount():
    network = network_of(variant="softmax")
    assert not [key for key in network.state_dict() if "rho" in key]
    assert network(pixels_from()).shape == (2, 5)


@pytest.mark.parametrize("terms", [2, 7])
def test_set_neumann_terms(terms, reference_operators):
    network = network_of()
    one_term = network(pixels_from())
    network.set_neumann_terms(terms)
    assert network.config.neumann_terms == terms
    logits = network(pixels_from())
    assert relative_error(logits, one_term) > 1e-3
    assert relative_error(logits, network_of(neumann_terms=terms)(pixels_from())) == 0
    reference_operators()
    assert relative_error(logits, network(pixels_from())) <= 1e-12


def test_optional_layers():
    network = network_of(attention_dense=True, pooler=True, qkv_bias=False)
    keys = set(network.state_dict())
    assert {"encoder.layers.0.attn.dense.weight", "pooler.weight"} <= keys
    assert not [key for key in keys if key.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]
    features = network.forward_features(pixels_from())
    assert features.abs().max() <= 1  # tanh
    assert relative_error(network.head(features), network(pixels_from())) == 0


# Config


POSITIVE = (
    "image_size", "patch_size", "depth", "embed_dim", "num_heads", "mlp_dim", "num_classes", "neumann_terms"
)  # fmt: skip


@pytest.mark.parametrize("value", [0, -4])
@pytest.mark.parametrize("field", POSITIVE)
def test_config_refuses_what_is_not_positive(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}, expected at least 1"):
        dataclasses.replace(SMALL, **{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "infinite"}, "variant is 'infinite', expected one of linear_infsa, pure_infsa, softmax"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0, expected more than 0"),
        ({"num_heads": 5}, "num_heads = 5 does not divide embed_dim = 12"),
        ({"patch_size": 3}, "patch_size = 3 does not divide image_size = 8"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_terms_are_validated_where_they_are_set():
    with pytest.raises(ValueError, match="neumann_terms is 0"):
        network_of().set_neumann_terms(0)


def test_config_survives_a_round_trip():
    assert InfViTConfig.from_dict(SMALL.to_dict()) == SMALL
    assert (SMALL.head_dim, SMALL.grid_size) == (4, 2)
