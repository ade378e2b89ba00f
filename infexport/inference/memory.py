"""Estimates of a run's memory before it starts: peak resident bytes of the whole process, on a CPU.

Each estimate sums the arrays that exist at the peak. The number of copies that ONNX Runtime holds was measured
(docs/streaming.md); `scripts/benchmarks/bench_stream.py` measures it again.
"""

from __future__ import annotations

import numpy as np

from infexport.bundle.manifest import Manifest
from infexport.inference.centrality import CENTRALITY, MOST_NUMBERS
from infexport.inference.options import TokenDtype
from infexport.inference.streaming.driver import make_layout, select_stages
from infexport.inference.streaming.token_store import store_dtype
from infvit.stage_scope import StageScope

PROCESS = 105_000_000
"""Python with numpy, Pillow, libvips and ONNX Runtime."""
DRAWING, PANEL, CANVAS = 120_000_000, 650_000, 7
"""Matplotlib with a map over its overview; each further panel; bytes of a pixel of the picture, while it is written."""
F32 = 4
TILE_ROWS = 4 * 256
"""Rows of pixels that libvips holds of a tiled image."""


def _activations(manifest: Manifest) -> int:
    """Return the bytes of a token at a layer's widest point: the GELU, some rows of E, and the token's patch."""
    config = manifest.config
    hidden, beside = (4 * F32, 5) if manifest.precision != "int8" else (3 * F32 + 1, 4)
    beside += 2 if config.variant == "pure_infsa" else 0
    patch = 3 * config.patch_size**2
    # pixels as they are, and as float32 before and after they are put in patches
    return hidden * config.mlp_dim + beside * F32 * config.embed_dim + (1 + 2 * F32) * patch


def whole(manifest: Manifest, weights: int, tokens: int, batch: int = 1) -> int:
    """Return the peak memory of the whole graph.

    Args:
        manifest: of the bundle.
        weights: bytes of its weights.
        tokens: of an image.
        batch: images at once.
    """
    return PROCESS + weights + batch * tokens * _activations(manifest)


def streamed(
    manifest: Manifest,
    tokens: int,
    width: int,
    chunk: int,
    token_dtype: TokenDtype,
    on_disk: bool,
    centrality: bool = False,
) -> int:
    """Return the peak memory of a streamed run.

    Args:
        manifest: of a bundle with stages.
        tokens: of the image.
        width: of the image in pixels; strips of it are in memory.
        chunk: tokens at a time.
        token_dtype: in which tokens are kept.
        on_disk: tokens are kept in a scratch file, not in memory.
        centrality: tokens' centrality is asked for.
    """
    config = manifest.config
    assert manifest.stages is not None, "the caller checks that there are stages"
    stages = select_stages(manifest.stages, centrality)
    chunk, embed = min(chunk, tokens), config.embed_dim
    # of the largest stage, `apply`: output projection, MLP, and what the next layer gathers
    projections = 3 if config.variant == "linear_infsa" else 4
    weights = F32 * (projections * embed**2 + 2 * embed * config.mlp_dim)
    if manifest.precision == "int8":
        weights //= 2  # a quarter, but for what is applied once per image
    passing = chunk * _activations(manifest) * 27 // 20  # the arenas of two stages overlap
    if any(stage.over.is_pairwise for stage in stages):
        # queries, keys, values, their heads apart, and the product; read from disk, once more
        passing += min(StageScope.PAIRS.max_rows(chunk), tokens) * embed * F32 * (11 if on_disk else 8)
    rows = max(config.patch_size, chunk * config.patch_size**2 // width)
    strips = 3 * width * (4 * rows + TILE_ROWS)
    maps = F32 * min(tokens * config.depth * config.num_heads, MOST_NUMBERS) * centrality
    stored = 0 if on_disk else kept(manifest, tokens, chunk, token_dtype, False, centrality)
    return PROCESS + weights + passing + strips + stored + 2 * maps


def kept(
    manifest: Manifest, tokens: int, chunk: int, token_dtype: TokenDtype, on_disk: bool, centrality: bool = False
) -> int:
    """Return the bytes of a streamed run's tokens, in memory or on disk; for the arguments see `streamed`."""
    config = manifest.config
    assert manifest.stages is not None, "the caller checks that there are stages"
    stages, total = select_stages(manifest.stages, centrality), 0
    for name, spare in make_layout(stages, range(tokens), chunk, on_disk, centrality).spare.items():
        columns = config.num_heads if name == CENTRALITY else config.embed_dim
        total += (tokens + spare) * columns * np.dtype(store_dtype(name, manifest.precision, token_dtype)).itemsize
    return total


def drawing(manifest: Manifest, detail: str) -> int:
    """Return the memory for drawing an image's heat map, without the numbers.

    Args:
        manifest: of the bundle.
        detail: see `infexport.outputs.heatmaps.draw_figure`.
    """
    depth, heads = manifest.config.depth, manifest.config.num_heads
    panels = {"mean": 2, "layers": depth, "heads": depth * heads}[detail]
    side = 450  # pixels of a panel with what is around it, 3 inches
    return max(DRAWING, DRAWING // 2 + panels * (PANEL + CANVAS * side**2))
