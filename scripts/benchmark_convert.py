#!/usr/bin/env python3
"""Time what the first road costs: converting the 53.5M model, its engine, and interpolating positions in the graph.

    python scripts/benchmark_convert.py

Prints medians with minimum and maximum. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from safetensors.torch import save_file
from torch.export import Dim

from infexport import export
from infvit.config import SIZES
from infvit.network import InfViT
from infvit.positions import interpolate_positions


def report(name: str, run: Callable[[], object], repeats: int, warmup: int = 0) -> None:
    for _ in range(warmup):
        run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    print(
        f"{name}: median {statistics.median(seconds):.4g} s ({min(seconds):.4g} to {max(seconds):.4g}, {repeats} runs)"
    )


class Positions(torch.nn.Module):
    """The trained 14×14 grid at the grid of `like`, `[height, width]`."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.positions = torch.nn.Parameter(torch.randn(14, 14, embed_dim, generator=generator))

    def forward(self, like: torch.Tensor) -> torch.Tensor:
        return interpolate_positions(self.positions, *like.shape)


def main() -> None:
    model = export(Positions(1024), (torch.zeros(3, 5),), ({0: Dim("height"), 1: Dim("width")},))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (name,) = (i.name for i in session.get_inputs())
    like = np.zeros((144, 144), np.float32)
    report("positions 14 to 144, E = 1024, in ONNX Runtime", lambda: session.run(None, {name: like}), 50, warmup=5)

    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder) / "model.safetensors", Path(folder) / "bundle"
        torch.manual_seed(0)
        save_file(InfViT(SIZES["infvit_linear_4l"]).state_dict(), checkpoint)
        infexport = [sys.executable, "-m", "infexport"]
        options = ["--variant", "linear_infsa", "--num-heads", "16", "--force", "-o", bundle]
        convert = [*infexport, "convert", "checkpoint", checkpoint, *options]
        build = [*infexport, "build-engine", bundle, "--target", "a100"]
        for title, command in (("convert, 53.5M parameters", convert), ("build-engine for a100, 53.5M", build)):
            report(title, lambda command=command: subprocess.run(command, check=True, capture_output=True), 3, warmup=1)
    report("infexport --help", lambda: subprocess.run([*infexport, "--help"], check=True, capture_output=True), 10, 2)


if __name__ == "__main__":
    main()
