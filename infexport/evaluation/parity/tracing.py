"""Activations of a network while it runs: in PyTorch, in a bundle's graph, in its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from infexport.bundle import Bundle
from infexport.conversion.activations import activation_names, plain_name, tokens_names, with_outputs
from infexport.errors import InfexportError
from infexport.evaluation.pytorch_reference import TorchRunner
from infexport.images.preprocess import normalise
from infexport.images.strips import ArrayRows, Source
from infexport.inference.runners import StageRunner
from infexport.inference.runners.onnxruntime import open_memory_session
from infexport.inference.streaming import stream
from infexport.inference.streaming.driver import Tokens, select_stages
from infvit.stage_scope import StageScope


@dataclass(frozen=True)
class Trace:
    """Activations of one batch, of any dtype.

    Attributes:
        tokens: what every layer takes, `[B, N, E]`.
        states: of every layer, what its operators give, by the names of `infexport.conversion.activations`.
        features: `[B, E]`.
        logits: `[B, classes]`.
    """

    tokens: list[Tensor]
    states: list[dict[str, Tensor]]
    features: Tensor
    logits: Tensor


def trace_torch(runner: TorchRunner, images: NDArray[np.uint8]) -> Trace:
    """Trace the checkpoint in PyTorch, without states."""
    logits, features, *tokens = runner.observe(images)
    return Trace(tokens, [{} for _ in tokens], features, logits)


class GraphTracer:
    """Traces `model.onnx`, as it is, in ONNX Runtime.

    Args:
        bundle: whose graph it is.
        provider, threads: see `inference.runners.onnxruntime.open_memory_session`.

    Raises:
        InfexportError: a graph whose activations have no names, or one that cannot be loaded.
    """

    def __init__(self, bundle: Bundle, provider: str = "cpu", threads: int | None = None) -> None:
        if provider == "tensorrt-rtx":
            raise InfexportError(
                "--layers with --provider tensorrt-rtx",
                "it takes graphs from files, and the one with every layer's outputs is made in memory",
                "leave one of the two out",
            )
        self._bundle, self._depth = bundle, bundle.manifest.config.depth
        model = ir.load(bundle.model)
        names = activation_names(model.graph)
        if not {*tokens_names(self._depth)} <= {*names}:
            raise InfexportError(
                "the graph's activations have no names",
                "it was converted by an earlier infexport, or the names were removed",
                "convert the checkpoint again",
            )
        self._names = ["logits", "features", *names]
        proto = ir.to_proto(with_outputs(model, self._names))
        self._session = open_memory_session(proto.SerializeToString(), bundle.path, provider, threads)

    def __call__(self, images: NDArray[np.uint8]) -> Trace:
        manifest = self._bundle.manifest
        feed = images if manifest.input == "uint8" else normalise(images, manifest.preprocessing)
        try:
            values = self._session.run(self._names, {self._session.get_inputs()[0].name: feed})
        except Exception as error:  # ONNX Runtime raises its own kinds, which share no base but Exception
            size = f"{images.shape[1]}x{images.shape[2]}"
            hint = "what every layer takes is kept: judge smaller images, or leave out --layers"
            raise InfexportError(f"ONNX Runtime failed at {size}", str(error), hint) from error
        found = {plain_name(name): torch.from_numpy(x) for name, x in zip(self._names, values, strict=True)}
        states: list[dict[str, Tensor]] = [{} for _ in range(self._depth)]
        for name, value in found.items():
            if name.startswith("layers.") and not name.endswith(".tokens"):
                _, layer, state = name.split(".", 2)
                states[int(layer)][state] = value
        tokens = [found[name] for name in tokens_names(self._depth)]
        return Trace(tokens, states, found["features"], found["logits"])


SUMS = {"score": "score.", "row": "row.", "norm": "", "attend": ""}
"""Kind of stage → what the names of its sums begin with; energies are gathered by all others."""


@dataclass
class StageTracer:
    """Traces the stages of a bundle, whatever runs them, one image at a time."""

    bundle: Bundle
    runner: StageRunner
    chunk: int
    _tokens: list[Tensor] = field(default_factory=list)
    _states: list[dict[str, Tensor]] = field(default_factory=list)

    def __call__(self, images: NDArray[np.uint8]) -> Trace:
        traces = [self._one(image) for image in images]
        tokens = [torch.cat(parts) for parts in zip(*(trace.tokens for trace in traces), strict=True)]
        states = [
            {name: torch.cat([layer[name] for layer in layers]) for name in layers[0]}
            for layers in zip(*(trace.states for trace in traces), strict=True)
        ]
        features, logits = (torch.cat([getattr(t, name) for t in traces]) for name in ("features", "logits"))
        return Trace(tokens, states, features, logits)

    def _one(self, image: NDArray[np.uint8]) -> Trace:
        self._tokens, self._states = [], []
        source = Source(ArrayRows(image), self.bundle.manifest.config.patch_size, "pad")
        found = stream(self.bundle, self.runner, source, chunk=self.chunk, observe=self._observe)
        logits, features = (torch.from_numpy(x.copy())[None] for x in (found.logits, found.features))
        return Trace(self._tokens, self._states, features, logits)

    def _observe(self, stage: int, tokens: Tokens, sums: Mapping[str, NDArray[Any]]) -> None:
        here = select_stages(self.bundle.manifest.stages or (), centrality=False)[stage]
        if here.over is StageScope.ONCE:
            return  # the image goes on with it
        if "tokens" in here.outputs:
            rows = tokens.read(stage + 1, "tokens", 0, tokens.layout.rows.stop)
            self._tokens.append(torch.from_numpy(np.array(rows)))
            self._states.append({})
        begin = SUMS.get(Path(here.graph).stem.rpartition("-")[2], "energy.")
        for name, value in sums.items():
            self._states[-1][begin + name] = torch.from_numpy(value)
