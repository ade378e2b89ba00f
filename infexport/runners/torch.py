"""The checkpoint in PyTorch: what a bundle must agree with."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from infexport.image_model import ImageModel
from infvit.checkpoint import Checkpoint, build_network


class TorchRunner:
    """Runs a checkpoint's network on the CPU.

    Args:
        checkpoint: as `infvit.checkpoint.load_checkpoint` returns it.
        neumann_terms: T, as the bundle was converted with.
        mean, std: as the bundle records them.
        dtype: float32, or float64 for the twin that counts as the truth.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        neumann_terms: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        dtype: torch.dtype,
    ) -> None:
        self.checkpoint = checkpoint
        self.neumann_terms = neumann_terms
        self.mean, self.std = mean, std
        self.dtype = dtype
        self.name = f"torch {str(dtype).removeprefix('torch.')}"
        self._model: ImageModel | None = None

    def __enter__(self) -> Self:
        network = build_network(self.checkpoint).to(self.dtype)
        network.set_neumann_terms(self.neumann_terms)
        self._model = ImageModel(network, self.mean, self.std).eval()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model = None

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        assert self._model is not None, "enter the runner before running it"
        with torch.inference_mode():
            logits, features = self._model(torch.from_numpy(images))
        return {"logits": logits.numpy(), "features": features.numpy()}
