"""One call of a `Run`: read every image, plan how it is run, then batch or stream it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from infexport.errors import InfexportError
from infexport.images.decode import Pixels
from infexport.images.fetch import Item, is_url, local_copy, named
from infexport.images.preprocess import Fitted, fit
from infexport.images.strips import ArrayRows, Rows, Source, list_files
from infexport.inference.batches import Batches
from infexport.inference.centrality import CENTRALITY, centrality_from_tokens
from infexport.inference.failures import image_error, not_finite
from infexport.inference.items import check_item, display_name, load_pixels, open_source
from infexport.inference.planner import ExecutionMode, Image, choose, usual_memory
from infexport.inference.prediction import Answered, Failure, ImageResult, Prediction
from infexport.inference.runners import StageRunner
from infexport.inference.streaming import CHUNK, stream
from infexport.inference.streaming.resume import Identity, Scratch
from infexport.system.host import cache_folder, usable_cores
from infexport.system.progress import ItemsDone, ProgressEvent, ProgressListener, StageProgress, Status

if TYPE_CHECKING:
    from infexport.inference.executor import Run

T = TypeVar("T")


class _RecordingListener(ProgressListener):
    """Forwards events to another listener, and keeps the exception that it raises: that ends the call.

    Attributes:
        error: the exception, or None.
    """

    def __init__(self, listener: ProgressListener) -> None:
        self._listener = listener
        self.error: Exception | None = None

    def on_event(self, event: ProgressEvent) -> None:
        try:
            self._listener.on_event(event)
        except Exception as error:
            self.error = error
            raise


@dataclass(frozen=True)
class _ToStream:
    """An image that has been read and is to be streamed."""

    image: Path | Pixels
    source: Source
    mode: ExecutionMode


class Call:
    """One call of a `Run`: reads every image, plans how it is run, and batches or streams it."""

    def __init__(self, run: Run, images: Sequence[Item], listener: ProgressListener, keep_centrality: bool) -> None:
        self._run, self._bundle, self._options = run, run.bundle, run.options
        self._listener = _RecordingListener(listener)
        self._keep_centrality = keep_centrality
        self._images, self._rows = list(images), dict[int, ImageResult]()
        self._transform = run.bundle.manifest.preprocessing.transform
        self._patch = run.bundle.manifest.config.patch_size
        self._on_gpu = run.on_gpu(self._listener)
        self._chunk = run.opening.chunk(run.options.chunk)
        self._room = run.options.memory or usual_memory()
        if "whole" in run.opening.engines and run.options.execution != "stream":
            run.runner(self._listener)  # an engine that cannot be loaded is an error of the call, not of an image

    def run(self) -> list[ImageResult]:
        """Return a row for every image, in their order."""
        batches = Batches(self._options.batch_size)
        for index in range(len(self._images)):
            whole = self._read_or_stream(index)
            if whole is None:
                self._listener.on_event(ItemsDone(1))
                continue
            for batch in batches.add(index, whole):
                self._run_whole(batch)
                self._listener.on_event(ItemsDone(len(batch)))
        for batch in batches.rest():
            self._run_whole(batch)
            self._listener.on_event(ItemsDone(len(batch)))
        self._report_unused_options()
        return [self._rows[index] for index in range(len(self._images))]

    def _read_or_stream(self, index: int) -> Fitted | None:
        """Return an image for a batch; None where it has been streamed, or has failed."""
        with ExitStack() as held:
            prepared = self._prepare(index, held)
            if isinstance(prepared, _ToStream):
                self._stream(index, prepared)
                return None
            return prepared

    def _prepare(self, index: int, held: ExitStack) -> Fitted | _ToStream | None:
        """Read an image and plan how to run it; None where it fails.

        Args:
            index: of the image.
            held: keeps the local copy of a URL until the image has been run.
        """
        with self._failing([index], "while reading it"):
            item = check_item(self._images[index])
            image = item if isinstance(item, np.ndarray) else held.enter_context(local_copy(item))
            with named(item, image):
                source = open_source(image, self._bundle, self._options)
                mode = self._plan(source)
                if mode != "whole":
                    return _ToStream(image, source, mode)
                pixels = source.rows.pixels if isinstance(source.rows, ArrayRows) else load_pixels(image)
                return fit(pixels, self._patch, "native", self._transform, self._options.edge)
        return None

    def _plan(self, source: Source) -> ExecutionMode:
        """Choose how an image is run.

        Raises:
            InfexportError: it does not fit into memory.
        """
        options, chunk, execution = self._options, self._chunk, self._options.execution
        # the planner's estimates, and the caches that make chunks faster, are those of a CPU
        if self._on_gpu and execution != "stream" and options.scratch is None:
            if execution == "whole" or self._takes_whole(source):
                return "whole"
            execution = "stream"
        if "stream" in self._run.opening.engines:  # their activations are in the GPU's memory
            chunk = CHUNK
        image = Image(source.tokens, source.grid[1] * self._patch, source.rows.loaded)
        return choose(self._bundle, options, image, self._room, chunk, execution)

    def _takes_whole(self, source: Source) -> bool:
        """Tell whether the GPU runs an image whole; also where only an engine may, whose error then says why not."""
        opening = self._run.opening
        if opening.engines and "whole" not in opening.engines:
            return False
        shape = (1, *(side * self._patch for side in source.grid), 3)
        takes = self._run.runner(self._listener).takes(shape)
        return takes or (opening.engines_alone and "stream" not in opening.engines)

    def _run_whole(self, batch: Sequence[tuple[int, Fitted]]) -> None:
        indices = [index for index, _ in batch]
        runner = self._opened(indices, self._run.runner)
        if runner is None:
            return
        answers: list[tuple[int, Prediction]] = []
        with self._failing(indices, _describe(batch)):
            values = runner.run(np.stack([image.pixels for _, image in batch]))
            for row, (index, image) in enumerate(batch):
                grid = (image.pixels.shape[0] // self._patch, image.pixels.shape[1] // self._patch)
                # copies: rows of a batch would keep all of it, in memory that ONNX Runtime could use again
                logits, features = values["logits"][row].copy(), values["features"][row].copy()
                centrality = centrality_from_tokens(values[CENTRALITY][row], grid) if self._options.centrality else None
                name = display_name(self._images, index)
                prediction = Prediction(name, grid, image.padded_share, logits, features, centrality=centrality)
                answers.append((index, prediction))
        for index, answer in answers:
            self._answer(index, answer)

    def _stream(self, index: int, image: _ToStream) -> None:
        stages = self._opened([index], self._run.stages)
        if stages is None:
            return
        answer: Prediction | None = None
        with (
            self._run.streaming,
            self._failing([index], "while streaming it"),
            named(self._images[index], image.image),
        ):
            answer = self._streamed(index, image, stages)
        if answer is not None:
            self._answer(index, answer)

    def _opened(self, indices: Sequence[int], opens: Callable[[ProgressListener], T]) -> T | None:
        """Open a runner. Where that fails, a call that has answers keeps them, and only these images fail."""
        if not any(isinstance(row, Prediction) for row in self._rows.values()):
            return opens(self._listener)
        with self._failing(indices, "while loading what runs it"):
            return opens(self._listener)
        return None

    def _streamed(self, index: int, image: _ToStream, stages: StageRunner) -> Prediction:
        options, listener = self._options, self._listener
        name, item = display_name(self._images, index), self._images[index]
        scratch: Scratch | None = None
        with ExitStack() as stack:
            if image.mode == "disk":
                root = options.scratch or cache_folder()
                key = item if is_url(item) else image.image
                identity = self._identity(key, image.image, image.source.rows, stages)
                scratch = stack.enter_context(Scratch(root, identity, listener))
            found = stream(
                self._bundle,
                stages,
                image.source,
                scratch,
                self._chunk,
                options.tokens,
                lambda stage, done, total: listener.on_event(StageProgress(name, stage, done, total)),
                options.centrality,
            )
        kept = f"tokens {'on disk' if image.mode == 'disk' else 'in memory'}"
        if options.tokens == "float16":
            kept += " in float16"
        return Prediction(
            name,
            image.source.grid,
            image.source.padded_share,
            found.logits,
            found.features,
            f"stream, {kept}",
            found.rounding,
            found.centrality,
        )

    def _identity(self, key: Path | str | Pixels, image: Path | Pixels, rows: Rows, stages: StageRunner) -> Identity:
        """Return everything that decides the last bit of an image's answer."""
        options, manifest = self._options, self._bundle.manifest
        facts = {
            "bundle": manifest.files,
            "size": options.size,
            "edge": options.edge,
            "chunk": self._chunk,
            "tokens": options.tokens,
            "centrality": options.centrality,
            "provider": stages.provider,
            "threads": options.threads or usable_cores(),
            "reader": rows.reader,
            "runtime": stages.identity,
            "infexport": importlib.metadata.version("infexport"),
        }
        # the local copy of a URL has another name each time
        place = key if isinstance(key, str) else str(key.absolute()) if isinstance(key, Path) else ""
        return Identity(list_files(image, rows) if isinstance(image, Path) else image, facts, place)

    def _answer(self, index: int, answer: Prediction) -> None:
        if np.isfinite(answer.logits).all():
            self._rows[index] = answer if self._keep_centrality else replace(answer, centrality=None)
            self._listener.on_event(Answered(index, answer))
        else:
            self._rows[index] = Failure(answer.file, not_finite(answer.file))

    @contextmanager
    def _failing(self, indices: Sequence[int], doing: str) -> Iterator[None]:
        """Turn errors of the block into failures of these images, but not those of the listener."""
        try:
            yield
        except (InfexportError, MemoryError, OSError) as error:
            if self._listener.error is not None:
                raise self._listener.error from None
            reason = image_error(error, doing)
            self._rows |= {index: Failure(display_name(self._images, index), reason) for index in indices}

    def _report_unused_options(self) -> None:
        """Report options that had no effect because every image was run in the other mode."""
        answers = [row for row in self._rows.values() if isinstance(row, Prediction)]
        whole = sum(row.execution == "whole" for row in answers)
        for names, used, message in (
            (("chunk", "tokens"), whole < len(answers), "no image was streamed: {}; execution stream streams all"),
            (("batch_size",), whole > 0, "all images were streamed, one by one: {}"),
        ):
            changed = self._options.named(names)
            if changed and answers and not used:
                self._listener.on_event(Status(message.format(f"{' and '.join(changed)} had no effect")))


def _describe(batch: Sequence[tuple[int, Fitted]]) -> str:
    return f"a batch of {len(batch)} images of {list(batch[0][1].pixels.shape)}"
