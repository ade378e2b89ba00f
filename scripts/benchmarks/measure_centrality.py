#!/usr/bin/env python3
"""Measure how much of the centrality lies on the digits of all held-out canvases: the table of docs/centrality.md.

python scripts/benchmarks/measure_centrality.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from train_canvases import DIGIT, PATCH, SIZES, ZOO, held_out

from infexport.bundle import open_bundle
from infexport.inference.centrality import centrality_from_tokens
from infexport.inference.runners.onnxruntime import OrtRunner

SIDE = DIGIT // PATCH
"""Patches along a digit."""


def shares_of(runner: OrtRunner, size: int) -> tuple[np.ndarray, float]:
    """Shares on the digit, `[canvases, layers]`, and how often the brightest patch of all is one of its."""
    images, _, places = held_out(size)
    grid, found, inside = (size // PATCH, size // PATCH), [], 0
    for part, where in zip(np.array_split(images, 15), np.array_split(places, 15), strict=True):
        for tokens, (top, left) in zip(runner.run(part)["centrality"], where, strict=True):
            shares = centrality_from_tokens(tokens, grid).shares.mean(1)
            found.append(shares[:, top : top + SIDE, left : left + SIDE].sum((-2, -1)))
            row, column = np.unravel_index(shares.mean(0).argmax(), grid)
            inside += top <= row < top + SIDE and left <= column < left + SIDE
    return np.array(found), inside / len(images)


def main() -> None:
    print("| | canvas | the digit's share of the patches | of the centrality | by layer | brightest patch on it |")
    print("|---|---|---|---|---|---|")
    for name in ("linear", "pure"):
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            convert = ["convert", "checkpoint", ZOO / f"canvases-{name}", "-o", bundle]
            subprocess.run([sys.executable, "-m", "infexport", *convert], check=True, capture_output=True)
            with OrtRunner(open_bundle(bundle), "cpu", centrality=True) as runner:
                for size in SIZES:
                    shares, inside = shares_of(runner, size)
                    layers = ", ".join(f"{share:.0%}" for share in shares.mean(0))
                    even = SIDE**2 / (size // PATCH) ** 2
                    print(f"| {name} | {size}² | {even:.1%} | {shares.mean():.1%} | {layers} | {inside:.1%} |")


if __name__ == "__main__":
    main()
