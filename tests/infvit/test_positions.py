"""Position embeddings at any grid, against PyTorch's bicubic interpolation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from infvit.positions import cubic_weights, interpolate_positions

# trained height × width → height × width
GRIDS = [
    ((1, 1), (1, 1)),
    ((1, 1), (5, 3)),
    ((2, 2), (1, 1)),
    ((2, 3), (7, 4)),
    ((7, 7), (14, 14)),
    ((14, 14), (7, 7)),
    ((14, 14), (13, 15)),
    ((14, 14), (1, 29)),
    ((16, 10), (10, 16)),
    ((24, 24), (5, 100)),
    ((14, 14), (144, 144)),
    ((14, 14), (576, 576)),
]
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}


def positions(height: int, width: int, dtype: torch.dtype, embed_dim: int = 3) -> Tensor:
    return torch.randn(height, width, embed_dim, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("trained", "grid"), GRIDS)
def test_equals_bicubic_interpolation(trained, grid, dtype):
    trained_positions = positions(*trained, dtype)
    expected = interpolate(
        trained_positions.permute(2, 0, 1)[None], grid, mode="bicubic", align_corners=False, antialias=False
    )[0].permute(1, 2, 0)
    actual = interpolate_positions(trained_positions, *grid)
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    assert torch.linalg.vector_norm(actual - expected) <= TOLERANCE[dtype] * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 2, 7, 14, 24, 37])
def test_identity_at_the_trained_size_is_exact(size, dtype):
    assert torch.equal(cubic_weights(torch.arange(size, dtype=dtype), size, size), torch.eye(size, dtype=dtype))
    trained = positions(size, size + 1, dtype)
    assert torch.equal(interpolate_positions(trained, size, size + 1), trained)


@pytest.mark.parametrize("trained", [1, 2, 3, 14, 24])
@pytest.mark.parametrize("size", [1, 2, 5, 14, 100, 577])
def test_weights_of_a_point_sum_to_one(size, trained):
    weights = cubic_weights(torch.arange(size, dtype=torch.float64), size, trained)
    assert weights.shape == (size, trained)
    torch.testing.assert_close(weights.sum(1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-14)
    assert ((weights != 0).sum(1) <= 4).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("trained", "grid"), GRIDS)
def test_half_types_are_rounded_once(trained, grid, dtype):
    """Neither has the coordinates of a large grid: all is computed in float32, and rounded last."""
    half = positions(*trained, dtype)
    actual, exact = interpolate_positions(half, *grid), interpolate_positions(half.double(), *grid)
    assert actual.dtype == dtype
    error = torch.linalg.vector_norm(actual.double() - exact) / torch.linalg.vector_norm(exact)
    assert error <= torch.finfo(dtype).eps / 2 + TOLERANCE[torch.float32]
