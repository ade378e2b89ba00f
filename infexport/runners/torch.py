"""The checkpoint in PyTorch: what a bundle must agree with."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from infexport.errors import InfexportError
from infexport.image_model import ImageModel
from infvit.checkpoint import Checkpoint, build_network


class TorchRunner:
    """Runs a checkpoint's network on the CPU.

    Args:
        checkpoint: as `infvit.checkpoint.load_checkpoint` returns it.
        mean, std: of the pixels in [0, 1], as the bundle records them.
        dtype: float32, or float64 for the twin that counts as the truth.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype,
    ) -> None:
        self.checkpoint = checkpoint
        self.mean, self.std = mean, std
        self.dtype = dtype
        self._model: ImageModel | None = None

    def __enter__(self) -> Self:
        network = build_network(self.checkpoint).to(self.dtype)
        self._model = ImageModel(network, self.mean, self.std).eval()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model = None

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        assert self._model is not None, "enter the runner before running it"
        try:
            with torch.inference_mode():
                logits, features = self._model(torch.from_numpy(images))
        except RuntimeError as error:
            if "alloc" not in str(error):
                raise
            shape = "x".join(map(str, images.shape[1:3]))
            raise InfexportError(
                f"not enough memory for PyTorch at {shape}", str(error).splitlines()[0], "give smaller --sizes"
            ) from error
        return {"logits": logits.numpy(), "features": features.numpy()}
