"""Images → predictions."""

from __future__ import annotations

import importlib.metadata
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image as PillowImage

from infexport.bundle import Bundle
from infexport.bundle.manifest import check_outside_bundles
from infexport.errors import InfexportError
from infexport.images.decode import Pixels, pixels_from, read_image
from infexport.images.fetch import Item, is_url, local_copy, named, shown
from infexport.images.preprocess import Fitted, fit, resized
from infexport.images.strips import ArrayRows, Rows, Source, list_files, open_rows
from infexport.inference.centrality import CENTRALITY, centrality_from_tokens
from infexport.inference.options import InferenceOptions
from infexport.inference.planner import ExecutionMode, Image, choose, usual_memory
from infexport.inference.prediction import Answered, Failure, ImageResult, Prediction
from infexport.inference.runners import ImageRunner, StageRunner, spread
from infexport.inference.runners.factory import RunnerFactory
from infexport.inference.streaming import CHUNK, stream
from infexport.inference.streaming.resume import Identity, Scratch
from infexport.system.host import cache_folder, usable_cores
from infexport.system.progress import (
    ItemsDone,
    ProgressEvent,
    ProgressListener,
    SessionOpened,
    StageProgress,
    Status,
)

T = TypeVar("T")


class Run:
    """Runs images through a bundle, images of equal grids together where they are run whole.

    Threads may share it: a call keeps nothing here but the sessions that it opens for all. Images that are run whole
    are run side by side; those that are streamed take turns.

    Args:
        bundle: whose preprocessing is applied.
        options: of the run.
        opening: opens the runners; None for what the options name.

    Raises:
        InfexportError: the scratch folder is inside a bundle.
    """

    def __init__(self, bundle: Bundle, options: InferenceOptions, opening: RunnerFactory | None = None) -> None:
        if options.scratch is not None:
            check_outside_bundles(options.scratch, "scratch folder", is_folder=True)
        self.bundle, self.options = bundle, options
        self.opening = opening or RunnerFactory(
            bundle, options.provider, options.engine, options.threads, options.centrality
        )
        self.streaming = threading.RLock()  # a listener may call, too
        """Held while an image is streamed: stages are loaded one after the other."""
        self._lock = threading.RLock()
        self._calls, self._closing = 0, False
        self._sessions = ExitStack()
        self._runner: ImageRunner | None = None
        self._stages: StageRunner | None = None
        self._on_gpu: bool | None = None
        self._noted = False

    def __call__(
        self, images: Sequence[Item], listener: ProgressListener | None = None, keep_centrality: bool = True
    ) -> list[ImageResult]:
        """Return a row for every image, in their order: what is wrong with an image is a failure of that image.

        Args:
            images: as of `remote.Item`.
            listener: told of it.
            keep_centrality: predictions have it, where the options ask for it; else the listener alone is told.

        Raises:
            InfexportError: the bundle cannot be run at all.
            Exception: of the listener.
        """
        with self._lock:
            self._calls += 1
        try:
            return _Call(self, images, listener or ProgressListener(), keep_centrality).run()
        finally:
            with self._lock:
                self._calls -= 1
                if self._closing and not self._calls:
                    self._close()

    def close(self) -> None:
        """Give back what was started, once the last call under way is done; the next call starts it again."""
        with self._lock:
            self._closing = True
            if not self._calls:
                self._close()

    def _close(self) -> None:
        self._runner = self._stages = None
        self._closing = False
        self._sessions.close()

    def runner(self, listener: ProgressListener) -> ImageRunner:
        """The runner of the whole graph, which is loaded when the first image needs it."""
        with self._lock:
            first = self._runner is None
            if self._runner is None:
                self._runner = self._sessions.enter_context(self.opening.runner())
            runner = self._runner
        if first:  # told without the lock: the listener may wait for others, or fail
            listener.on_event(SessionOpened(runner.provider, runner.precision))
            if runner.provider != "cpu" and (split := spread(runner.placement)):
                listener.on_event(Status(f"{split}; infexport inspect --provider {self.options.provider} shows which"))
        return runner

    def stages(self, listener: ProgressListener) -> StageRunner:
        """The runner of the stages, to be used by who holds `streaming`."""
        with self._lock:
            first = self._stages is None
            if self._stages is None:
                self._stages = self._sessions.enter_context(self.opening.stages())
            stages = self._stages
        if first:
            listener.on_event(SessionOpened(stages.provider, stages.precision))
        return stages

    def on_gpu(self, listener: ProgressListener) -> bool:
        """Tell whether images that are run whole are run on a GPU; the first call hears why engines are not used."""
        with self._lock:
            engines = bool(self.opening.engines)  # looked for once
            first, self._noted = not self._noted, True
        for note in self.opening.notes if first else ():
            listener.on_event(Status(note))
        if self._on_gpu is None:
            self._on_gpu = engines or (self.opening.seeks_gpu and self.runner(listener).provider != "cpu")
        return self._on_gpu


class _RecordingListener(ProgressListener):
    """Hands all on to another listener; keeps what that raises, which is no image's failure.

    Attributes:
        error: that was raised, or None.
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


class _Call:
    """One call of a `Run`: reads every image, plans how it is run, and batches or streams it."""

    def __init__(self, run: Run, images: Sequence[Item], listener: ProgressListener, keep_centrality: bool) -> None:
        self._run, self._bundle, self._options, self._listener = (
            run,
            run.bundle,
            run.options,
            _RecordingListener(listener),
        )
        self._keep_centrality = keep_centrality
        self._images, self._rows = list(images), dict[int, ImageResult]()
        self._transform = run.bundle.manifest.preprocessing.transform
        self._patch = run.bundle.manifest.config.patch_size
        self._on_gpu = run.on_gpu(self._listener)
        self._chunk = run.opening.chunk(run.options.chunk)
        self._room = run.options.memory or usual_memory()
        if "whole" in run.opening.engines and run.options.execution != "stream":
            run.runner(self._listener)  # one that cannot be loaded is no image's failure

    def run(self) -> list[ImageResult]:
        batches = _Batches(self._options.batch_size)
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
        self._tell_unused()
        return [self._rows[index] for index in range(len(self._images))]

    def _read_or_stream(self, index: int) -> Fitted | None:
        """An image that is to be run whole; None where it has been streamed, or that failed."""
        with ExitStack() as held:
            opened = self._read(index, held)
            if isinstance(opened, tuple):
                self._stream(index, *opened)
                return None
            return opened

    def _read(self, index: int, held: ExitStack) -> Fitted | tuple[Path | Pixels, Source, ExecutionMode] | None:
        """An image that is to be run whole; one to be streamed, and how; or None where that failed.

        Args:
            index: of the image.
            held: closed when it is not needed any more; a URL's copy is deleted then.
        """
        with self._failing([index], "while reading it"):
            item = _checked(self._images[index])
            image = item if isinstance(item, np.ndarray) else held.enter_context(local_copy(item))
            with named(item, image):
                source = open_source(image, self._bundle, self._options)
                way = self._way(source)
                if way != "whole":
                    return image, source, way
                pixels = source.rows.pixels if isinstance(source.rows, ArrayRows) else _pixels(image)
                return fit(pixels, self._patch, "native", self._transform, self._options.edge)
        return None

    def _way(self, source: Source) -> ExecutionMode:
        options, chunk, execution = self._options, self._chunk, self._options.execution
        # what is predicted is a CPU's memory, and the caches that make chunks faster are a CPU's
        if self._on_gpu and execution != "stream" and options.scratch is None:
            if execution == "whole" or self._takes_whole(source):
                return "whole"
            execution = "stream"
        if "stream" in self._run.opening.engines:  # what passes through them is in the GPU's memory
            chunk = CHUNK
        image = Image(source.tokens, source.grid[1] * self._patch, source.rows.loaded)
        return choose(self._bundle, options, image, self._room, chunk, execution)

    def _takes_whole(self, source: Source) -> bool:
        """Whether the GPU is to run an image at once; where nothing else may, it says itself why it cannot."""
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
        with self._failing(indices, _shapes(batch)):
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

    def _stream(self, index: int, image: Path | Pixels, source: Source, way: ExecutionMode) -> None:
        stages = self._opened([index], self._run.stages)
        if stages is None:
            return
        answer: Prediction | None = None
        with (
            self._run.streaming,
            self._failing([index], "while streaming it"),
            named(self._images[index], image),
        ):
            answer = self._streamed(index, image, source, way, stages)
        if answer is not None:
            self._answer(index, answer)

    def _opened(self, indices: Sequence[int], opens: Callable[[ProgressListener], T]) -> T | None:
        """A runner; where it cannot be opened, a call that has answers keeps them, and these images fail."""
        if not any(isinstance(row, Prediction) for row in self._rows.values()):
            return opens(self._listener)
        with self._failing(indices, "while loading what runs it"):
            return opens(self._listener)
        return None

    def _streamed(
        self, index: int, image: Path | Pixels, source: Source, way: ExecutionMode, stages: StageRunner
    ) -> Prediction:
        options, listener = self._options, self._listener
        name, item = display_name(self._images, index), self._images[index]
        scratch: Scratch | None = None
        with ExitStack() as stack:
            if way == "disk":
                root = options.scratch or cache_folder()
                identity = self._identity(item if is_url(item) else image, image, source.rows, stages)
                scratch = stack.enter_context(Scratch(root, identity, listener))
            found = stream(
                self._bundle,
                stages,
                source,
                scratch,
                self._chunk,
                options.tokens,
                lambda stage, done, total: listener.on_event(StageProgress(name, stage, done, total)),
                options.centrality,
            )
        kept = f"tokens {'on disk' if way == 'disk' else 'in memory'}"
        if options.tokens == "float16":
            kept += " in float16"
        return Prediction(
            name,
            source.grid,
            source.padded_share,
            found.logits,
            found.features,
            f"stream, {kept}",
            found.rounding,
            found.centrality,
        )

    def _identity(self, key: Path | str | Pixels, image: Path | Pixels, rows: Rows, stages: StageRunner) -> Identity:
        """What decides an image's answer to the last bit."""
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
        # a copy of what was fetched has another name each time
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
            # a new one: what was raised holds on to all that was in memory where it was
            if isinstance(error, InfexportError):
                reason = InfexportError(error.summary, error.details, error.hint)
            elif isinstance(error, OSError):
                reason = _system_error(error, doing)
            else:
                reason = _out_of_memory(doing)
            self._rows |= {index: Failure(display_name(self._images, index), reason) for index in indices}

    def _tell_unused(self) -> None:
        """Tell of options that had no effect, since images were run the other way."""
        answers = [row for row in self._rows.values() if isinstance(row, Prediction)]
        whole = sum(row.execution == "whole" for row in answers)
        for names, used, told in (
            (("chunk", "tokens"), whole < len(answers), "no image was streamed: {}; execution stream streams all"),
            (("batch_size",), whole > 0, "all images were streamed, one by one: {}"),
        ):
            named = self._options.named(names)
            if named and answers and not used:
                self._listener.on_event(Status(told.format(f"{' and '.join(named)} had no effect")))


class _Batches:
    """Groups of at most `size` images of equal shape, holding back no more than 4 batches of images."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: dict[tuple[int, ...], list[tuple[int, Fitted]]] = defaultdict(list)

    def add(self, index: int, image: Fitted) -> Iterator[list[tuple[int, Fitted]]]:
        """Add an image; yield the batch that is to be run now, if any."""
        group = self._waiting[image.pixels.shape]
        group.append((index, image))
        if len(group) == self._size:
            yield self._waiting.pop(image.pixels.shape)
        elif sum(map(len, self._waiting.values())) >= 4 * self._size:
            yield self._waiting.pop(max(self._waiting, key=lambda shape: len(self._waiting[shape])))

    def rest(self) -> Iterator[list[tuple[int, Fitted]]]:
        yield from self._waiting.values()


def open_source(image: Path | Pixels, bundle: Bundle, options: InferenceOptions) -> Source:
    """An image as it is asked for.

    Raises:
        InfexportError: it cannot be read, or cutting leaves nothing of it.
    """
    rows: Rows
    if options.size == "native":
        rows = open_rows(image) if isinstance(image, Path) else ArrayRows(image)
    else:
        rows = ArrayRows(resized(_pixels(image), options.size, bundle.manifest.preprocessing.transform))
    return Source(rows, bundle.manifest.config.patch_size, options.edge)


def _pixels(image: Path | Pixels) -> Pixels:
    return read_image(image) if isinstance(image, Path) else image


def _checked(item: object) -> Path | str | Pixels:
    """An item that somebody gave, as a file, a URL or pixels.

    Raises:
        InfexportError: it is none of them.
    """
    if isinstance(item, PillowImage.Image):
        return pixels_from(item, "an image of Pillow")
    if isinstance(item, np.ndarray):
        if item.dtype == np.uint8 and item.ndim == 3 and item.shape[2] == 3 and item.size:
            return item
        received = f"received {item.dtype} {list(item.shape)}, expected uint8 [height, width, 3]"
        raise InfexportError("an array that is no image", received)
    path = os.fspath(item) if isinstance(item, os.PathLike) else item
    if not isinstance(path, str):
        raise InfexportError(
            "an item that is no image",
            f"received {type(item).__name__}, expected a file, a URL, uint8 [height, width, 3], or an image of Pillow",
        )
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("it has a NUL character")
    except ValueError as error:  # halves of surrogate pairs, too
        raise InfexportError(f"no name of a file: {_text(path)}", str(error)) from error
    return path if is_url(path) else Path(path)


def display_name(images: Sequence[Any], index: int) -> str:
    """The name of an image, for people."""
    item = images[index]
    if isinstance(item, PillowImage.Image):
        item = getattr(item, "filename", "")
    if is_url(item):
        return shown(item)
    path = os.fspath(item) if isinstance(item, os.PathLike) else item
    return _text(path) if isinstance(path, str) and path else f"image {index}"


def _text(path: str) -> str:
    """A path that can be written in UTF-8: a name that is no UTF-8 must not end the run."""
    try:
        return os.fsencode(path).decode("utf-8", "replace")
    except UnicodeEncodeError:
        return path.encode("utf-8", "replace").decode()


def _shapes(batch: Sequence[tuple[int, Fitted]]) -> str:
    return f"a batch of {len(batch)} images of {list(batch[0][1].pixels.shape)}"


def _out_of_memory(doing: str) -> InfexportError:
    return InfexportError("not enough memory for an image", doing, "smaller images or batches need less memory")


def _system_error(error: OSError, doing: str) -> InfexportError:
    where = f": {error.filename}" if error.filename else ""
    hint = "check the path, its permissions and the room left on the disk"
    reason = error.strerror or str(error) or type(error).__name__  # never empty: a row without is no failure
    return InfexportError(f"{reason}{where}", doing, hint)


def not_finite(file: str) -> InfexportError:
    """The error of an answer that has no number for a class."""
    return InfexportError(
        f"the model's answer is not finite: {file}",
        hint="infexport validate parity --images tells whether PyTorch's is",
    )
