"""Prediction of many images with Ray Data, whose pool of actors repeats the work of an actor that died."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from infexport.errors import InfexportError
from infexport.images.fetch import is_url
from infexport.inference.items import display_name
from infexport.inference.prediction import Failure, ImageResult
from infexport.inference.predictor import Predictor, rows_from_columns, to_columns
from infexport.integrations.ray.cluster import Workers, last_line
from infexport.system.progress import (
    ItemsDone,
    ProgressEvent,
    ProgressListener,
    SessionOpened,
    Status,
)
from infexport.system.urls import scrubbed

PART = 128
"""Images sent to a worker at once, and repeated if it dies. Sending a part takes tens of milliseconds."""
RETRIES = 2
"""Retries of a part before its images are tried one by one, and of a single image before it fails."""
PLACE, FATAL, LOST, RAN = "place", "fatal", "lost", "ran"
"""Columns in addition to a predictor's: index of the part; the bundle cannot be run at all; the part is not retried any
more; statuses and sessions of its run, as text.
"""


class Attempts:
    """Actor that counts how often each part was started.

    A worker that dies loses its own count, and Ray Data retries without limit.
    """

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, place: int) -> int:
        self._begun[place] += 1
        return self._begun[place]


class RunNotes(ProgressListener):
    """Collects statuses and opened sessions, which the driver reports."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, ...]] = []

    def on_event(self, event: ProgressEvent) -> None:
        if isinstance(event, Status):
            self.ran.append((event.message,))
        elif isinstance(event, SessionOpened):
            self.ran.append((event.provider, event.precision))


class Worker:
    """A predictor in its own process. File names are passed as bytes: they need not be UTF-8.

    Args:
        predictor: predictor that runs the images.
        attempts: handle of the `Attempts` actor.
    """

    def __init__(self, predictor: Predictor, attempts: Any) -> None:
        self._predictor, self._attempts, self._notes = predictor, attempts, RunNotes()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        import ray

        names = [os.fsdecode(name) for name in batch["file"]]
        fatal, labels, widths = False, None, (1, 1)
        lost = ray.get(self._attempts.begin.remote(int(batch[PLACE][0]))) > RETRIES + 1
        rows: list[ImageResult] = [Failure(name, InfexportError("given up")) for name in names]
        try:
            rows = rows if lost else self._predictor.predict(names, self._notes)
            bundle = self._predictor.bundle
            labels, widths = bundle.labels, (bundle.manifest.config.num_classes, bundle.manifest.config.embed_dim)
        except InfexportError as error:  # Ray Data would reduce it to a text
            rows, fatal = [Failure(name, error) for name in names], True
        except Exception as error:  # the worker survives it
            if len(names) > 1:  # one image causes it, which is found when they are tried one by one
                raise
            text = scrubbed(f"{type(error).__name__}: {' '.join(str(error).split())}", *filter(is_url, names))
            rows = [Failure(names[0], InfexportError("a worker failed", text, "run this image without --ray"))]
        columns = to_columns(rows, labels, *widths)
        ran = "\n".join("\t".join(fields) for fields in self._notes.ran)
        count = len(rows)
        states = {FATAL: np.full(count, fatal), LOST: np.full(count, lost), RAN: np.array([ran] * count, np.str_)}
        return {**columns, PLACE: batch[PLACE], **states}


def predict(
    ray: ModuleType,
    workers: Workers,
    predictor: Predictor,
    images: Sequence[Path | str],
    batch_size: int,
    listener: ProgressListener,
) -> list[ImageResult]:
    """Return a prediction or a failure for every image, in order; see `Predictor.predict`.

    An image whose worker dies on every attempt is a failure.

    Args:
        ray: Ray's module, connected.
        workers: number and resources of the workers.
        predictor: sent to the workers; the bundle must be at the same path for all.
        images: files that the workers can read, or URLs.
        batch_size: batch size of the predictor. Images are batched in this order, so that results equal those of one
            process.
        listener: receives an event for every part that is done.

    Raises:
        InfexportError: a worker cannot run the bundle at all.
    """
    size = part_size(len(images), workers.count, batch_size)
    found: dict[int, ImageResult] = {}
    # then, one by one, the images of parts whose worker died each time: one of them may be the cause
    for each in (size, 1):
        missing = [index for index in range(len(images)) if index not in found]
        parts = [missing[i : i + each] for i in range(0, len(missing), each)]
        try:
            for part in _done(ray, workers, predictor, images, parts, listener):
                found |= part
                listener.on_event(ItemsDone(len(part)))
        except ray.exceptions.RayError as error:
            hint = "run without --ray to see whether an image is the cause"
            urls = [image for image in images if is_url(image)]
            raise InfexportError("the workers cannot continue", scrubbed(last_line(error), *urls), hint) from error
    for index in set(range(len(images))) - found.keys():
        died = InfexportError(
            f"the worker died on every attempt: {display_name(images, index)}",
            f"the image was tried {RETRIES + 1} times alone",
            "it may need more memory: with fewer --workers each has more",
        )
        found[index] = Failure(display_name(images, index), died)
        listener.on_event(ItemsDone(1))
    return [found[index] for index in range(len(images))]


def part_size(images: int, workers: int, batch_size: int) -> int:
    """Return the images of a part: whole batches, about PART images, fewer where workers would be idle at the end."""
    share = min(PART, -(-images // (4 * workers)))
    return max(1, share // batch_size) * batch_size


def _done(
    ray: ModuleType,
    workers: Workers,
    predictor: Predictor,
    images: Sequence[Path | str],
    parts: Sequence[Sequence[int]],
    listener: ProgressListener,
) -> Iterator[dict[int, ImageResult]]:
    """Yield the rows of every part by image index, except of parts whose worker died on every attempt."""
    import pyarrow as pa
    import ray.data as data

    if not parts:
        return
    context = data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # lost parts are found by their missing rows
    tables = [
        pa.table({
            "file": pa.array([os.fsencode(images[index]) for index in part], pa.binary()),
            PLACE: [place] * len(part),
        })
        for place, part in enumerate(parts)
    ]  # fmt: skip
    answers = data.from_arrow(tables).map_batches(
        Worker,
        fn_constructor_args=(predictor, ray.remote(num_cpus=0)(Attempts).remote()),
        batch_size=None,  # a table is a part
        compute=data.ActorPoolStrategy(size=min(workers.count, len(tables))),
        num_cpus=workers.threads,
        num_gpus=workers.gpus or None,
    )
    reported: set[str] = set()
    for batch in answers.iter_batches(batch_size=None, batch_format="numpy"):
        rows = rows_from_columns(batch)
        if batch[LOST].any():
            continue
        if batch[FATAL].any():
            assert isinstance(rows[0], Failure)
            raise rows[0].error
        for line in str(batch[RAN][0]).splitlines():
            if line not in reported:
                reported.add(line)
                provider, _, precision = line.partition("\t")
                listener.on_event(SessionOpened(provider, precision)) if precision else listener.on_event(Status(line))
        yield dict(zip(parts[batch[PLACE][0]], rows, strict=True))
