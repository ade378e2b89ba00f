#!/usr/bin/env python3
"""Measure the README's figures: fidelity through the command line, and what converting, building and starting cost.

    python scripts/benchmarks/measure.py

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
import skimage
import torch
import train_digits
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch.export import Dim

from infexport import export
from infvit.checkpoint import build_network, load_checkpoint
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
GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"


ZOO = Path(__file__).resolve().parents[2] / "models" / "zoo"


def golden_error(name: str, folder: Path, precision: str) -> float:
    """Relative error of one golden model's logits, PNG in and npz out, against the reference package's float64."""
    io = load_file(GOLDEN / f"{name}.io.safetensors")
    images = [folder / f"{name}-{i}.png" for i in range(len(io["images"]))]
    for path, image in zip(images, io["images"], strict=True):
        Image.fromarray(image).save(path)
    checkpoint, config = GOLDEN / f"{name}.safetensors", GOLDEN / f"{name}.json"
    bundle, output = folder / name, folder / f"{name}.npz"
    for command in (
        ["convert", "checkpoint", checkpoint, "--config", config, "--precision", precision, "--force", "-o", bundle],
        ["run-engine", bundle, *images, "-o", output],
    ):
        subprocess.run([*INFEXPORT, *command], check=True, capture_output=True)
    with np.load(output) as arrays:
        difference = arrays["logits"] - io["logits_f64"]
    return float(np.linalg.norm(difference) / np.linalg.norm(io["logits_f64"]))


def write_digits(folder: Path) -> None:
    """512 training digits, to calibrate with, and the held-out ones, as PNG."""
    train, _, images, _ = train_digits.digits()
    for kind, array in (("train", train[:512]), ("held-out", images)):
        (folder / kind).mkdir()
        for i, image in enumerate(array):
            Image.fromarray(image).save(folder / kind / f"{i:03}.png")


def digits_errors(name: str, folder: Path, options: list[str]) -> str:
    """A zoo model on every held-out digit, PNG in and npz out, against PyTorch in float64: with `write_digits`."""
    _, _, images, labels = train_digits.digits()
    calibrate = ["--calibrate", folder / "train"] if "calibrated" in options else []
    told = ["--precision", options[0], *calibrate, "--force", "-o", folder / "bundle"]
    for command in (
        ["convert", "checkpoint", ZOO / name, *told],
        ["run-engine", folder / "bundle", folder / "held-out", "--batch-size", "50", "-o", folder / "out.npz"],
    ):
        subprocess.run([*INFEXPORT, *command], check=True, capture_output=True)
    with np.load(folder / "out.npz") as arrays, torch.no_grad():
        network = build_network(load_checkpoint(ZOO / name)).double().eval()
        truth = network(train_digits.normalise(torch.from_numpy(images)).double()).numpy()
        logits = arrays["logits"]
    by_image = np.linalg.norm(logits - truth, axis=1) / np.linalg.norm(truth, axis=1)
    whole = np.linalg.norm(logits - truth) / np.linalg.norm(truth)
    agree = (logits.argmax(-1) == truth.argmax(-1)).mean()
    right = (logits.argmax(-1) == labels).mean()
    return (
        f"{name}, {' '.join(options)}: relative error {whole:.2g} (by image: median {np.median(by_image):.2g}, largest "
        f"{by_image.max():.2g}), top-1 as float64 {agree:.2%}, right {right:.2%}"
    )


def main() -> None:
    index = json.loads((GOLDEN / "index.json").read_text())
    models = [case["file"] for case in index if case["kind"] == "model"]
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "fp16", "int8"):
            errors = [golden_error(name, Path(folder), precision) for name in models]
            print(f"golden models, {precision}: {len(errors)}, worst relative error {max(errors):.2g}", flush=True)
        write_digits(Path(folder))
        for name in ("digits-linear", "digits-pure"):
            for options in (["fp32"], ["fp16"], ["int8"], ["int8", "calibrated"]):
                print(digits_errors(name, Path(folder), options), flush=True)

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
    with tempfile.TemporaryDirectory() as folder:
        photo, bundle = Path(folder) / "astronaut.png", Path(folder) / "bundle"
        Image.fromarray(skimage.data.astronaut()).save(photo)
        subprocess.run([*INFEXPORT, "convert", "checkpoint", ZOO / "digits-linear", "-o", bundle], check=True)
        label = [*INFEXPORT, "run-engine", bundle, photo, "--size", "224"]
        title = "cold start, from process to label, a photograph at 224²"
        report(title, lambda: subprocess.run(label, check=True, capture_output=True), 10, warmup=1)
    report("infexport --help", lambda: subprocess.run([*INFEXPORT, "--help"], check=True, capture_output=True), 10, 2)


if __name__ == "__main__":
    main()
