"""Prediction of one image on several workers: `infexport.inference.streaming.sharding` with Ray actors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from infexport.bundle import Bundle, open_bundle
from infexport.errors import InfexportError
from infexport.images.fetch import local_copy, named
from infexport.images.strips import Source
from infexport.inference import memory
from infexport.inference.failures import not_finite
from infexport.inference.items import display_name, open_source
from infexport.inference.options import InferenceOptions
from infexport.inference.planner import no_stages, size_text
from infexport.inference.prediction import Failure, ImageResult, Prediction
from infexport.inference.runners import StageRunner
from infexport.inference.runners.factory import RunnerFactory
from infexport.inference.streaming.driver import select_stages
from infexport.inference.streaming.sharding import MEMORY_HINT, Lost, Shard, Sharded, split_rows
from infexport.integrations.ray.cluster import Workers, last_line
from infexport.system.progress import (
    ItemsDone,
    ProgressListener,
    SessionOpened,
    StageProgress,
    Status,
)
from infexport.system.urls import scrubbed

POLL_SECONDS = 0.5
"""Interval between two queries of the workers' progress."""
WAIT_SECONDS = 10.0
"""Time for workers to start before a status is shown, and to release resources before they are killed."""


class Worker:
    """Actor that runs one shard of an image at a time, and keeps the session of the stages.

    Args:
        bundle: folder of the bundle.
        digest: digest of the bundle; all workers must run the same.
        options: options of the run.
    """

    def __init__(self, bundle: Path, digest: str, options: InferenceOptions) -> None:
        self._path, self._digest, self._options = bundle, digest, options
        self._bundle: Bundle | None = None
        self._stages: StageRunner | None = None
        self._sessions = ExitStack()
        self._shard: Shard | None = None
        self._image = ExitStack()
        self._file: tuple[Path | str, Path] = "", Path()
        self._chunk = 0

    def look(self, image: Path | str) -> tuple[tuple[int, int], float]:
        """Return an image's grid of patches `(height, width)` and the share of padded pixels."""
        source = self._source(image)
        return source.grid, source.padded_share

    def open(self) -> tuple[str, str, list[str], int]:
        """Open the bundle and its stages.

        Returns:
            Provider, precision, notes, and tokens per chunk.

        Raises:
            InfexportError: they cannot be opened on this node.
        """
        options = self._options
        opening = RunnerFactory(self._opened, options.provider, options.engine, options.threads)
        self._stages = self._sessions.enter_context(opening.stages())
        self._chunk = opening.chunk(options.chunk)
        return self._stages.provider, self._stages.precision, opening.notes, self._chunk

    def take(self, image: Path | str, rows: range) -> None:
        """Start a shard of an image.

        Raises:
            InfexportError: the image or the bundle cannot be read on this node, or the shard does not fit into memory.
        """
        self._drop()
        if self._stages is None:  # this worker replaces a lost one
            self.open()
        assert self._stages is not None, "opened"
        bundle, options = self._opened, self._options
        source = self._source(image)
        chunk, patch = self._chunk, bundle.manifest.config.patch_size
        needed = source.rows.loaded + memory.streamed(
            bundle.manifest, len(rows), source.grid[1] * patch, chunk, options.tokens, False, False
        )
        if options.memory is not None and needed > options.memory:
            raise InfexportError(
                f"a shard of {len(rows):,} tokens does not fit into {size_text(options.memory)}",
                f"it needs about {size_text(needed)}",
                "use more --workers, on more machines, or --tokens float16",
            )
        stages = select_stages(bundle.manifest.stages or (), centrality=False)
        self._shard = Shard(bundle.manifest.config, stages, self._stages, source, rows, chunk, options.tokens)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the shard."""
        with named(*self._file):
            return getattr(self._shard, method)(*arguments)

    def facts(self) -> tuple[int, float]:
        """Return bytes of blocks received from other workers, and the rounding error of the tokens."""
        assert self._shard is not None, "taken"
        return self._shard.received, self._shard.rounding

    def done(self) -> int:
        """Return the rows done in the current stage; callable while a stage runs."""
        return 0 if self._shard is None else self._shard.done

    def leave(self) -> None:
        """Release the shard, and delete the fetched copy of the image."""
        self._drop()
        self._image.close()
        self._file = "", Path()

    def _drop(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def _source(self, image: Path | str) -> Source:
        """Return the source of an image, which `look` and `take` fetch only once."""
        held, file = self._file
        if held != image:
            self.leave()
            file = self._image.enter_context(local_copy(image))
            self._file = image, file
        with named(image, file):
            return open_source(file, self._opened, self._options)

    @property
    def _opened(self) -> Bundle:
        if self._bundle is None:
            self._bundle = open_bundle(self._path, digest=self._digest)
        return self._bundle


class RayTeam:
    """A `sharding.Team` of actors.

    Args:
        ray: Ray's module, connected.
        workers: number and resources of the actors.
        bundle: the bundle, at the same path for all workers.
        options: options of the run; see `Worker`.
    """

    def __init__(self, ray: ModuleType, workers: Workers, bundle: Bundle, options: InferenceOptions) -> None:
        self._ray, self._workers, self.count = ray, workers, workers.count
        self._arguments = bundle.path, bundle.manifest.digest, options
        asking = ray.method(concurrency_group="asking")
        actor = type("InfexportShard", (Worker,), {"done": asking(Worker.done)})
        self._class = ray.remote(concurrency_groups={"asking": 1})(actor)
        self._actors = [self._start() for _ in range(workers.count)]
        self._image: Path | str = ""
        self.rows: Sequence[range] = []
        self.waiting: Callable[[int], None] = lambda done: None

    def _start(self) -> Any:
        options = self._class.options(
            num_cpus=self._workers.threads, num_gpus=self._workers.gpus or None, scheduling_strategy="SPREAD"
        )
        return options.remote(*self._arguments)

    def open(self, listener: ProgressListener) -> tuple[str, str, list[str], int]:
        """Open the bundle in all workers; see `Worker.open`.

        Args:
            listener: receives a status while the cluster has no free resources for them.
        """
        results = [actor.open.remote() for actor in self._actors]
        ready, _ = self._ray.wait(results, num_returns=len(results), timeout=WAIT_SECONDS)
        if len(ready) < len(results):
            listener.on_event(
                Status(f"{len(ready)} of {len(results)} workers have started: the cluster may be in use by others")
            )
        found: list[tuple[str, str, list[str], int]] = [self.value(result) for result in results]
        return found[0]

    def look(self, image: Path | str) -> tuple[tuple[int, int], float]:
        """Return grid and padded share of an image; see `Worker.look`."""
        self.waiting = lambda done: None
        found: tuple[tuple[int, int], float] = self._retried(0, "look", image)
        return found

    def take(self, image: Path | str, rows: Sequence[range]) -> None:
        """Assign its rows to every worker; see `Worker.take`."""
        self._image, self.rows = image, rows
        results = [actor.take.remote(image, part) for actor, part in zip(self._actors, rows, strict=True)]
        for shard, result in enumerate(results):
            try:
                self.value(result)
            except Lost:
                self._retried(shard, "take", image, rows[shard])

    def _retried(self, shard: int, method: str, *arguments: Any) -> Any:
        """Call a worker; if it is lost, replace it once, which loses nothing before its shard has started."""
        try:
            return self.value(getattr(self._actors[shard], method).remote(*arguments))
        except Lost:
            self._actors[shard] = self._start()
            return self.value(getattr(self._actors[shard], method).remote(*arguments))

    def share(self, value: Any) -> Any:
        return self._ray.put(value)

    def tell(self, shard: int, method: str, *arguments: Any) -> Any:
        return self._actors[shard].call.remote(method, *arguments)

    def facts(self) -> list[tuple[int, float]]:
        """Return `Worker.facts` of all workers that still run."""
        found = []
        for actor in self._actors:
            with suppress(Lost):
                found.append(self.value(actor.facts.remote()))
        return found

    def value(self, result: Any) -> Any:
        exceptions = self._ray.exceptions
        try:
            while not self._ray.wait([result], timeout=POLL_SECONDS)[0]:
                self.waiting(self._done())
            return self._ray.get(result)
        except exceptions.RayError as error:
            cause = error.cause if isinstance(error, exceptions.RayTaskError) else error
            if isinstance(cause, InfexportError):
                raise cause from None
            if isinstance(cause, MemoryError):
                raise InfexportError("a worker does not have enough memory", str(cause), MEMORY_HINT) from error
            text = last_line(error)
            if "creation task" in str(cause):  # it never started
                raise InfexportError(
                    "a worker cannot start", text, "check that infexport is installed on every node"
                ) from error
            lost = exceptions.RayActorError, exceptions.ObjectLostError, exceptions.WorkerCrashedError
            if isinstance(cause, (*lost, exceptions.OutOfMemoryError)):
                raise Lost from error
            raise InfexportError("a worker failed", scrubbed(text, str(self._image))) from error

    def _done(self) -> int:
        """Return the rows done by all shards, without those that do not answer within POLL_SECONDS."""
        asked = [actor.done.remote() for actor in self._actors]
        ready, _ = self._ray.wait(asked, num_returns=len(asked), timeout=POLL_SECONDS)
        try:
            return sum(self._ray.get(ready))
        except self._ray.exceptions.RayError:
            return 0

    def replace(self, shard: int) -> None:
        self._ray.kill(self._actors[shard])
        cores, needed = self._ray.cluster_resources().get("CPU", 0), self.count * self._workers.threads
        if cores < needed:  # a node is gone: the new worker would wait for resources
            raise InfexportError(
                "the cluster has become too small",
                f"{self.count} workers need {self._workers.threads} cores each, and {cores:.0f} cores are left",
                "run again with fewer --workers",
            )
        self._actors[shard] = self._start()
        self.value(self._actors[shard].take.remote(self._image, self.rows[shard]))

    def close(self) -> None:
        # a fetched copy is deleted by the worker that made it
        self._ray.wait([actor.leave.remote() for actor in self._actors], num_returns=self.count, timeout=WAIT_SECONDS)
        for actor in self._actors:
            self._ray.kill(actor)


def predict(
    ray: ModuleType,
    workers: Workers,
    bundle: Bundle,
    options: InferenceOptions,
    images: Sequence[Path | str],
    listener: ProgressListener,
) -> list[ImageResult]:
    """Return a prediction or a failure for every image, in order; all workers run each image together.

    Args:
        ray: Ray's module, connected.
        workers: number and resources of the workers.
        bundle: the bundle, at the same path for all workers.
        options: options of the run; `memory` and `threads` apply to each worker.
        images: files that the workers can read, or URLs.
        listener: receives progress events.

    Raises:
        InfexportError: the bundle cannot be run at all.
    """
    if bundle.manifest.stages is None:
        raise no_stages()
    rows: list[ImageResult] = []
    with closing(RayTeam(ray, workers, bundle, options)) as team:
        try:
            provider, precision, notes, chunk = team.open(listener)
        except Lost as error:
            raise InfexportError("a worker was lost before it started", hint=MEMORY_HINT) from error
        for note in notes:
            listener.on_event(Status(note))
        listener.on_event(SessionOpened(provider, precision))
        for index, image in enumerate(images):
            name = display_name(images, index)
            try:
                rows.append(_predict(team, bundle, options, chunk, image, name, listener))
            except InfexportError as error:
                rows.append(Failure(name, error))
            except Lost:
                rows.append(Failure(name, InfexportError("a worker was lost on every attempt", hint=MEMORY_HINT)))
            listener.on_event(ItemsDone(1))
    return rows


def _predict(
    team: RayTeam,
    bundle: Bundle,
    options: InferenceOptions,
    chunk: int,
    image: Path | str,
    name: str,
    listener: ProgressListener,
) -> Prediction:
    grid, padded_share = team.look(image)
    team.take(image, split_rows(grid, team.count))
    stages = select_stages(bundle.manifest.stages or (), centrality=False)
    sharded = Sharded(
        stages,
        team,
        chunk,
        lambda stage, done, total: listener.on_event(StageProgress(name, stage, done, total)),
        lambda message: listener.on_event(Status(message)),
    )
    outputs = sharded.run()
    facts = team.facts()
    blocks = sum(received for received, _ in facts)
    listener.on_event(
        Status(f"{team.count} workers exchanged {sharded.exchanged:,} bytes of sums and {blocks:,} of tokens")
    )
    logits, features = outputs["logits"][0], outputs["features"][0]
    if not np.isfinite(logits).all():
        raise not_finite(name)
    kept = f"tokens in memory{' in float16' if options.tokens == 'float16' else ''}"
    execution = f"stream, {team.count} shards, {kept}"
    return Prediction(
        name, grid, padded_share, logits, features, execution, max((error for _, error in facts), default=0.0)
    )
