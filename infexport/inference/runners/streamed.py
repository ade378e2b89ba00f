"""A bundle's stages in place of its whole graph, for what takes a runner of images."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from infexport.bundle import Bundle
from infexport.images.strips import ArrayRows, Source
from infexport.inference.runners.factory import RunnerFactory
from infexport.inference.streaming import CHUNK, stream


class StreamRunner:
    """Runs images through the stages, one after the other, as `ImageRunner` runs them at once.

    Attributes:
        stages: what runs the stages, once entered.
        chunk: tokens at a time.
    """

    def __init__(self, bundle: Bundle, opening: RunnerFactory) -> None:
        self._bundle, self.stages = bundle, opening.stages()
        engines = opening.engines.get("stream")
        self.chunk = (engines and engines.chunk) or CHUNK

    def __enter__(self) -> Self:
        self.stages.__enter__()
        self.provider, self.version = f"{self.stages.provider}, streamed", self.stages.version
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stages.__exit__(kind, error, trace)

    def takes(self, shape: Sequence[int]) -> bool:
        return True

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        patch = self._bundle.manifest.config.patch_size
        found = [
            stream(self._bundle, self.stages, Source(ArrayRows(image), patch, "pad"), chunk=self.chunk)
            for image in images
        ]
        return {"logits": np.stack([one.logits for one in found])}
