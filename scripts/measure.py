#!/usr/bin/env python3
"""Measure the README's figures: golden parity through the command line, and what converting and building cost.

    python scripts/measure.py

Times are medians with minimum and maximum. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import json
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
from PIL import Image
from safetensors.numpy import load_file
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


INFEXPORT = [sys.executable, "-m", "infexport"]
GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"


def golden_error(name: str, folder: Path) -> float:
    """Relative error of one golden model's logits, PNG in and npz out, against the reference package's float64."""
    io = load_file(GOLDEN / f"{name}.io.safetensors")
    images = [folder / f"{name}-{i}.png" for i in range(len(io["images"]))]
    for path, image in zip(images, io["images"], strict=True):
        Image.fromarray(image).save(path)
    checkpoint, config = GOLDEN / f"{name}.safetensors", GOLDEN / f"{name}.json"
    bundle, output = folder / name, folder / f"{name}.npz"
    for command in (
        ["convert", "checkpoint", checkpoint, "--config", config, "-o", bundle],
        ["run-engine", bundle, *images, "-o", output],
    ):
        subprocess.run([*INFEXPORT, *command], check=True, capture_output=True)
    with np.load(output) as arrays:
        difference = arrays["logits"] - io["logits_f64"]
    return float(np.linalg.norm(difference) / np.linalg.norm(io["logits_f64"]))


def main() -> None:
    index = json.loads((GOLDEN / "index.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        errors = [golden_error(case["file"], Path(folder)) for case in index if case["kind"] == "model"]
    print(f"golden models: {len(errors)}, worst relative error {max(errors):.2g}")

    model = export(Positions(1024), (torch.zeros(3, 5),), ({0: Dim("height"), 1: Dim("width")},))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (name,) = (i.name for i in session.get_inputs())
    like = np.zeros((144, 144), np.float32)
    report("positions 14 to 144, E = 1024, in ONNX Runtime", lambda: session.run(None, {name: like}), 50, warmup=5)

    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder) / "model.safetensors", Path(folder) / "bundle"
        torch.manual_seed(0)
        save_file(InfViT(SIZES["infvit_linear_4l"]).state_dict(), checkpoint)
        options = ["--variant", "linear_infsa", "--num-heads", "16", "--force", "-o", bundle]
        convert = [*INFEXPORT, "convert", "checkpoint", checkpoint, *options]
        build = [*INFEXPORT, "build-engine", bundle, "--target", "a100"]
        for title, command in (("convert, 53.5M parameters", convert), ("build-engine for a100, 53.5M", build)):
            report(title, lambda command=command: subprocess.run(command, check=True, capture_output=True), 3, warmup=1)
    report("infexport --help", lambda: subprocess.run([*INFEXPORT, "--help"], check=True, capture_output=True), 10, 2)


if __name__ == "__main__":
    main()
