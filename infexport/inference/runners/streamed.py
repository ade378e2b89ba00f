"""A bundle's stages as a runner of whole images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infexport.bundle import Bundle
from infexport.images.strips import ArrayRows, Source
from infexport.inference.runners.base import ImageRunner
from infexport.inference.runners.factory import RunnerFactory
from infexport.inference.streaming import CHUNK, stream


class StreamRunner(ImageRunner):
    """Streams the images of a batch through the stages, one after the other.

    Args:
        bundle: a bundle with stages.
        factory: opens the runner of the stages.

    Attributes:
        stages: runner of the stages.
        chunk: tokens at a time.
    """

    def __init__(self, bundle: Bundle, factory: RunnerFactory) -> None:
        self._bundle, self.stages = bundle, factory.stages()
        self.precision = self.stages.precision
        engines = factory.engines.get("stream")
        self.chunk = (engines and engines.chunk) or CHUNK

    def _open(self) -> None:
        self.stages.__enter__()
        self.provider, self.version = f"{self.stages.provider}, streamed", self.stages.version

    def _close(self) -> None:
        self.stages.__exit__(None, None, None)

    def _infer(self, value: NDArray[Any], shape: Sequence[int]) -> dict[str, NDArray[Any]]:
        patch = self._bundle.manifest.config.patch_size
        found = [
            stream(self._bundle, self.stages, Source(ArrayRows(image), patch, "pad"), chunk=self.chunk)
            for image in value
        ]
        return {"logits": np.stack([one.logits for one in found])}
