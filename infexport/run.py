"""Images → predictions."""

from __future__ import annotations

import importlib.metadata
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from infexport.bundle import Bundle
from infexport.centrality import CENTRALITY, of_tokens
from infexport.errors import InfexportError
from infexport.execution import Image, Policy, Way, choose
from infexport.images import read_image
from infexport.machine import cache_folder, usable_cores
from infexport.predictions import Failure, Prediction
from infexport.runners import Deployed, Runner, Stages, spread
from infexport.runners.opening import Opening
from infexport.stream import CHUNK, stream
from infexport.stream.scratch import Identity, Scratch
from infexport.stream.source import ArrayRows, Rows, Source, open_rows
from infexport.transform import Fitted, fit, resized, transform_of


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        size: `trained` applies the recorded evaluation transform, `native` leaves the image as it is, N is the
            transform at N pixels.
        edge: how a side becomes a whole number of patches: `pad` replicates the edge, `crop` cuts.
        policy: how they are run. Images are never padded to a common size: every token enters the pooled state.
        provider, engine, threads: as of `runners.opening.Opening`.
        keep_centrality: predictions have it, where the policy asks for it; else the listener alone is told.
    """

    policy: Policy
    size: Literal["trained", "native"] | int = "trained"
    edge: Literal["pad", "crop"] = "pad"
    provider: str = "auto"
    engine: str | None = None
    threads: int | None = None
    keep_centrality: bool = False


class Listener:
    """What is told of a run; this one ignores it."""

    def image(self, done: int) -> None:
        """So many more images are done."""

    def answer(self, index: int, answer: Prediction) -> None:
        """Of the image of this index."""

    def status(self, message: str) -> None:
        """Something a person would like to know."""

    def running(self, provider: str, precision: str) -> None:
        """A session has been opened on a provider, in a precision."""

    def sweep(self, file: str, stage: int, done: int, total: int) -> None:
        """So many of the rows of a stage are done, of an image that is streamed."""


class Run:
    """Runs images through a bundle, images of equal grids together where they are run whole.

    Args:
        bundle: whose preprocessing is applied.
        request: what is asked for.
        listener: told of it.
        opening: what opens the runners; None for what the request names.
    """

    def __init__(self, bundle: Bundle, request: Request, listener: Listener, opening: Opening | None = None) -> None:
        self.bundle, self.request, self.listener = bundle, request, listener
        self._transform = transform_of(bundle.manifest.preprocessing)
        self._patch = bundle.manifest.config["patch_size"]
        self._answers: dict[int, Prediction] = {}
        self._failures: dict[int, Failure] = {}
        self._sessions = ExitStack()
        ways = request.provider, request.engine, request.threads, request.policy.centrality
        self._opening = opening or Opening(bundle, *ways)
        self._on_gpu = False

    @cached_property
    def _policy(self) -> Policy:
        """As asked for, with the chunk that engines were built for where none was named."""
        streaming = self._opening.engines.get("stream")
        chunk = self.request.policy.chunk or (streaming and streaming.chunk) or CHUNK
        return replace(self.request.policy, chunk=chunk)

    def __call__(self, files: Sequence[Path]) -> tuple[list[Prediction], list[Failure]]:
        """Predictions and failures, each in the order of `files`.

        Raises:
            InfexportError: the bundle cannot be run at all. What is wrong with an image is a failure of that image.
        """
        answers, failures = self.by_index(files)
        return [answers[i] for i in sorted(answers)], [failures[i] for i in sorted(failures)]

    def by_index(self, files: Sequence[Path]) -> tuple[dict[int, Prediction], dict[int, Failure]]:
        """Predictions and failures by their place in `files`; raises as a call does."""
        with self._sessions:
            self._on_gpu = bool(self._opening.engines) or (self._opening.seeks_gpu and self._runner.provider != "cpu")
            for note in self._opening.notes:
                self.listener.status(note)
            if "whole" in self._opening.engines and self._policy.execution != "stream":
                _ = self._runner  # one that cannot be loaded is no image's failure
            for batch in _batches(self._whole_images(files), self.request.policy.batch):
                runner = self._runner
                with self._failing(files, [index for index, _ in batch], _shapes(batch)):
                    self._run_whole(runner, batch, files)
                self.listener.image(len(batch))
        return self._answers, self._failures

    @contextmanager
    def _failing(self, files: Sequence[Path], indices: Sequence[int], doing: str) -> Iterator[None]:
        """What goes wrong here is a failure of these images."""
        try:
            yield
        except (InfexportError, MemoryError) as error:
            # a new one: what was raised holds on to all that was in memory where it was
            reason = _out_of_memory(doing)
            if isinstance(error, InfexportError):
                reason = InfexportError(error.summary, error.details, error.hint)
            self._failures |= {index: Failure(_name(files[index]), reason) for index in indices}

    @cached_property
    def _runner(self) -> Deployed:
        """Of the whole graph, which is loaded when the first image needs it."""
        runner = self._sessions.enter_context(self._opening.runner())
        self.listener.running(runner.provider, runner.precision)
        if runner.provider != "cpu" and (split := spread(runner.placement)):
            self.listener.status(f"{split}; infexport inspect --provider {self.request.provider} shows which")
        return runner

    @cached_property
    def _stages(self) -> Stages:
        stages = self._sessions.enter_context(self._opening.stages())
        self.listener.running(stages.provider, stages.precision)
        return stages

    def _whole_images(self, files: Sequence[Path]) -> Iterator[tuple[int, Fitted]]:
        """The images that are run whole; what is streamed is run here."""
        for index, file in enumerate(files):
            opened: Fitted | tuple[Source, Way] | None = None
            with self._failing(files, [index], "while reading it"):
                opened = self._open(file)
            if isinstance(opened, Fitted):
                yield index, opened
                continue
            if opened is not None:
                stages = self._stages
                with self._failing(files, [index], "while streaming it"):
                    self._answer(index, file, self._stream(file, *opened, stages))
            self.listener.image(1)

    def _open(self, file: Path) -> Fitted | tuple[Source, Way]:
        """An image that is to be run whole, or one to be streamed, and how."""
        request = self.request
        rows: Rows
        if request.size == "native":
            rows = open_rows(file)
        else:
            rows = ArrayRows(resized(read_image(file), request.size, self._transform))
        source = Source(rows, self._patch, request.edge)
        way = self._way(source, rows.loaded)
        if way != "whole":
            return source, way
        pixels = rows.pixels if isinstance(rows, ArrayRows) else read_image(file)
        return fit(pixels, self._patch, "native", self._transform, request.edge)

    def _way(self, source: Source, loaded: int) -> Way:
        policy = self._policy
        # what is predicted is a CPU's memory, and the caches that make chunks faster are a CPU's
        if self._on_gpu and policy.execution != "stream" and policy.scratch is None:
            if policy.execution == "whole" or self._takes_whole(source):
                return "whole"
            policy = replace(policy, execution="stream")
        if "stream" in self._opening.engines:  # what passes through them is in the GPU's memory
            policy = replace(policy, chunk=CHUNK)
        return choose(self.bundle, policy, Image(source.tokens, source.grid[1] * self._patch, loaded))

    def _takes_whole(self, source: Source) -> bool:
        """Whether the GPU is to run an image at once; where nothing else may, it says itself why it cannot."""
        engines = self._opening.engines
        if engines and "whole" not in engines:
            return False
        shape = (1, *(side * self._patch for side in source.grid), 3)
        return self._runner.takes(shape) or (self._opening.engines_alone and "stream" not in engines)

    def _stream(self, file: Path, source: Source, way: Way, stages: Stages) -> Prediction:
        policy, listener = self._policy, self.listener
        scratch: Scratch | None = None
        with ExitStack() as stack:
            if way == "disk":
                root = policy.scratch or cache_folder()
                identity = self._identity(file, source.rows, stages)
                scratch = stack.enter_context(Scratch(root, identity, listener.status))
            found = stream(
                self.bundle,
                stages,
                source,
                scratch,
                policy.chunk or CHUNK,
                policy.half,
                lambda stage, done, total: listener.sweep(_name(file), stage, done, total),
                policy.centrality,
            )
        kept = f"tokens {'on disk' if way == 'disk' else 'in memory'}{' in float16' if policy.half else ''}"
        return Prediction(
            _name(file),
            source.grid,
            source.padded_share,
            found.logits,
            found.features,
            f"stream, {kept}",
            found.rounding,
            found.centrality,
        )

    def _identity(self, file: Path, rows: Rows, stages: Stages) -> Identity:
        """What decides an image's answer to the last bit."""
        request, manifest = self.request, self.bundle.manifest
        facts = {
            "bundle": manifest.files,
            "size": request.size,
            "edge": request.edge,
            "chunk": self._policy.chunk,
            "tokens": "float16" if self._policy.half else "float32",
            "centrality": self._policy.centrality,
            "provider": stages.provider,
            "threads": request.threads or usable_cores(),
            "reader": rows.reader,
            "runtime": stages.identity,
            "infexport": importlib.metadata.version("infexport"),
        }
        return Identity(file, facts)

    def _run_whole(self, runner: Runner, batch: Sequence[tuple[int, Fitted]], files: Sequence[Path]) -> None:
        values = runner.run(np.stack([image.pixels for _, image in batch]))
        for row, (index, image) in enumerate(batch):
            grid = (image.pixels.shape[0] // self._patch, image.pixels.shape[1] // self._patch)
            logits, features = values["logits"][row], values["features"][row]
            centrality = of_tokens(values[CENTRALITY][row], grid) if self._policy.centrality else None
            answer = Prediction(_name(files[index]), grid, image.padded_share, logits, features, centrality=centrality)
            self._answer(index, files[index], answer)

    def _answer(self, index: int, file: Path, answer: Prediction) -> None:
        if np.isfinite(answer.logits).all():
            self._answers[index] = answer if self.request.keep_centrality else replace(answer, centrality=None)
            self.listener.answer(index, answer)
        else:
            self._failures[index] = Failure(_name(file), _not_finite(_name(file)))


def _name(file: Path) -> str:
    # a name that is no UTF-8 must not end the run when it is written
    return os.fsencode(file).decode("utf-8", "replace")


def _batches(images: Iterator[tuple[int, Fitted]], batch_size: int) -> Iterator[list[tuple[int, Fitted]]]:
    """Groups of at most `batch_size` images of equal shape, holding back no more than 4 batches of images."""
    waiting: dict[tuple[int, ...], list[tuple[int, Fitted]]] = defaultdict(list)
    for index, image in images:
        group = waiting[image.pixels.shape]
        group.append((index, image))
        if len(group) == batch_size:
            yield waiting.pop(image.pixels.shape)
        elif sum(map(len, waiting.values())) >= 4 * batch_size:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def _shapes(batch: Sequence[tuple[int, Fitted]]) -> str:
    return f"a batch of {len(batch)} images of {list(batch[0][1].pixels.shape)}"


def _out_of_memory(doing: str) -> InfexportError:
    return InfexportError("not enough memory for an image", doing, "try a smaller --size or --batch-size")


def _not_finite(file: str) -> InfexportError:
    return InfexportError(
        f"the model's answer is not finite: {file}",
        hint="infexport validate parity --images tells whether PyTorch's is",
    )
