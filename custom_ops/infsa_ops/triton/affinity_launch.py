"""Launch of the Triton kernel: supported tensors, choice of blocks, preparation of inputs and outputs.

This was written without a GPU: the kernel is correct in Triton's interpreter and compiles for sm_80 and sm_90. Blocks
are chosen to fit in registers and shared memory, not by timing. `scripts/benchmarks/bench_kernel.py --sweep` times
them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from infsa_ops.tiled_affinity import TILED, Sweeps

WIDEST = 128
"""Maximum number of columns of q, k or v in a program."""

STRIDES = 1 << 24
"""Upper limit of the token stride plus the column stride: offsets within a tile of at most 128 × 128 are 32 bits."""


@dataclass(frozen=True)
class Blocks:
    """Block sizes of a launch.

    Attributes:
        queries: queries per program.
        keys: keys per tile.
        warps: warps per program.
        stages: tiles of keys in flight.
    """

    queries: int
    keys: int
    warps: int
    stages: int


BLOCKS = {
    (8, 0): {
        (16, 64): Blocks(128, 64, 4, 3),
        (16, 128): Blocks(128, 64, 8, 3),
        (32, 64): Blocks(64, 16, 4, 2),
        (32, 128): Blocks(32, 16, 8, 3),
    },
    (9, 0): {
        (16, 64): Blocks(128, 128, 8, 3),
        (16, 128): Blocks(128, 128, 8, 2),
        (32, 64): Blocks(64, 32, 4, 2),
        (32, 128): Blocks(128, 16, 8, 2),
    },
}
"""Blocks by compute capability, then by bits of the dtype and width of the widest operand.

Those of 8.0 also serve every other card from 8.0 on: they stay within 99 KiB of shared memory. A table is used, not
`triton.autotune`, which would run the kernel many times at the first image of a size. Its choice would also change the
order of sums."""


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device.

    Any other device gives (0, 0), ROCm devices too: their matrix units have no tf32x3.
    """
    if device.type != "cuda" or torch.version.hip:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def padded(width: int) -> int:
    """Round a width up to a power of two, at least 16, its width in a tile."""
    return max(16, 1 << (width - 1).bit_length())


def blocks_for(device: torch.device, dtype: torch.dtype, width: int) -> Blocks:
    """Return the blocks for operands of `dtype`; the widest operand has `width` columns."""
    table = BLOCKS.get(capability(device), BLOCKS[8, 0])
    return table[torch.finfo(dtype).bits, 64 if width <= 64 else 128]


@cache
def _kernel() -> Any:
    """Return the kernel; without triton, warn and return None."""
    try:
        from infsa_ops.triton.affinity_kernel import affinity
    except ImportError as error:
        warnings.warn(
            f"Pure InfSA runs without its kernel, several times slower: {error}. torch's CUDA builds bring triton; "
            "`pip install triton` installs it",
            stacklevel=2,
        )
        return None
    return affinity


def sweeps_for(*operands: Tensor) -> Sweeps:
    """Return the kernel's passes if it supports q, k and, if given, v; otherwise the tile loop in torch.

    The kernel supports float32, float16 and bfloat16 on compute capability 8.0 and later, widths up to 128, no
    empty tensors.
    """
    fits = operands[0].dtype in (torch.float32, torch.float16, torch.bfloat16) and all(
        tensor.shape[-1] <= WIDEST and tensor.numel() and sum(tensor.stride()[2:]) < STRIDES for tensor in operands
    )
    if fits and capability(operands[0].device) >= (8, 0) and _kernel() is not None:
        return KERNEL
    return TILED


def _as_values(v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return v in `dtype` and its unit `[B, H, 1, 1]`: the largest magnitude per head for float16, else None."""
    if v.dtype == dtype or dtype != torch.float16:
        return v.to(dtype), None
    unit = v.abs().amax((-2, -1), keepdim=True)
    unit = torch.where(unit == 0, 1, unit)
    return (v / unit).to(dtype), unit


def _launch(q: Tensor, k: Tensor, v: Tensor | None, product: Tensor | None, squares: bool) -> Tensor:
    """Run the kernel on v of q's dtype and fill `product`; return Σ A², float64 `[B, H]`, zeros unless `squares`."""
    batch, heads, queries, width = q.shape
    value_width = width if v is None else v.shape[-1]
    blocks = blocks_for(q.device, q.dtype, max(width, value_width))
    per_head = -(-queries // blocks.queries)
    tiles = q.new_empty(batch * heads, per_head, dtype=torch.float32) if squares else None
    longest = None
    if v is not None and q.dtype == torch.float16:
        longest = torch.linalg.vector_norm(k, dim=-1, dtype=torch.float32).amax(-1).reshape(-1)
    with torch.cuda.device_of(q):  # triton launches on the current device
        _kernel()[(batch * heads * per_head,)](  # one axis: the others end at 65535
            q, k, v, longest, product, tiles,
            q.stride(), k.stride(), v.stride() if v is not None else None,
            product.stride() if product is not None else None,
            heads, queries, k.shape[2],
            WIDTH=width, VALUE_WIDTH=value_width, PADDED=padded(width), PADDED_VALUE=padded(value_width),
            QUERIES=blocks.queries, KEYS=blocks.keys,
            PRODUCT=product is not None, SQUARES=squares, SCALED=longest is not None,
            num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True,
        )  # fmt: skip
    if tiles is None:
        return q.new_zeros(batch, heads, dtype=torch.float64)
    return tiles.sum(-1, dtype=torch.float64).reshape(batch, heads) / width**2


def _weighted(q: Tensor, k: Tensor, v: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
    values, unit = _as_values(v, q.dtype)
    product = q.new_empty(*q.shape[:3], v.shape[-1], dtype=torch.float32)
    total = _launch(q, k, values, product, squares)
    if unit is not None:
        product *= unit
    return product, total


KERNEL = Sweeps(
    product_and_squares=lambda q, k, v: _weighted(q, k, v, True),
    product=lambda q, k, v: _weighted(q, k, v, False)[0],
    squares=lambda q, k: _launch(q, k, None, None, True),
)
"""Implementation on tensor cores. float32 runs in tf32x3; in 16 bits q, k, A and v are rounded, sums are float32."""
