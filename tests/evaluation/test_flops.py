"""The work that a bundle's config names, against numbers written by hand and against torch's own count."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from infexport.evaluation.flops import MatmulCost, embedding_cost, matmul_cost
from infvit.config import SIZES, InfViTConfig
from infvit.fold import fold
from infvit.network import InfViT

E2 = 1024**2  # of the paper's models
TINY = InfViTConfig(
    "linear_infsa", 8, 8, depth=3, embed_dim=10, num_heads=1, mlp_dim=30, num_classes=1, norm_eps=1e-6
)  # E² = 100, 2 E m = 600


def work(folded, tokens, **changes):
    return matmul_cost(dataclasses.replace(TINY, **changes), folded, tokens)


@pytest.mark.parametrize(
    ("name", "folded", "dense"),
    [
        ("infvit_linear_4l", True, 28),  # 3 layers of 9 E², 1 E²
        ("infvit_linear_4l", False, 48),
        ("infvit_pure_4l", True, 38),  # 3 layers of 12 E², 2 E²
        ("infvit_pure_4l", False, 52),
        ("infvit_pure_24l", True, 278),
        ("infvit_pure_24l", False, 312),
    ],
)
def test_the_paper_s_sizes(name, folded, dense):
    config = SIZES[name]
    tokens = 64 * 64 + 1  # 1024² in patches of 16
    found = matmul_cost(config, folded, tokens)
    assert found.dense == dense * E2 * tokens
    layers = 0 if "linear" in name else config.depth - 0.5 if folded else config.depth
    assert found.attention == layers * 2 * 1024 * tokens**2


def test_by_hand():
    assert work(False, 5, variant="linear_infsa") == MatmulCost(5 * 3 * 1000, 0)
    assert work(False, 5, variant="linear_infsa", attention_dense=True) == MatmulCost(5 * 3 * 1100, 0)
    assert work(True, 5, variant="linear_infsa") == work(True, 5, variant="linear_infsa", attention_dense=True)
    assert work(True, 5, variant="linear_infsa") == MatmulCost(5 * (2 * 700 + 100), 0)
    # one sweep over all pairs is two products of N² E: 500
    assert work(False, 5, variant="pure_infsa") == MatmulCost(5 * 3 * 1000, 3 * 500)
    assert work(False, 5, variant="pure_infsa", neumann_terms=4) == MatmulCost(5 * 3 * 1000, 4 * 3 * 500)
    assert work(True, 5, variant="pure_infsa") == MatmulCost(5 * (2 * 1000 + 200), 2 * 500 + 250)
    assert work(True, 5, variant="pure_infsa", neumann_terms=4) == MatmulCost(5 * (2 * 1000 + 300), 4 * 3 * 500)
    assert work(False, 5, variant="softmax", neumann_terms=4) == MatmulCost(5 * 3 * 1000, 3 * 500)
    assert work(True, 5, variant="linear_infsa", depth=1) == MatmulCost(500, 0)


def test_the_time_it_takes():
    assert MatmulCost(dense=300, attention=40).seconds(100, 20) == 5


@pytest.mark.parametrize("folded", [False, True])
def test_torch_counts_the_same(folded):
    """Besides, torch counts one vector per head against every token, and what an image costs once."""
    config = InfViTConfig(
        variant="linear_infsa", image_size=24, patch_size=8, depth=4, embed_dim=256, num_heads=2, mlp_dim=1024,
        num_classes=5, norm_eps=1e-6,
    )  # fmt: skip
    network = InfViT(config)
    tokens = 1024
    chosen = fold(network) if folded else network  # before torch counts: by hooks, beside which nothing is folded
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        chosen.encoder(torch.randn(1, tokens, 256))
    expected = matmul_cost(config, folded, tokens)
    assert counter.get_total_flops() / 2 == pytest.approx(expected.dense, rel=0.02)
    assert expected.dense <= counter.get_total_flops() / 2
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.patch_embed(torch.randn(1, 3, 40, 24))
    assert counter.get_total_flops() / 2 == embedding_cost(config, tokens=5 * 3 + 1)
