"""A checkpoint in PyTorch in place of a bundle's graph."""

from __future__ import annotations

from pathlib import Path

import torch

from infexport.bundle import Bundle
from infexport.evaluation.pytorch_reference import TorchRunner
from infexport.evaluation.recorded_checkpoint import load_recorded
from infexport.inference.runners import ImageRunner
from infexport.inference.runners.factory import RunnerFactory


class CheckpointRunnerFactory(RunnerFactory):
    """Opens a checkpoint's network in PyTorch's float32 in place of a bundle's graph.

    Args:
        bundle: whose preprocessing it is given.
        path: of the checkpoint.

    Raises:
        InfexportError: it cannot be read, or it is another network's.
    """

    seeks_gpu = False

    def __init__(self, bundle: Bundle, path: Path) -> None:
        super().__init__(bundle, "cpu")
        preprocessing = bundle.manifest.preprocessing
        self.path = path
        self._network = TorchRunner(load_recorded(path, bundle), preprocessing.mean, preprocessing.std, torch.float32)

    def runner(self, placed: bool = False) -> ImageRunner:
        return self._network
