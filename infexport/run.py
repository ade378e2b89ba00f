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

from infexport.bundle import Bundle, sha256
from infexport.centrality import CENTRALITY, of_tokens
from infexport.errors import InfexportError
from infexport.execution import Image, Policy, Way, choose, usual_memory
from infexport.images import Pixels, read_image
from infexport.machine import cache_folder, usable_cores
from infexport.predictions import Failure, Prediction, Row
from infexport.remote import Item, at_hand, is_url, shown
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

    What the first image starts serves those of later calls, until it is closed.

    Args:
        bundle: whose preprocessing is applied.
        request: what is asked for.
        opening: what opens the runners; None for what the request names.
    """

    def __init__(self, bundle: Bundle, request: Request, opening: Opening | None = None) -> None:
        self.bundle, self.request, self.listener = bundle, request, Listener()
        self._transform = transform_of(bundle.manifest.preprocessing)
        self._patch = bundle.manifest.config["patch_size"]
        self._rows: dict[int, Row] = {}
        self._sessions = ExitStack()
        ways = request.provider, request.engine, request.threads, request.policy.centrality
        self._opening = opening or Opening(bundle, *ways)

    def close(self) -> None:
        """Give back what was started; the next call starts it again."""
        self._sessions.close()
        for name in ("_runner", "_stages"):
            vars(self).pop(name, None)

    @cached_property
    def _policy(self) -> Policy:
        """As asked for, with the chunk that engines were built for and what memory there is where none was named."""
        policy = self.request.policy
        return replace(policy, chunk=self._opening.chunk(policy.chunk), memory=policy.memory or usual_memory())

    @cached_property
    def _on_gpu(self) -> bool:
        """Whether images that are run whole are run on a GPU; what is first asked of a run, so notes are told here."""
        on_gpu = bool(self._opening.engines) or (self._opening.seeks_gpu and self._runner.provider != "cpu")
        for note in self._opening.notes:
            self.listener.status(note)
        return on_gpu

    def __call__(self, images: Sequence[Item], listener: Listener | None = None) -> list[Row]:
        """A row for every image, in their order: what is wrong with an image is a failure of that image.

        Args:
            images: as of `remote.Item`.
            listener: told of it.

        Raises:
            InfexportError: the bundle cannot be run at all.
        """
        self._rows, self.listener = {}, listener or Listener()
        _ = self._on_gpu
        if "whole" in self._opening.engines and self._policy.execution != "stream":
            _ = self._runner  # one that cannot be loaded is no image's failure
        for batch in _batches(self._whole_images(images), self.request.policy.batch):
            runner = self._runner
            with self._failing(images, [index for index, _ in batch], _shapes(batch)):
                self._run_whole(runner, batch, images)
            self.listener.image(len(batch))
        rows, self._rows, self.listener = self._rows, {}, Listener()  # which may hold on to much
        return [rows[index] for index in range(len(images))]

    @contextmanager
    def _failing(self, images: Sequence[Item], indices: Sequence[int], doing: str) -> Iterator[None]:
        """What goes wrong here is a failure of these images."""
        try:
            yield
        except (InfexportError, MemoryError) as error:
            # a new one: what was raised holds on to all that was in memory where it was
            reason = _out_of_memory(doing)
            if isinstance(error, InfexportError):
                reason = InfexportError(error.summary, error.details, error.hint)
            self._rows |= {index: Failure(name_of(images, index), reason) for index in indices}

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

    def _whole_images(self, images: Sequence[Item]) -> Iterator[tuple[int, Fitted]]:
        """The images that are run whole; what is streamed is run here."""
        for index, item in enumerate(images):
            opened: Fitted | tuple[Source, Way] | None = None
            with ExitStack() as held:
                with self._failing(images, [index], "while reading it"):
                    image = held.enter_context(at_hand(item)) if isinstance(item, Path | str) else _checked(item)
                    opened = self._open(image)
                if isinstance(opened, tuple):
                    stages = self._stages
                    with self._failing(images, [index], "while streaming it"):
                        key = item if is_url(item) else image
                        self._answer(index, self._stream(name_of(images, index), key, image, *opened, stages))
            if isinstance(opened, Fitted):
                yield index, opened
            else:
                self.listener.image(1)

    def _open(self, image: Path | Pixels) -> Fitted | tuple[Source, Way]:
        """An image that is to be run whole, or one to be streamed, and how."""
        source = source_of(image, self.bundle, self.request)
        way = self._way(source, source.rows.loaded)
        if way != "whole":
            return source, way
        pixels = source.rows.pixels if isinstance(source.rows, ArrayRows) else _pixels(image)
        return fit(pixels, self._patch, "native", self._transform, self.request.edge)

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

    def _stream(
        self, name: str, key: Path | str | Pixels, image: Path | Pixels, source: Source, way: Way, stages: Stages
    ) -> Prediction:
        policy, listener = self._policy, self.listener
        scratch: Scratch | None = None
        with ExitStack() as stack:
            if way == "disk":
                root = policy.scratch or cache_folder()
                identity = self._identity(key, image, source.rows, stages)
                scratch = stack.enter_context(Scratch(root, identity, listener.status))
            found = stream(
                self.bundle,
                stages,
                source,
                scratch,
                policy.chunk or CHUNK,
                policy.half,
                lambda stage, done, total: listener.sweep(name, stage, done, total),
                policy.centrality,
            )
        kept = f"tokens {'on disk' if way == 'disk' else 'in memory'}{' in float16' if policy.half else ''}"
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

    def _identity(self, key: Path | str | Pixels, image: Path | Pixels, rows: Rows, stages: Stages) -> Identity:
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
        if isinstance(key, str):  # its copy has another name each time
            assert isinstance(image, Path), "fetched"
            return Identity(np.frombuffer(key.encode(), np.uint8), facts | {"content": sha256(image)})
        return Identity(key, facts)

    def _run_whole(self, runner: Runner, batch: Sequence[tuple[int, Fitted]], images: Sequence[Item]) -> None:
        values = runner.run(np.stack([image.pixels for _, image in batch]))
        for row, (index, image) in enumerate(batch):
            grid = (image.pixels.shape[0] // self._patch, image.pixels.shape[1] // self._patch)
            logits, features = values["logits"][row], values["features"][row]
            centrality = of_tokens(values[CENTRALITY][row], grid) if self._policy.centrality else None
            name = name_of(images, index)
            self._answer(index, Prediction(name, grid, image.padded_share, logits, features, centrality=centrality))

    def _answer(self, index: int, answer: Prediction) -> None:
        if np.isfinite(answer.logits).all():
            self._rows[index] = answer if self.request.keep_centrality else replace(answer, centrality=None)
            self.listener.answer(index, answer)
        else:
            self._rows[index] = Failure(answer.file, not_finite(answer.file))


def source_of(image: Path | Pixels, bundle: Bundle, request: Request) -> Source:
    """An image as it is asked for.

    Raises:
        InfexportError: it cannot be read, or cutting leaves nothing of it.
    """
    rows: Rows
    if request.size == "native":
        rows = open_rows(image) if isinstance(image, Path) else ArrayRows(image)
    else:
        rows = ArrayRows(resized(_pixels(image), request.size, transform_of(bundle.manifest.preprocessing)))
    return Source(rows, bundle.manifest.config["patch_size"], request.edge)


def _pixels(image: Path | Pixels) -> Pixels:
    return read_image(image) if isinstance(image, Path) else image


def _checked(pixels: Pixels) -> Pixels:
    if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size:
        return pixels
    received = f"received {pixels.dtype} {list(pixels.shape)}, expected uint8 [height, width, 3]"
    raise InfexportError("an array that is no image", received)


def name_of(images: Sequence[Item], index: int) -> str:
    """Of an image, for people."""
    item = images[index]
    if is_url(item):
        return shown(item)
    # a name that is no UTF-8 must not end the run when it is written
    return os.fsencode(item).decode("utf-8", "replace") if isinstance(item, Path | str) else f"image {index}"


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


def not_finite(file: str) -> InfexportError:
    """The error of an answer that has no number for a class."""
    return InfexportError(
        f"the model's answer is not finite: {file}",
        hint="infexport validate parity --images tells whether PyTorch's is",
    )
