"""The ONNX bodies of Pure InfSA in half types, computed in them: finite and right where plain float16 overflows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from support import Rounding
from torch import nn
from torch.export import Dim

import infexport
import infsa_ops
from infsa_ops.neumann_kernel import reference

RHO = 0.95
EPSILON = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


class Half(nn.Module):
    def __init__(self, terms):
        super().__init__()
        self.terms = terms

    def forward(self, q, k, v):
        mixed = infsa_ops.neumann_kernel(q, k, v, RHO, self.terms)
        return mixed, infsa_ops.affinity_squared_norm(q, k)


@pytest.fixture(scope="module", params=[1, 3], ids=["one term", "three terms"])
def terms(request):
    return request.param


@pytest.fixture(scope="module", params=EPSILON, ids=["float16", "bfloat16"])
def half(request, terms):
    """Dtype, tolerance: four roundings, of q, k, A and v, sums are float32; and how to run."""
    dtype, tokens = request.param, Dim.DYNAMIC
    example = tuple(torch.ones(1, 2, 6, 8, dtype=dtype) for _ in range(3))
    evaluator = Rounding(infexport.export(Half(terms), example, dynamic_shapes=({2: tokens},) * 3))
    kind = np.float16 if dtype == torch.float16 else ml_dtypes.bfloat16

    def run(q, k, v):
        feeds = {name: x.float().numpy().astype(kind) for name, x in zip("qkv", (q, k, v), strict=True)}
        with np.errstate(over="raise", invalid="raise"):
            mixed, squares = evaluator.run(feeds)
        assert mixed.dtype == kind
        assert squares.dtype == np.float32
        return torch.from_numpy(mixed.astype(np.float32)), torch.from_numpy(squares)

    return dtype, 4 * EPSILON[dtype], run


def truth(q, k, v, terms):
    q, k, v = q.double(), k.double(), v.double()
    return reference.neumann_kernel(q, k, v, RHO, terms), torch.relu(q @ k.transpose(-1, -2) / 8).square().sum((-2, -1))


@pytest.mark.parametrize("tokens", [1, 2, 197, 300])
def test_right_to_half_precision(tokens, terms, half, random_tokens, relative_error):
    dtype, tolerance, run = half
    q, k, v = random_tokens(1, 2, tokens, 8, torch.float32).to(dtype)
    mixed, squares = run(q, k, v)
    expected, expected_squares = truth(q, k, v, terms)
    assert relative_error(mixed, expected) <= tolerance
    torch.testing.assert_close(squares.double(), expected_squares, rtol=tolerance, atol=0)


@pytest.mark.parametrize("scale", [1e-4, 3000.0])
def test_massive_and_tiny_activations(scale, terms, half, random_tokens, relative_error):
    """Every product q·k overflows float16 at 3000, and would be subnormal at 1e-4."""
    dtype, tolerance, run = half
    q, k, v = (random_tokens(1, 2, 197, 8, torch.float32) * scale).to(dtype)
    v = random_tokens(1, 2, 197, 8, torch.float32, seed=1)[0].to(dtype)
    mixed, _ = run(q, k, v)
    expected, _ = truth(q, k, v, terms)
    assert torch.isfinite(mixed).all()
    assert relative_error(mixed, expected) <= tolerance


def test_massive_channels_and_a_token_that_dominates(terms, half, random_tokens, relative_error):
    dtype, tolerance, run = half
    q, k, v = random_tokens(1, 2, 197, 8, torch.float32)
    q[..., 3] *= 200
    k[..., 3] *= 200
    v[..., 5] *= 1000
    q[:, :, 17] *= 10
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    mixed, _ = run(q, k, v)
    expected, _ = truth(q, k, v, terms)
    assert torch.isfinite(mixed).all()
    assert relative_error(mixed, expected) <= tolerance


def test_tokens_that_attend_to_nothing(half):
    dtype, _, run = half
    q = torch.ones(1, 2, 9, 8).to(dtype)
    mixed, squares = run(q, -q, q)
    assert (mixed == 0).all()
    assert (squares == 0).all()
