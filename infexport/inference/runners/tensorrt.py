"""A bundle's engines on a GPU, by Polygraphy."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from infexport.bundle import ENGINES, Bundle
from infexport.bundle.engine_record import Engine
from infexport.bundle.manifest import MODEL, Stage
from infexport.errors import InfexportError
from infexport.images.preprocess import normalise
from infexport.inference.engine_selection import EngineSet, Kind, build_command
from infexport.inference.runners import Placement
from infexport.inference.tensorrt_libraries import BACKENDS, errors_in, library_log
from infexport.system.dependencies import require
from infvit.stage_scope import StageScope

STRIP_ROWS = 8
"""Rows of patches of a strip, at most: the image stage's memory is what rows and columns may be at once."""
Arrays = dict[str, NDArray[Any]]


class EngineSession:
    """One engine, loaded on the GPU. Threads take turns: it has one set of buffers.

    Args:
        bundle: the folder it lies in.
        engine: one that is current.
        stages: the bundle has some to build engines for.

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
                # what is loaded holds on to what it was loaded with
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
        """The command that builds it for this GPU."""
        kind: Kind = "whole" if self._record.chunk is None else "stream"
        return build_command(self._bundle, self._record.precision, kind)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """The engine's outputs by name.

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
        """Return what takes an input of this shape: other options, or an engine to be built."""
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
    """Return min, opt and max that reach to a fourth number."""
    low, best, high, wanted = numbers
    return [min(low, wanted), best, max(high, wanted)]


class EngineRunner:
    """Runs the engine of a bundle's whole graph.

    Args:
        bundle: what to run.
        engines: a set that runs the whole graph.
    """

    def __init__(self, bundle: Bundle, engines: EngineSet) -> None:
        self.bundle = bundle
        self.provider, self.precision = f"engine {engines.name}", engines.precision
        self._engine = engines.engines[MODEL]
        self.version = engines.first.library
        self._session: EngineSession | None = None

    def __enter__(self) -> Self:
        self._session = EngineSession(self.bundle.path, self._engine, self.bundle.manifest.stages is not None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            self._session.close()
        self._session = None

    @property
    def placement(self) -> Placement:
        layers = self._engine.recorded.layers
        return {self.provider: Counter({kind: sum(types.values()) for kind, types in layers.items()})}

    def takes(self, shape: Sequence[int]) -> bool:
        ((name, shapes),) = self._engine.recorded.profile.items()
        batch, height, width, channels = shape
        return shapes.holds([batch, height, width, channels] if name == "image" else [batch, channels, height, width])

    def run(self, images: NDArray[np.uint8]) -> Arrays:
        assert self._session is not None, "enter the runner before running it"
        manifest = self.bundle.manifest
        if manifest.input == "uint8":
            return self._session.run({"image": images})
        return self._session.run({"pixels": normalise(images, manifest.preprocessing)})


class EngineStages:
    """Runs the engines of a bundle's stages; all stay on the GPU, since loading one takes longer than a sweep.

    Args:
        bundle: what to run.
        engines: a set that streams.
    """

    max_rows: int | None = STRIP_ROWS

    def __init__(self, bundle: Bundle, engines: EngineSet) -> None:
        self.bundle = bundle
        self.provider, self.precision = f"engine {engines.name}", engines.precision
        self._engines = engines.engines
        self.version = engines.first.library
        self.identity = {graph: engine.recorded.sha256 for graph, engine in self._engines.items()}
        self._sessions: dict[str, EngineSession] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._sessions:
            with suppress(Exception):  # one that cannot be closed must not keep the others open
                self._sessions.popitem()[1].close()

    def run(self, stage: Stage, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """The stage's outputs by name.

        Raises:
            InfexportError: as of `EngineSession`.
        """
        if stage.graph not in self._sessions:
            self._sessions[stage.graph] = EngineSession(self.bundle.path, self._engines[stage.graph])
        values = dict(feeds)
        if stage.over is StageScope.IMAGE and self.bundle.manifest.input == "float32":
            values["image"] = normalise(values["image"], self.bundle.manifest.preprocessing)
        found = self._sessions[stage.graph].run(values)
        # one value has one name in a graph: what goes in again comes out under another (`infexport.conversion.stages`)
        return {name: found[f"{name}_out" if name in stage.inputs else name] for name in stage.outputs}
