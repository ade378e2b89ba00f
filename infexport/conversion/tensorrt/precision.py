"""The graphs of an fp32 bundle in another precision, for an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from infexport.bundle import open_bundle
from infexport.system.progress import (
    ProgressListener,
)

if TYPE_CHECKING:
    from infexport.conversion.passes import ActivationStats


class Lowering:
    """Lowers graphs one after the other.

    Args:
        bundle: an fp32 bundle.
        precision: `fp32` and `tf32` leave graphs as they are; `fp16`, `bf16`, `int8`.
        images: files that fix the ranges of activations, for `int8`.
        scratch: folder for the lowered graphs, of which one is there at a time.
    """

    def __init__(self, bundle: str, precision: str, images: Sequence[str], scratch: str) -> None:
        self._bundle = open_bundle(Path(bundle))
        self._precision, self._scratch = precision, Path(scratch)
        self._images = [Path(image) for image in images]
        self._stats: dict[str, ActivationStats] | None = None

    def calibrate(self, listener: ProgressListener) -> None:
        """Run the images; `listener` receives an event for each.

        Raises:
            InfexportError: an image that cannot be read.
        """
        if not self._images:
            return
        from infexport.conversion.calibration import batches, calibrate

        manifest = self._bundle.manifest
        patch = manifest.config.patch_size
        images = batches(self._images, patch, manifest.preprocessing, manifest.input, listener)
        self._stats = calibrate(self._bundle.model, images)

    def graph(self, graph: Path) -> Path:
        """Return the file of a graph of the bundle in this precision."""
        if self._precision in ("fp32", "tf32"):
            return graph
        import onnx_ir as ir

        from infexport.conversion.passes import lower

        model = ir.load(graph)
        lower(model, self._precision, self._stats, tensorrt=True)
        lowered = self._scratch / "lowered.onnx"
        ir.save(model, lowered, external_data="lowered.data")
        return lowered
