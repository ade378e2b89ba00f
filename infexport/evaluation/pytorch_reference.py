"""The checkpoint in PyTorch: what a bundle must agree with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infexport.conversion.image_model import ImageModel
from infexport.errors import InfexportError
from infexport.inference.runners import ImageRunner
from infvit.checkpoint import Checkpoint, build_network


class TorchRunner(ImageRunner):
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
        self.provider, self.precision = "PyTorch", "fp64" if dtype == torch.float64 else "fp32"
        threads = torch.get_num_threads()
        self.version = f"torch {torch.__version__}, {threads} thread{'s' if threads > 1 else ''}"
        self._model: ImageModel | None = None

    def _open(self) -> None:
        network = build_network(self.checkpoint).to(self.dtype)
        self._model = ImageModel(network, self.mean, self.std).eval()

    def _close(self) -> None:
        self._model = None

    @property
    def model(self) -> ImageModel:
        """The network, once entered."""
        assert self._model is not None, "enter the runner before running it"
        return self._model

    def _infer(self, value: NDArray[Any], shape: Sequence[int]) -> dict[str, NDArray[Any]]:
        logits, features = self._forward(value)
        return {"logits": logits.numpy(), "features": features.numpy()}

    def observe(self, images: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        """Logits, features, and what every layer takes, `[B, N, E]`."""
        with self.model.observing():
            return self._forward(images)

    def _forward(self, images: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        with torch.no_grad(), enough_memory(images.shape):
            found: tuple[Tensor, ...] = self.model(torch.from_numpy(images))
            return found


@contextmanager
def enough_memory(shape: Sequence[int]) -> Iterator[None]:
    """Raise PyTorch's error of too little memory for images `[B, H, W, 3]` as ours."""
    try:
        yield
    except RuntimeError as error:
        if "alloc" not in str(error):
            raise
        raise InfexportError(
            f"not enough memory for PyTorch at {shape[1]}x{shape[2]}",
            str(error).splitlines()[0],
            "smaller images or batches need less memory",
        ) from error
