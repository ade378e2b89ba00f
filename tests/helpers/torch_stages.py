"""A small network's stages in PyTorch behind the driver: a bundle to stream through without converting one."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import torch

from infexport.bundle.manifest import Stage
from infvit.config import InfViTConfig
from infvit.fold import fold, fold_normalisation
from infvit.network import InfViT
from infvit.stages import make_stages

CONFIG = InfViTConfig(
    variant="linear_infsa", image_size=24, patch_size=8, depth=2, embed_dim=16, num_heads=2, mlp_dim=24, num_classes=5,
    norm_eps=1e-6,
)  # fmt: skip


class TorchStages:
    """Runs the modules themselves."""

    def __init__(self, network):
        self.precision, self.max_rows = "fp32", None
        self.modules = make_stages(network, torch.nn.Identity())
        self.stages = [
            Stage(str(i), m.over, list(m.inputs), list(m.outputs), m.optional) for i, m in enumerate(self.modules)
        ]

    def run(self, stage, feeds):
        module = self.modules[int(stage.graph)]
        with torch.no_grad():
            values = module(*(torch.from_numpy(np.ascontiguousarray(feeds[name])).float() for name in stage.inputs))
        return {name: value.numpy() for name, value in zip(stage.outputs, values, strict=True)}


def folded_network(seed, **shape):
    torch.manual_seed(seed)
    network = InfViT(dataclasses.replace(CONFIG, **shape)).eval()
    return network, fold_normalisation(fold(network), (0.5, 0.4, 0.6), (0.2, 0.3, 0.25))


def torch_bundle(**shape):
    """A bundle as far as `stream` takes it, and its runner."""
    network, folded = folded_network(0, **shape)
    runner = TorchStages(folded)
    return SimpleNamespace(manifest=SimpleNamespace(stages=runner.stages, config=network.config)), runner


class Killed(BaseException):
    """Not an error: what a signal or a power cut is to the code."""


class Counting:
    """Stages that are ended by `raises` in the `last`-th call, before or after it was computed."""

    def __init__(self, runner, last=None, after=False, raises=Killed):
        self.runner, self.last, self.after, self.raises, self.calls = runner, last, after, raises, 0
        self.precision, self.max_rows = runner.precision, runner.max_rows

    def run(self, stage, feeds):
        self.calls += 1
        if self.calls == self.last and not self.after:
            raise self.raises
        outputs = self.runner.run(stage, feeds)
        if self.calls == self.last:
            raise self.raises
        return outputs
