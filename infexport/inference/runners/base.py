"""Base classes of everything that runs a bundle's graphs, or the checkpoint that they were exported from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from infexport.bundle.manifest import CENTRALITY_MODEL, Manifest, Stage
from infexport.images.preprocess import normalise
from infexport.inference.runners.output_checks import check_answer, check_centrality
from infvit.stage_scope import StageScope

Placement = dict[str, Counter[str]]
"""Execution provider → operator → number of nodes."""


class _Runner(ABC):
    """A context manager that leaves the device alone until it is entered."""

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    @abstractmethod
    def _open(self) -> None:
        """Load what has to be loaded before the first run."""

    @abstractmethod
    def _close(self) -> None:
        """Release everything that was loaded."""


class ImageRunner(_Runner):
    """Runs whole images. Subclasses open, infer and close; this class prepares inputs and checks outputs.

    Attributes:
        provider: name of what runs the images; final once the runner is entered.
        precision: of the per-token layers.
        version: name and version of the library that runs them.
        manifest: of the bundle, whose `input` decides the preparation; None passes uint8 images on unchanged.
        checked_graph: name of the graph file whose outputs are checked against the manifest; None checks nothing.
    """

    provider: str
    precision: str
    version: str
    manifest: Manifest | None = None
    checked_graph: str | None = None

    @property
    def placement(self) -> Placement:
        """Placement of the nodes, once the runner is entered; empty where that is not known."""
        return {}

    def takes(self, shape: Sequence[int]) -> bool:
        """Tell whether images of a shape `[B, H, W, 3]` can be run at all."""
        return True

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Return the outputs for a batch of images.

        Args:
            images: RGB, uint8 `[B, H, W, 3]`; H and W are multiples of the patch.

        Returns:
            `logits [B, classes]` and, except for streamed images, `features [B, E]`.

        Raises:
            InfexportError: the run fails, or the outputs are not those that the manifest describes.
        """
        value: NDArray[Any] = images
        if self.manifest is not None and self.manifest.input == "float32":
            value = normalise(images, self.manifest.preprocessing)
        found = self._infer(value, images.shape)
        if self.manifest is not None and self.checked_graph is not None:
            check_answer(self.checked_graph, found, self.manifest.config, len(images))
            if self.checked_graph == CENTRALITY_MODEL:
                check_centrality(self.checked_graph, found, self.manifest.config, images.shape)
        return found

    @abstractmethod
    def _infer(self, value: NDArray[Any], shape: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Run a prepared input.

        Args:
            value: the images, uint8 `[B, H, W, 3]`, or their normalised pixels, float32 `[B, 3, H, W]`.
            shape: `[B, H, W, 3]` in either case.
        """


class StageRunner(_Runner):
    """Runs the stages of a bundle. Subclasses load, infer and close; this class prepares inputs and checks outputs.

    Attributes:
        provider, precision, version: see `ImageRunner`.
        identity: everything besides the bundle that decides the last bit of an answer.
        max_rows: most rows of patches in a strip of the image; None for any number.
        manifest: of the bundle.
        checks_outputs: logits and features are checked against the manifest.
    """

    provider: str
    precision: str
    version: str
    identity: dict[str, str]
    max_rows: int | None = None
    manifest: Manifest
    checks_outputs: bool = False

    def run(self, stage: Stage, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return a stage's outputs by name.

        Args:
            stage: a stage of the bundle.
            feeds: its inputs by name.

        Raises:
            InfexportError: the stage cannot be loaded, fails, or its outputs are not those that the manifest describes.
        """
        self._load(stage)  # first: on a CPU it frees the stage before
        values = dict(feeds)
        if stage.over is StageScope.IMAGE and self.manifest.input == "float32":
            values["image"] = normalise(values["image"], self.manifest.preprocessing)
        found = self._infer(stage, values)
        if self.checks_outputs and "logits" in found:
            check_answer(Path(stage.graph).name, found, self.manifest.config, 1)
        return found

    @abstractmethod
    def _load(self, stage: Stage) -> None:
        """Load a stage, unless it is loaded."""

    @abstractmethod
    def _infer(self, stage: Stage, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run a loaded stage on prepared inputs."""


def spread(placement: Placement) -> str:
    """Describe in one line where the nodes run; empty where they all run in one place."""
    counts = [f"{counter.total()} nodes on {place}" for place, counter in placement.items()]
    return ", ".join(counts) if len(counts) > 1 else ""
