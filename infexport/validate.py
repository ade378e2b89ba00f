"""Bundle and checkpoint → verdict: does ONNX Runtime compute what PyTorch does?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infexport.bundle import Bundle, sha256
from infexport.errors import InfexportError
from infexport.images import fit, read_image
from infexport.parity import Comparison, Tolerance, compare, tolerance_for
from infexport.preprocessing import transform_of
from infexport.runners import Runner
from infexport.runners.ort import OrtRunner
from infexport.runners.torch import TorchRunner
from infvit.checkpoint import Checkpoint, load_checkpoint
from infvit.errors import CheckpointError


@dataclass(frozen=True)
class Case:
    """One input, judged: the bundle and PyTorch's float32, each against float64.

    Attributes:
        name: the size, or the image's file.
        shape: of the images, `[B, H, W, 3]`.
        bundle: the bundle in ONNX Runtime; what the verdict is made of.
        torch: PyTorch in float32, for comparison: its own rounding is no better.
    """

    name: str
    shape: tuple[int, ...]
    bundle: Comparison
    torch: Comparison

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "bundle": self.bundle.to_dict(),
            "torch_float32": self.torch.to_dict(),
        }


@dataclass(frozen=True)
class Report:
    """All cases, the tolerance they were judged by, and whether the bundle's hashes were right."""

    bundle: Path
    checkpoint: Path
    verified: bool
    tolerance: Tolerance
    cases: tuple[Case, ...]

    def __bool__(self) -> bool:
        return all(case.bundle for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle),
            "checkpoint": str(self.checkpoint),
            "passed": bool(self),
            "verified": self.verified,
            "tolerance": {
                "relative": self.tolerance.relative,
                "dtype": self.tolerance.dtype,
                "epsilon": self.tolerance.epsilon,
                "depth": self.tolerance.depth,
            },
            "cases": [case.to_dict() for case in self.cases],
        }


def recorded_checkpoint(bundle: Bundle) -> Path:
    """The checkpoint a bundle was converted from, if it still is what it was.

    Raises:
        InfexportError: it is gone, or it changed.
    """
    record = bundle.manifest.checkpoint
    path = Path(record["path"])
    hint = "name the checkpoint to judge by: --checkpoint CKPT"
    if not path.exists():
        raise InfexportError("the recorded checkpoint is gone", f"expected it at {path}", hint)
    for name, digest in record["files"].items():
        file = path / name if path.is_dir() else path.parent / name
        if not file.is_file() or sha256(file) != digest:
            raise InfexportError("the recorded checkpoint has changed", f"another content than converted: {file}", hint)
    return path


def load_recorded(path: Path, bundle: Bundle) -> Checkpoint:
    """A checkpoint read the way the bundle's was: same variant, heads, epsilon and discount.

    Raises:
        InfexportError: it cannot be read, or it is another network's.
    """
    manifest = bundle.manifest
    config = manifest.config
    try:
        checkpoint = load_checkpoint(
            path,
            variant=config["variant"],
            num_heads=config["num_heads"],
            norm_eps=config["norm_eps"],
            rho=manifest.rho,
            neumann_terms=config["neumann_terms"],
        )
    except CheckpointError as error:
        raise InfexportError(error.summary, error.details, error.hint) from error
    theirs = checkpoint.config.to_dict()
    differing = [name for name in config if theirs[name] != config[name]]
    if differing:
        raise InfexportError(
            f"the checkpoint is of another network: {path}",
            "\n".join(f"{name}: checkpoint {theirs[name]}, bundle {config[name]}" for name in differing),
            "name the checkpoint the bundle was converted from, or one of the same shape",
        )
    return checkpoint


def synthetic_image(height: int, width: int) -> NDArray[np.uint8]:
    """An image with structure at every scale, the same every time: sums of random cosines, and noise."""
    random = np.random.default_rng(height * 65_537 + width)
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    image = random.normal(0, 12, (height, width, 3))
    for octave in range(6):
        frequency = random.normal(0, 2.0**octave, (2, 3))
        phase = random.uniform(0, 2 * np.pi, 3)
        image += 60 / (octave + 1) * np.cos(2 * np.pi * (frequency[0] * y + frequency[1] * x) + phase)
    return np.clip(image + 128, 0, 255).astype(np.uint8)


def default_sizes(bundle: Bundle) -> list[tuple[int, int]]:
    """The trained size, a smaller non-square one and a larger one: `(height, width)`."""
    size, patch = bundle.manifest.config["image_size"], bundle.manifest.config["patch_size"]
    half = max(patch, size // 2 // patch * patch)
    return [(size, size), (half, size + patch), (2 * size, 2 * size)]


def _inputs(
    bundle: Bundle, sizes: list[tuple[int, int]], images: list[Path], batch: int
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    patch = bundle.manifest.config["patch_size"]
    transform = transform_of(bundle.manifest)
    for height, width in sizes:
        image = synthetic_image(height, width)
        # other images of the same size: the first one mirrored and inverted
        batched = np.stack([image, image[::-1], 255 - image][:batch])
        yield f"{height}x{width}", np.ascontiguousarray(batched)
    for path in images:
        fitted = fit(read_image(path), patch, "native", transform, "pad")
        yield str(path), fitted.pixels[None]


def validate(
    bundle: Bundle,
    checkpoint_path: Path,
    sizes: list[tuple[int, int]],
    images: list[Path],
    threads: int | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Report:
    """Run the bundle, PyTorch and its float64 twin on the same inputs and judge.

    Args:
        bundle: opened, verified or not.
        checkpoint_path: what it must agree with.
        sizes: `(height, width)` of synthetic images, multiples of the patch, three at a time.
        images: files, each at its own resolution, completed to whole patches.
        threads: of ONNX Runtime.
        progress: told of every case before it runs.

    Raises:
        InfexportError: a checkpoint or an image that cannot be read, a size that is no multiple of the patch.
    """
    manifest = bundle.manifest
    patch = manifest.config["patch_size"]
    for height, width in sizes:
        if height % patch or width % patch:
            raise InfexportError(
                f"size {height}x{width} is not a whole number of patches",
                f"the patch is {patch} pixels",
                f"for example --sizes {max(1, round(height / patch)) * patch}x{max(1, round(width / patch)) * patch}",
            )
    checkpoint = load_recorded(checkpoint_path, bundle)
    tolerance = tolerance_for("float32", manifest.config["depth"])
    mean, std = tuple(manifest.preprocessing["mean"]), tuple(manifest.preprocessing["std"])
    terms = manifest.config["neumann_terms"]
    cases = []
    truth_runner = TorchRunner(checkpoint, terms, mean, std, torch.float64)
    torch_runner = TorchRunner(checkpoint, terms, mean, std, torch.float32)
    bundle_runner = OrtRunner(bundle, "cpu", threads)
    with truth_runner, torch_runner, bundle_runner:
        for name, batch in _inputs(bundle, sizes, images, batch=3):
            progress(name)
            runners: tuple[Runner, ...] = (truth_runner, torch_runner, bundle_runner)
            truth, eager, exported = (runner.run(batch)["logits"] for runner in runners)
            cases.append(Case(name, batch.shape, compare(exported, truth, tolerance), compare(eager, truth, tolerance)))
    return Report(bundle.path, checkpoint_path, bundle.verified, tolerance, tuple(cases))
