"""Bundle and checkpoint → verdict: does what is deployed compute what PyTorch does?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from infexport.bundle import Bundle, sha256
from infexport.errors import InfexportError
from infexport.images import read_image
from infexport.parity import Comparison, Tolerance, compare, tolerance_for
from infexport.runners import Deployed
from infexport.runners.opening import Opening
from infexport.runners.torch import TorchRunner
from infexport.stream import CHUNK
from infexport.stream import stream as run_streamed
from infexport.stream.source import ArrayRows, Source
from infexport.transform import check_whole_patches, fit, transform_of
from infvit.checkpoint import Checkpoint, load_checkpoint
from infvit.errors import CheckpointError


@dataclass(frozen=True)
class Case:
    """One input, judged: the bundle and PyTorch's float32, each against float64.

    Attributes:
        name: the size, or the image's file.
        shape: of the images, `[B, H, W, 3]`.
        bundle: the bundle, or its engine; what the verdict is made of.
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
    """The verdict: true where every case is within tolerance and every image could be read.

    Attributes:
        bundle, checkpoint: what was compared.
        verified: the bundle's hashes were right.
        ran: what ran the bundle, in words.
        tolerance: what the cases were judged by.
        cases: sizes, then images, in the order given.
        failed: images that could not be compared, and why.
    """

    bundle: Path
    checkpoint: Path
    verified: bool
    ran: str
    tolerance: Tolerance
    cases: tuple[Case, ...]
    failed: tuple[tuple[Path, InfexportError], ...]

    def __bool__(self) -> bool:
        return not self.failed and all(case.bundle for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle),
            "checkpoint": str(self.checkpoint),
            "passed": bool(self),
            "verified": self.verified,
            "ran": self.ran,
            "tolerance": {
                "relative": self.tolerance.relative,
                "precision": self.tolerance.precision,
                "factor": self.tolerance.factor,
                "epsilon": self.tolerance.epsilon,
                "depth": self.tolerance.depth,
            },
            "cases": [case.to_dict() for case in self.cases],
            "failed": [{"file": str(path), **error.to_dict()} for path, error in self.failed],
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
    """A checkpoint read with what the bundle's manifest says and no other config: only its weights are judged.

    Raises:
        InfexportError: it cannot be read, or it is another network's.
    """
    config = bundle.manifest.config
    untold = ("variant", "num_heads", "norm_eps", "neumann_terms", "rho_per_head")  # by the tensors' shapes
    told = {name: config[name] for name in untold if name in config} | {"rho": bundle.manifest.rho}
    try:
        checkpoint = load_checkpoint(path, config=told)
    except CheckpointError as error:
        raise InfexportError(error.summary, error.details, error.hint) from error
    theirs = checkpoint.config.to_dict()
    differing = [name for name in theirs if theirs[name] != config.get(name)]
    if differing:
        raise InfexportError(
            f"the checkpoint is of another network: {path}",
            "\n".join(f"{name}: checkpoint {theirs[name]}, bundle {config.get(name)}" for name in differing),
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


def _synthetic_batch(height: int, width: int) -> NDArray[np.uint8]:
    """Three different images of one size."""
    image = synthetic_image(height, width)
    return np.stack([image, image[::-1], 255 - image])


class StreamRunner:
    """Runs images through the stages of a bundle, one after the other, as `Deployed` runs them at once."""

    def __init__(self, bundle: Bundle, opening: Opening) -> None:
        self._bundle, self._stages = bundle, opening.stages()
        engines = opening.engines.get("stream")
        self._chunk = (engines and engines.chunk) or CHUNK

    def __enter__(self) -> Self:
        self._stages.__enter__()
        self.provider, self.version = f"{self._stages.provider}, streamed", self._stages.version
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stages.__exit__(kind, error, trace)

    def takes(self, shape: Sequence[int]) -> bool:
        return True

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        patch = self._bundle.manifest.config["patch_size"]
        found = [
            run_streamed(self._bundle, self._stages, Source(ArrayRows(image), patch, "pad"), chunk=self._chunk)
            for image in images
        ]
        return {"logits": np.stack([one.logits for one in found])}


def _logits(runner: Deployed | StreamRunner, batch: NDArray[np.uint8]) -> NDArray[Any]:
    """Of a batch; image by image where the runner does not take so many at once."""
    parts = [batch] if runner.takes(batch.shape) else [batch[i : i + 1] for i in range(len(batch))]
    return np.concatenate([runner.run(part)["logits"] for part in parts])


def validate(
    bundle: Bundle,
    checkpoint_path: Path,
    sizes: list[tuple[int, int]],
    images: list[Path],
    opening: Opening | None = None,
    stream: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Run the bundle, PyTorch and its float64 twin on the same inputs and judge.

    Args:
        bundle: opened, verified or not.
        checkpoint_path: what it must agree with.
        sizes: `(height, width)` of synthetic images, multiples of the patch, three at a time.
        images: files, each at its own resolution, completed to whole patches. One that cannot be read is reported.
        opening: of the bundle, what is judged; None judges it in ONNX Runtime on the CPU.
        stream: judge its stages, chunk by chunk.
        progress: told of every case that is done, with 1.

    Raises:
        InfexportError: a checkpoint that cannot be read, or a size that is no multiple of the patch.
    """
    patch = bundle.manifest.config["patch_size"]
    for height, width in sizes:
        check_whole_patches(height, width, patch)
    checkpoint = load_recorded(checkpoint_path, bundle)
    opening = opening or Opening(bundle, "cpu")
    tolerance = tolerance_for(opening.precision, bundle.manifest.config["depth"])
    mean, std = bundle.manifest.preprocessing["mean"], bundle.manifest.preprocessing["std"]
    truth_runner = TorchRunner(checkpoint, mean, std, torch.float64)
    torch_runner = TorchRunner(checkpoint, mean, std, torch.float32)
    bundle_runner = StreamRunner(bundle, opening) if stream else opening.runner()
    cases: list[Case] = []
    failed: list[tuple[Path, InfexportError]] = []
    with truth_runner, torch_runner, bundle_runner:

        def judge(name: str, batch: NDArray[np.uint8]) -> None:
            exported = _logits(bundle_runner, batch)
            truth, eager = (runner.run(batch)["logits"] for runner in (truth_runner, torch_runner))
            cases.append(Case(name, batch.shape, compare(exported, truth, tolerance), compare(eager, truth, tolerance)))

        for height, width in sizes:
            name = f"{height}x{width}"
            try:
                judge(name, _synthetic_batch(height, width))
            except InfexportError as error:
                failed.append((Path(name), error))
            progress(1)
        for path in images:
            try:
                fitted = fit(read_image(path), patch, "native", transform_of(bundle.manifest.preprocessing), "pad")
                judge(str(path), fitted.pixels[None])
            except InfexportError as error:
                failed.append((path, error))
            progress(1)
        ran = f"{bundle_runner.provider}, {bundle_runner.version}"
    return Report(bundle.path, checkpoint_path, bundle.verified, ran, tolerance, tuple(cases), tuple(failed))
