"""Float32 torch ops and ONNX bodies against float64, from one token to thousands, through one graph."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from infsa_ops.linear_state import reference as linear
from infsa_ops.neumann_kernel import reference as pure

HEADS, WIDTH = 2, 64
TOLERANCE = 5e-6
RHO = {"scalar": torch.tensor(0.95), "per head": torch.tensor([0.95, 0.3])}


@pytest.fixture(params=["torch_ops", "onnx_bodies"])
def operators(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def case(random_tokens):
    """(N, batch, T, kind of ρ) → (q, k, v, ρ) in float32 and both truths in float64, computed once."""

    @cache
    def build(tokens, batch, terms, rho):
        q, k, v = random_tokens(batch, HEADS, tokens, WIDTH, torch.float32, seed=tokens)
        truth = (
            linear.linear_attention(q.double(), k.double(), v.double(), RHO[rho]),
            pure.neumann_kernel(q.double(), k.double(), v.double(), RHO[rho], terms),
        )
        return (q, k, v, RHO[rho]), truth

    return build


@pytest.mark.slow
@pytest.mark.parametrize("rho", RHO)
@pytest.mark.parametrize("terms", [1, 4])
@pytest.mark.parametrize(
    ("tokens", "batch"), [(1, 1), (2, 3), (197, 2), (785, 1), (4097, 1)], ids=lambda size: f"{size}"
)
def test_float32_is_accurate(tokens, batch, terms, rho, operators, case, relative_error):
    arguments, truth = case(tokens, batch, terms, rho)
    for actual, expected in zip(operators(*arguments, terms), truth, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, expected) <= TOLERANCE
