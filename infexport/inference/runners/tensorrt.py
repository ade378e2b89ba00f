"""Runners of a bundle's engines on a GPU, through Polygraphy."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infexport.bundle import ENGINES, Bundle
from infexport.bundle.engine_record import Engine
from infexport.bundle.manifest import MODEL, Stage
from infexport.errors import InfexportError
from infexport.inference.engine_selection import EngineSet, Kind, build_command
from infexport.inference.runners.base import ImageRunner, Placement, StageRunner
from infexport.inference.tensorrt_libraries import BACKENDS, errors_in, library_log
from infexport.system.dependencies import require

STRIP_ROWS = 8
"""Most rows of patches in a strip: the image stage's memory grows with its largest rows and columns."""
Arrays = dict[str, NDArray[Any]]


class EngineSession:
    """One engine, loaded on the GPU. Threads take turns: it has one set of buffers.

    Args:
        bundle: folder of the bundle.
        engine: an engine that is current.
        stages: the bundle has stages, for which engines can be built.

    Raises:
        InfexportError: the library is missing or refuses the engine, or the GPU has no room for it.
    """

    def __init__(self, bundle: Path, engine: Engine, stages: bool = True) -> None:
        self._bundle, self._file, self._record, self._stages = bundle, engine.file, engine.recorded, stages
        record = engine.recorded
        self._lock = threading.Lock()
        require("polygraphy", extra=record.backend)
        backend = BACKENDS[record.backend]
        trt = backend.load()
        log = library_log(trt)
        log.take()
        with ExitStack() as stack:
            try:
                from polygraphy.backend.trt import TrtRunner
                from polygraphy.logger import G_LOGGER

                G_LOGGER.module_severity, G_LOGGER.colors = G_LOGGER.CRITICAL, False  # it prints to stdout
                # the loaded engine keeps the log it was loaded with
                content = (bundle / ENGINES / engine.file).read_bytes()
                loaded = trt.Runtime(log).deserialize_cuda_engine(content)
                context = loaded and backend.context(loaded, record.sha256, stack)
                if not context:
                    raise self._refused("\n".join(errors_in(log.take())) or "it does not say why")
                self._runner = TrtRunner(context)
                self._runner.activate()
                stack.callback(self._runner.deactivate)
            except (InfexportError, OSError):
                raise
            except Exception as error:  # Polygraphy's own, the library's, or ctypes'
                raise self._refused("\n".join([*errors_in(log.take()), str(error)])) from error
            self._stack = stack.pop_all()

    def _refused(self, details: str) -> InfexportError:
        return InfexportError(
            f"{self._record.backend} refuses the engine {self._file}, or the GPU has no room for it",
            details,
            f"build it again here: {self._build()}",
        )

    def _build(self) -> str:
        """Return the command that builds the engine for this GPU."""
        kind: Kind = "whole" if self._record.chunk is None else "stream"
        return build_command(self._bundle, self._record.precision, kind)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Return the engine's outputs by name.

        Raises:
            InfexportError: shapes outside the engine's profile, or a GPU that fails.
        """
        self._check(feeds)
        try:
            with self._lock:
                found = self._runner.infer({name: np.ascontiguousarray(value) for name, value in feeds.items()})
                return {name: np.array(value) for name, value in found.items()}  # its buffers are used again
        except Exception as error:  # Polygraphy's own, the library's, or ctypes'
            raise InfexportError(
                f"the GPU failed in {self._file}", str(error), "smaller images or batches need less memory"
            ) from error

    def _check(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        for name, shapes in self._record.profile.items():
            shape = list(feeds[name].shape) if name in feeds else []
            if not shapes.holds(shape):
                raise InfexportError(
                    f"{name} {shape} is outside what {self._file} was built for",
                    f"expected {shapes.min} to {shapes.max}",
                    self._remedy(name, shape),
                )

    def _remedy(self, name: str, shape: Sequence[int]) -> str:
        """Suggest options, or an engine to build, for an input of this shape."""
        shapes, chunk = self._record.profile[name], self._record.chunk
        if len(shape) != len(shapes.min):
            return f"build it again here: {self._build()}"
        if chunk is not None:
            return f"its stages take at most {chunk} tokens at a time: --chunk {chunk}"
        first = 1 if name == "image" else 2  # of height and width
        batches, heights, widths = ([each[axis] for each in (*shapes, shape)] for axis in (0, first, first + 1))
        sizes = zip(_reaching(heights), _reaching(widths), strict=True)
        options = "--sizes " + ",".join(f"{height}x{width}" for height, width in sizes)
        options += " --batch " + ",".join(map(str, _reaching(batches)))
        if self._stages:
            stream = build_command(self._bundle, self._record.precision, "stream")
            return f"{self._build()} {options}; or for images of any size: {stream}"
        return f"{self._build()} {options}"

    def close(self) -> None:
        self._stack.close()


def _reaching(numbers: Sequence[int]) -> list[int]:
    """Return min, opt and max, extended to include a fourth number."""
    low, best, high, wanted = numbers
    return [min(low, wanted), best, max(high, wanted)]


class EngineRunner(ImageRunner):
    """Runs the engine of a bundle's whole graph.

    Args:
        bundle: what to run.
        engines: a set that runs the whole graph.
    """

    def __init__(self, bundle: Bundle, engines: EngineSet) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self.provider, self.precision = f"engine {engines.name}", engines.precision
        self._engine = engines.engines[MODEL]
        self.version = engines.first.library
        self._session: EngineSession | None = None

    @property
    def placement(self) -> Placement:
        """Layers of the engine by their type."""
        layers = self._engine.recorded.layers
        return {self.provider: Counter({kind: sum(types.values()) for kind, types in layers.items()})}

    def takes(self, shape: Sequence[int]) -> bool:
        ((name, shapes),) = self._engine.recorded.profile.items()
        batch, height, width, channels = shape
        return shapes.holds([batch, height, width, channels] if name == "image" else [batch, channels, height, width])

    def _open(self) -> None:
        self._session = EngineSession(self.bundle.path, self._engine, self.bundle.manifest.stages is not None)

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session = None

    def _infer(self, value: NDArray[Any], shape: Sequence[int]) -> Arrays:
        assert self._session is not None, "enter the runner before running it"
        return self._session.run({"image" if self.bundle.manifest.input == "uint8" else "pixels": value})


class EngineStages(StageRunner):
    """Runs the engines of a bundle's stages. All stay on the GPU, since loading one takes longer than running it.

    Args:
        bundle: what to run.
        engines: a set that streams.
    """

    max_rows = STRIP_ROWS

    def __init__(self, bundle: Bundle, engines: EngineSet) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self.provider, self.precision = f"engine {engines.name}", engines.precision
        self._engines = engines.engines
        self.version = engines.first.library
        self.identity = {graph: engine.recorded.sha256 for graph, engine in self._engines.items()}
        self._sessions: dict[str, EngineSession] = {}

    def _open(self) -> None:
        """Load nothing: each engine is loaded when its stage is first run."""

    def _load(self, stage: Stage) -> None:
        if stage.graph not in self._sessions:
            self._sessions[stage.graph] = EngineSession(self.bundle.path, self._engines[stage.graph])

    def _close(self) -> None:
        while self._sessions:
            with suppress(Exception):  # one that cannot be closed must not keep the others open
                self._sessions.popitem()[1].close()

    def _infer(self, stage: Stage, values: Mapping[str, NDArray[Any]]) -> Arrays:
        found = self._sessions[stage.graph].run(values)
        # a value has one name in a graph: an output that replaces an input has the suffix `_out` there
        return {name: found[f"{name}_out" if name in stage.inputs else name] for name in stage.outputs}
