"""Images → predictions."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from infexport.bundle import Bundle
from infexport.errors import InfexportError
from infexport.execution import Image, Policy, Way, choose
from infexport.images import read_image
from infexport.machine import usable_cores
from infexport.predictions import Failure, Prediction
from infexport.runners import Runner
from infexport.runners.ort import OrtRunner, OrtStages, import_onnxruntime
from infexport.stream import stream
from infexport.stream.scratch import Identity, Scratch, default_scratch
from infexport.stream.source import ArrayRows, Rows, Source, open_rows
from infexport.transform import Fitted, fit, resized, transform_of


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        size: `trained` applies the recorded evaluation transform, `native` leaves the image as it is, N is the
            transform at N pixels.
        edge: how a side becomes a whole number of patches: `pad` replicates the edge, `crop` cuts.
        batch_size: the most images at a time. Images are never padded to a common size: every token enters the
            pooled state.
        policy: how they are run.
        provider, threads: as of `runners.ort.OrtRunner`.
    """

    policy: Policy
    size: Literal["trained", "native"] | int = "trained"
    edge: Literal["pad", "crop"] = "pad"
    batch_size: int = 1
    provider: str = "auto"
    threads: int | None = None


class Listener:
    """What is told of a run; this one ignores it."""

    def image(self, done: int) -> None:
        """So many more images are done."""

    def status(self, message: str) -> None:
        """Something a person would like to know."""

    def running(self, provider: str) -> None:
        """A session has been opened on a provider."""

    def sweep(self, file: str, stage: int, done: int, total: int) -> None:
        """So many of the rows of a stage are done, of an image that is streamed."""


class Run:
    """Runs images through a bundle, images of equal grids together where they are run whole.

    Args:
        bundle: whose preprocessing is applied.
        request: what is asked for.
        listener: told of it.
    """

    def __init__(self, bundle: Bundle, request: Request, listener: Listener) -> None:
        self.bundle, self.request, self.listener = bundle, request, listener
        self._transform = transform_of(bundle.manifest.preprocessing)
        self._patch = bundle.manifest.config["patch_size"]
        self._answers: dict[int, Prediction] = {}
        self._failures: dict[int, Failure] = {}
        self._sessions = ExitStack()

    def __call__(self, files: Sequence[Path]) -> tuple[list[Prediction], list[Failure]]:
        """Predictions and failures, each in the order of `files`."""
        with self._sessions:
            for batch in _batches(self._whole_images(files), self.request.batch_size):
                self._run_whole(batch, files)
                self.listener.image(len(batch))
        return [self._answers[i] for i in sorted(self._answers)], [self._failures[i] for i in sorted(self._failures)]

    @cached_property
    def _runner(self) -> Runner:
        """Of the whole graph, which is loaded when the first image needs it."""
        runner = self._sessions.enter_context(OrtRunner(self.bundle, self.request.provider, self.request.threads))
        self.listener.running(runner.provider)
        return runner

    @cached_property
    def _stages(self) -> OrtStages:
        stages = self._sessions.enter_context(OrtStages(self.bundle, self.request.provider, self.request.threads))
        self.listener.running(stages.provider)
        return stages

    def _whole_images(self, files: Sequence[Path]) -> Iterator[tuple[int, Fitted]]:
        """The images that are run whole; what is streamed is run here, and what fails reported."""
        for index, file in enumerate(files):
            try:
                image = self._open_or_stream(file)
                if isinstance(image, Fitted):
                    yield index, image
                    continue
                self._answer(index, file, image)
            except (InfexportError, MemoryError) as error:
                reason = error if isinstance(error, InfexportError) else _out_of_memory([])
                self._failures[index] = Failure(_name(file), reason)
            self.listener.image(1)

    def _open_or_stream(self, file: Path) -> Fitted | Prediction:
        """An image that is to be run whole, or the answer for one that is not."""
        request = self.request
        rows: Rows
        if request.size == "native":
            rows = open_rows(file)
        else:
            rows = ArrayRows(resized(read_image(file), request.size, self._transform))
        source = Source(rows, self._patch, request.edge)
        image = Image(source.tokens, source.grid[1] * self._patch, rows.loaded)
        way = choose(self.bundle.manifest, request.policy, image)
        if way != "whole":
            return self._stream(file, source, way)
        pixels = rows.pixels if isinstance(rows, ArrayRows) else read_image(file)
        return fit(pixels, self._patch, "native", self._transform, request.edge)

    def _stream(self, file: Path, source: Source, way: Way) -> Prediction:
        policy = self.request.policy
        listener = self.listener
        scratch: Scratch | None = None
        with ExitStack() as stack:
            if way == "disk":
                root = policy.scratch or default_scratch()
                scratch = stack.enter_context(Scratch(root, self._identity(file), listener.status))
            found = stream(
                self.bundle,
                self._stages,
                source,
                scratch,
                policy.chunk,
                policy.half,
                lambda stage, done, total: listener.sweep(_name(file), stage, done, total),
            )
        kept = f"tokens {'on disk' if way == 'disk' else 'in memory'}{' in float16' if policy.half else ''}"
        execution = f"stream, {kept}"
        return Prediction(
            _name(file), source.grid, source.padded_share, found.logits, found.features, execution, found.rounding
        )

    def _identity(self, file: Path) -> Identity:
        """What decides an image's answer to the last bit."""
        request, manifest = self.request, self.bundle.manifest
        facts = {
            "bundle": manifest.files,
            "size": request.size,
            "edge": request.edge,
            "chunk": request.policy.chunk,
            "tokens": "float16" if request.policy.half else "float32",
            "provider": request.provider,
            "threads": request.threads or usable_cores(),
            "onnxruntime": import_onnxruntime().__version__,
        }
        return Identity(file, facts)

    def _run_whole(self, batch: Sequence[tuple[int, Fitted]], files: Sequence[Path]) -> None:
        try:
            values = self._runner.run(np.stack([image.pixels for _, image in batch]))
        except (InfexportError, MemoryError) as error:
            reason = error if isinstance(error, InfexportError) else _out_of_memory(batch)
            self._failures |= {index: Failure(_name(files[index]), reason) for index, _ in batch}
            return
        for row, (index, image) in enumerate(batch):
            grid = (image.pixels.shape[0] // self._patch, image.pixels.shape[1] // self._patch)
            logits, features = values["logits"][row], values["features"][row]
            answer = Prediction(_name(files[index]), grid, image.padded_share, logits, features)
            self._answer(index, files[index], answer)

    def _answer(self, index: int, file: Path, answer: Prediction) -> None:
        if np.isfinite(answer.logits).all():
            self._answers[index] = answer
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


def _out_of_memory(batch: Sequence[tuple[int, Fitted]]) -> InfexportError:
    shapes = f"a batch of {len(batch)} images of {list(batch[0][1].pixels.shape)}" if batch else "while reading it"
    return InfexportError("not enough memory for an image", shapes, "try a smaller --size or --batch-size")


def _not_finite(file: str) -> InfexportError:
    return InfexportError(
        f"the model's answer is not finite: {file}",
        hint="infexport validate parity --images tells whether PyTorch's is",
    )
