"""The ONNX bodies of Pure InfSA in float16, computed in float16: finite and right where a plain one overflows.

ONNX's reference evaluator rounds after every operator; ONNX Runtime on a CPU would compute between casts in float32.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.export import Dim

import infexport
import infsa_ops
from infsa_ops.neumann_kernel import reference

RHO = 0.95
TOLERANCE = 4 * 2.0**-10
"""Four roundings, of q, k, A and v, at float16's ε; sums are float32."""


class Half(nn.Module):
    def __init__(self, terms):
        super().__init__()
        self.terms = terms

    def forward(self, q, k, v):
        mixed = infsa_ops.neumann_kernel(q, k, v, RHO, self.terms)
        return mixed, infsa_ops.affinity_squared_norm(q, k)


@pytest.fixture(scope="module", params=[1, 3], ids=["one term", "three terms"])
def half(request):
    tokens = Dim.DYNAMIC
    example = tuple(torch.ones(1, 2, 6, 8).half() for _ in range(3))
    model = infexport.export(Half(request.param), example, dynamic_shapes=({2: tokens},) * 3)
    evaluator = ReferenceEvaluator(model)

    def run(q, k, v):
        with np.errstate(over="raise", invalid="raise"):
            mixed, squares = evaluator.run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()})
        assert mixed.dtype == np.float16
        assert squares.dtype == np.float32
        return torch.from_numpy(mixed), torch.from_numpy(squares)

    return request.param, run


def truth(q, k, v, terms):
    q, k, v = q.double(), k.double(), v.double()
    return reference.neumann_kernel(q, k, v, RHO, terms), torch.relu(q @ k.transpose(-1, -2) / 8).square().sum((-2, -1))


@pytest.mark.parametrize("tokens", [1, 2, 197, 300])
def test_right_to_half_precision(tokens, half, random_tokens, relative_error):
    terms, run = half
    q, k, v = random_tokens(1, 2, tokens, 8, torch.float32).half()
    mixed, squares = run(q, k, v)
    expected, expected_squares = truth(q, k, v, terms)
    assert relative_error(mixed, expected) <= TOLERANCE
    torch.testing.assert_close(squares.double(), expected_squares, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("scale", [1e-4, 3000.0])
def test_massive_and_tiny_activations(scale, half, random_tokens, relative_error):
    """Every product q·k overflows float16 at 3000, and would be subnormal at 1e-4."""
    terms, run = half
    q, k, v = (random_tokens(1, 2, 197, 8, torch.float32) * scale).half()
    v = random_tokens(1, 2, 197, 8, torch.float32, seed=1)[0].half()
    mixed, _ = run(q, k, v)
    expected, _ = truth(q, k, v, terms)
    assert torch.isfinite(mixed).all()
    assert relative_error(mixed, expected) <= TOLERANCE


def test_massive_channels_and_a_token_that_dominates(half, random_tokens, relative_error):
    terms, run = half
    q, k, v = random_tokens(1, 2, 197, 8, torch.float32)
    q[..., 3] *= 200
    k[..., 3] *= 200
    v[..., 5] *= 1000
    q[:, :, 17] *= 10
    q, k, v = q.half(), k.half(), v.half()
    mixed, _ = run(q, k, v)
    expected, _ = truth(q, k, v, terms)
    assert torch.isfinite(mixed).all()
    assert relative_error(mixed, expected) <= TOLERANCE


def test_tokens_that_attend_to_nothing(half):
    _, run = half
    q = torch.ones(1, 2, 9, 8).half()
    mixed, squares = run(q, -q, q)
    assert (mixed == 0).all()
    assert (squares == 0).all()
