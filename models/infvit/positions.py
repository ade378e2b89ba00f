"""Position embeddings at any grid: bicubic interpolation as two small matrix products.

ONNX Runtime's cubic Resize takes seconds at large grids. Bicubic interpolation is separable, so with one weight
matrix per axis the interpolated grid is A_h · P · A_wᵀ; the matrices are made from the grid's size in the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

CUBIC_COEFFICIENT = -0.75
"""a of the cubic convolution kernel (Keys 1981), as in PyTorch's and OpenCV's bicubic."""


def cubic_weights(points: Tensor, size: int | Tensor, trained: int) -> Tensor:
    """Rows of cubic-convolution weights that resample `trained` points to some of `size`.

    Half-pixel centres, no antialiasing, edges clamped: `torch.nn.functional.interpolate(mode="bicubic",
    align_corners=False)` along one axis. The identity when `size == trained`.

    Args:
        points: their indices, `[n]`, whole numbers from 0, floating.
        size: points of the whole axis.
        trained: points of the trained axis.

    Returns:
        `[n, trained]`, dtype and device of `points`.
    """
    a = CUBIC_COEFFICIENT
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
    columns = torch.arange(trained, dtype=points.dtype, device=points.device)
    weights = points.new_zeros(points.shape[0], trained)  # not len(points), a constant to the exporter
    for offset, tap in enumerate(taps, start=-1):
        column = torch.clamp(base + offset, 0, trained - 1)
        weights = weights + torch.where(columns == column[:, None], tap[:, None], 0.0)
    return weights


def resample(positions: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resample position embeddings `[h0, w0, E]` by the weights of each axis, `[h, h0]` and `[w, w0]`: `[h, w, E]`.

    In the dtype of the weights, which is at least float32.
    """
    _, trained_width, embed_dim = positions.shape
    positions = positions.to(rows.dtype)
    return columns @ (rows @ positions.flatten(1)).unflatten(1, (trained_width, embed_dim))


def interpolate_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Resample position embeddings `[h0, w0, E]` to `[height, width, E]`, in their dtype.

    Half types have no exact coordinates beyond 256 or 2048, so float32 is used and the result rounded last.
    """
    dtype = torch.promote_types(positions.dtype, torch.float32)
    rows, columns = (
        cubic_weights(torch.arange(size, dtype=dtype, device=positions.device), size, trained)
        for size, trained in zip((height, width), positions.shape[:2], strict=True)
    )
    return resample(positions, rows, columns).to(positions.dtype)
