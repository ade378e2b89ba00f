"""Listeners that show progress on stderr."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infexport.bundle import Bundle
from infexport.cli.console import Output, Phases, TokenPasses
from infexport.inference.prediction import Answered, Prediction
from infexport.inference.runners.onnxruntime import remarks
from infexport.inference.streaming.driver import select_stages
from infexport.system.progress import (
    ItemsDone,
    PhaseProgress,
    ProgressEvent,
    ProgressListener,
    SessionOpened,
    StageProgress,
    Status,
)


class ConsoleProgress(ProgressListener):
    """Shows progress on stderr.

    Args:
        out: output whose stderr is used.
        bar: bar of the items, with an `update(n)`; None for no bar.
        bundle: the bundle that is run; None if no image is run.
        centrality: the run also computes the centrality of tokens.
        on_prediction: called with the index of an image and its prediction.
    """

    def __init__(
        self,
        out: Output,
        bar: Any = None,
        bundle: Bundle | None = None,
        centrality: bool = False,
        on_prediction: Callable[[int, Prediction], None] | None = None,
    ) -> None:
        self._out, self._bar, self._on_prediction = out, bar, on_prediction
        stages = select_stages((bundle and bundle.manifest.stages) or (), centrality)
        self._passes = TokenPasses(out, [stage.graph.removesuffix(".onnx").rpartition("-")[2] for stage in stages])
        self._remarked: set[str] = set()

    def on_event(self, event: ProgressEvent) -> None:
        match event:
            case Status(message):
                self._out.status(message)
            case ItemsDone(count):
                self._bar.update(count)
            case Answered(index, prediction):
                if self._on_prediction is not None:
                    self._on_prediction(index, prediction)
            case SessionOpened(provider, precision):
                self._out.status(f"running on {provider} with {precision}")
                for line in set(remarks(precision, provider)) - self._remarked:
                    self._remarked.add(line)
                    self._out.warning(line)
            case StageProgress(file, stage, done, total):
                self._passes(file, stage, done, total)


class BuildProgress(ProgressListener):
    """Shows the phases of a build on stderr.

    Args:
        out: output whose stderr is used.
    """

    def __init__(self, out: Output) -> None:
        self._out, self._phases = out, Phases()

    def on_event(self, event: ProgressEvent) -> None:
        match event:
            case Status(message):
                self.clear()
                self._out.status(message)
            case PhaseProgress(name, done, total):
                self._phases(name, done, total)

    def clear(self) -> None:
        """Clear the line, so that another can be written."""
        self._phases.clear()
