"""How much memory a run takes, before it is run: peak resident bytes of the whole process, on a CPU.

Sums of what is known to be there at the worst moment; the constants were measured (docs/streaming.md), and
`scripts/bench_stream.py` measures them again.
"""

from __future__ import annotations

import numpy as np

from infexport.manifest import Manifest
from infexport.stream.driver import PAIR_CHUNKS, layout_of
from infexport.stream.stores import dtype_of

PROCESS = 100_000_000
"""Python with numpy, Pillow and ONNX Runtime."""
F32 = 4


def _weights(manifest: Manifest, multiply_adds: int) -> int:
    """Of layers that so many multiply-adds a token pass through."""
    return multiply_adds * (1 if manifest.precision == "int8" else F32)


def _activations(manifest: Manifest, tokens: int) -> int:
    """Of a layer of so many tokens, at its widest: the MLP before and after its GELU, and some rows of E beside it."""
    config = manifest.config
    beside = 8 if config["variant"] == "pure_infsa" else 4
    per_token = 2 * config["mlp_dim"] * F32 + beside * config["embed_dim"] * F32
    if manifest.precision == "int8":
        per_token += config["mlp_dim"]
    return tokens * per_token


def whole(manifest: Manifest, tokens: int, batch: int = 1) -> int:
    """Of the whole graph."""
    weights = _weights(manifest, manifest.parameters)
    pixels = tokens * manifest.config["patch_size"] ** 2 * 3
    # pixels as they are and as float32, twice: before and after they are put in patches
    return PROCESS + weights + batch * (_activations(manifest, tokens) + pixels * (1 + 2 * F32))


def streamed(manifest: Manifest, tokens: int, chunk: int, half: bool, on_disk: bool, width: int) -> int:
    """Of a streamed run.

    Args:
        manifest: of a bundle with stages.
        tokens: of the image.
        chunk: tokens at a time.
        half: tokens are kept in float16.
        on_disk: tokens are kept in a scratch file, not in memory.
        width: of the image in pixels; its strips are in memory.
    """
    config = manifest.config
    assert manifest.stages is not None
    chunk = min(chunk, tokens)
    embed = config["embed_dim"]
    # a layer's weights are loaded and then packed
    weights = 2 * _weights(manifest, 13 * embed * embed)
    block = 0
    if any(stage.over == "pairs" for stage in manifest.stages):
        block = min(PAIR_CHUNKS * chunk, tokens) * embed * F32 * 8
    strips = 2 * 2 * max(config["patch_size"], chunk * config["patch_size"] ** 2 // width) * width * 3
    kept = 0
    if not on_disk:
        spare = layout_of(manifest.stages, tokens, chunk, resumable=False).spare
        kept = embed * sum(
            (tokens + rows) * np.dtype(dtype_of(name, manifest.precision, half)).itemsize
            for name, rows in spare.items()
        )
    return PROCESS + weights + _activations(manifest, chunk) + block + strips + kept
