"""Position embeddings at any grid: bicubic interpolation as two small matrix products.

ONNX Runtime's cubic Resize takes seconds at large grids. Bicubic interpolation is separable, so with one weight
matrix per axis the interpolated grid is A_h · P · A_wᵀ; the matrices are made from the grid's size in the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

CUBIC_COEFFICIENT = -0.75
"""a of the cubic convolution kernel (Keys 1981), as in PyTorch's and OpenCV's bicubic."""


def cubic_weights(size: int, trained: int, like: Tensor) -> Tensor:
    """Rows of cubic-convolution weights that resample `trained` points to `size`.

    Half-pixel centres, no antialiasing, edges clamped: `torch.nn.functional.interpolate(mode="bicubic",
    align_corners=False)` along one axis. The identity when `size == trained`.

    Returns:
        `[size, trained]`, dtype and device of `like`.
    """
    a = CUBIC_COEFFICIENT
    points = torch.arange(size, dtype=like.dtype, device=like.device)
    source = (points + 0.5) * (trained / size) - 0.5
    base = torch.floor(source)
    t = source - base
    near, far = t, 1 - t
    taps = (
        ((a * (near + 1) - 5 * a) * (near + 1) + 8 * a) * (near + 1) - 4 * a,
        ((a + 2) * near - (a + 3)) * near * near + 1,
        ((a + 2) * far - (a + 3)) * far * far + 1,
        ((a * (far + 1) - 5 * a) * (far + 1) + 8 * a) * (far + 1) - 4 * a,
    )
    columns = torch.arange(trained, dtype=like.dtype, device=like.device)
    weights = torch.zeros(size, trained, dtype=like.dtype, device=like.device)
    for offset, tap in enumerate(taps, start=-1):
        column = torch.clamp(base + offset, 0, trained - 1)
        weights = weights + torch.where(columns == column[:, None], tap[:, None], 0.0)
    return weights


def interpolate_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings `[h0, w0, E]` resampled to `[height, width, E]`."""
    trained_height, trained_width, embed_dim = positions.shape
    rows = cubic_weights(height, trained_height, positions) @ positions.flatten(1)
    rows = rows.unflatten(1, (trained_width, embed_dim))
    return cubic_weights(width, trained_width, positions) @ rows
