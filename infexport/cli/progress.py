"""A run as a person sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from infexport.bundle import Bundle
from infexport.cli.console import Output, Sweeps
from infexport.inference.executor import Listener
from infexport.inference.prediction import Prediction
from infexport.inference.runners.onnxruntime import remarks
from infexport.inference.streaming.driver import stages_of


class Told(Listener):
    """Tells stderr of a run.

    Args:
        out: whose stderr.
        bundle: that is run.
        bar: of the images, with an `update(n)`.
        centrality: of tokens is asked for.
        sinks: each is given every answer, and the index of its image.
    """

    def __init__(
        self,
        out: Output,
        bundle: Bundle,
        bar: Any,
        centrality: bool = False,
        sinks: Sequence[Callable[[int, Prediction], None]] = (),
    ) -> None:
        self._out, self._bar, self._sinks = out, bar, sinks
        stages = stages_of(bundle.manifest.stages or (), centrality)
        self._sweeps = Sweeps(out, [stage.graph.removesuffix(".onnx").rpartition("-")[2] for stage in stages])
        self._remarked: set[str] = set()

    def image(self, done: int) -> None:
        self._bar.update(done)

    def answer(self, index: int, answer: Prediction) -> None:
        for sink in self._sinks:
            sink(index, answer)

    def status(self, message: str) -> None:
        self._out.status(message)

    def running(self, provider: str, precision: str) -> None:
        self._out.status(f"running on {provider} with {precision}")
        for line in set(remarks(precision, provider)) - self._remarked:
            self._remarked.add(line)
            self._out.warning(line)

    def sweep(self, file: str, stage: int, done: int, total: int) -> None:
        self._sweeps(file, stage, done, total)
