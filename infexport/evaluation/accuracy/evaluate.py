"""Bundle and labelled images → accuracy, beside PyTorch's: is what is deployed as right as what was trained?"""

from __future__ import annotations

import csv
import io
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from infexport.bundle import Bundle
from infexport.errors import InfexportError
from infexport.evaluation.accuracy.dataset import Classes, Labelled
from infexport.evaluation.accuracy.metrics import Accuracy, Agreement, Logits, OfClass, accuracy, agreement
from infexport.evaluation.parity.metrics import NETWORK
from infexport.inference.options import InferenceOptions
from infexport.inference.prediction import Failure, ImageResult, Prediction
from infexport.inference.predictor import Predictor
from infexport.inference.runners.factory import RunnerFactory
from infexport.outputs.files import written
from infexport.outputs.results import ELSEWHERE
from infexport.system.progress import (
    ItemsDone,
    ProgressEvent,
    ProgressListener,
    SessionOpened,
)

SUFFIXES = (".csv",)


class Clock(ProgressListener):
    """Passes on what it is told, and times the images.

    Attributes:
        ran: where and in which precision, once it is known.
    """

    def __init__(self, listener: ProgressListener) -> None:
        self._listener = listener
        self._first: float | None = None
        self._last, self._since = 0.0, 0
        self.ran: list[str] = []

    def on_event(self, event: ProgressEvent) -> None:
        if isinstance(event, ItemsDone):
            self._last = time.perf_counter()
            if self._first is None:
                self._first = self._last  # before it something was loaded
            else:
                self._since += event.count
        elif isinstance(event, SessionOpened):
            self.ran = list(dict.fromkeys([*self.ran, f"{event.provider} with {event.precision}"]))
        self._listener.on_event(event)

    @property
    def rate(self) -> float | None:
        """Images per second, the first batch and what was loaded for it left out; None where there was no second."""
        return self._since / (self._last - self._first) if self._since and self._first is not None else None


@dataclass(frozen=True)
class LabelledPrediction:
    """An image of a class, by its index, and the answers; PyTorch's is None where it was not asked or failed."""

    label: int
    bundle: Prediction
    pytorch: Prediction | None


@dataclass(frozen=True)
class AccuracyResult:
    """Accuracy of a bundle; true where there are images, all were judged, and top-1 is what was required.

    Attributes:
        path, verified: of the bundle, and whether its hashes were right.
        classes: of the bundle.
        images: those with an answer, in the order given.
        failed: those without: what could not be read or run, or what PyTorch could not.
        ran, rate: where the bundle ran, in words, and images per second.
        pytorch, pytorch_rate: PyTorch's version and threads, and images per second; None where it was not asked.
        required: the least top-1, in [0, 1], or None.
    """

    path: Path
    verified: bool
    classes: Classes
    images: tuple[LabelledPrediction, ...]
    failed: tuple[Failure, ...]
    ran: str
    rate: float | None
    pytorch: str | None
    pytorch_rate: float | None
    required: float | None

    def __bool__(self) -> bool:
        return bool(self.images) and not self.failed and self.enough is not False

    @property
    def enough(self) -> bool | None:
        """Tell whether top-1 reaches the required share; None where none is required."""
        return None if self.required is None else self.accuracy.top1.share >= self.required

    @cached_property
    def accuracy(self) -> Accuracy:
        """Accuracy of the bundle."""
        return self._accuracy([image.bundle for image in self.images], self.images)

    @property
    def compared(self) -> list[tuple[LabelledPrediction, Prediction]]:
        """Images with both answers, and PyTorch's."""
        return [(image, image.pytorch) for image in self.images if image.pytorch is not None]

    @cached_property
    def pytorch_accuracy(self) -> Accuracy | None:
        if self.pytorch is None:
            return None
        return self._accuracy([other for _, other in self.compared], [image for image, _ in self.compared])

    @cached_property
    def agreement(self) -> Agreement | None:
        if self.pytorch is None:
            return None
        ours, theirs = [image.bundle for image, _ in self.compared], [other for _, other in self.compared]
        return agreement(self._logits(ours), self._logits(theirs))

    def disagreements(self) -> list[dict[str, Any]]:
        """Images where the bundle's top-1 is not PyTorch's: `file`, `label`, and both answers with probability."""
        rows = self.agreement.disagreeing if self.agreement else ()
        return [self._told(self.compared[row][0]) for row in rows]

    def executions(self) -> dict[str, int]:
        """Return execution → number of images: `whole`, or a form of streaming."""
        return dict(Counter(image.bundle.execution for image in self.images))

    def to_dict(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "bundle": str(self.path),
            "verified": self.verified,
            "passed": bool(self),
            "required_top1": self.required,
            "images": len(self.images),
            **self._accuracy_to_dict(self.accuracy),
            "classes": [self._class_to_dict(one) for one in self.accuracy.classes],
            "ran": self.ran,
            "executions": self.executions(),
            "images_per_second": self.rate,
            "pytorch": None,
            "failed": [failure.to_dict() for failure in self.failed],
        }
        if self.pytorch_accuracy is not None and self.agreement is not None:
            document["pytorch"] = {
                "compared": f"the bundle with {NETWORK}",
                "version": self.pytorch,
                "images": len(self.compared),
                **self._accuracy_to_dict(self.pytorch_accuracy),
                "images_per_second": self.pytorch_rate,
                "agreement": self.agreement.same.to_dict(),
                "largest_difference": self.agreement.largest_difference,
                "disagreements": self.disagreements(),
            }
        return document

    def write(self, path: Path) -> None:
        """Write a CSV with a line per image; the file appears when it is whole.

        Raises:
            InfexportError: it cannot be written.
        """
        header = ["file", "label", "predicted", "probability"]
        if self.pytorch is not None:
            header += ["pytorch", "pytorch_probability"]
        with written(path, "output", ELSEWHERE) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
            writer = csv.writer(text)
            writer.writerow(header)
            for image in self.images:
                told = self._told(image)
                line = [told["file"], told["label"]]
                for answer in (told["bundle"], told["pytorch"]):
                    line += [answer["label"], f"{answer['probability']:.6g}"] if answer else ["", ""]
                writer.writerow(line[: len(header)])
            text.detach()

    def _told(self, image: LabelledPrediction) -> dict[str, Any]:
        answers = {"bundle": image.bundle, "pytorch": image.pytorch}
        tops = {name: one and one.top_k(1, self.classes.labels)[0] for name, one in answers.items()}
        return {"file": image.bundle.file, "label": self.classes.name(image.label), **tops}

    def _accuracy(self, answers: Sequence[Prediction], images: Sequence[LabelledPrediction]) -> Accuracy:
        return accuracy(self._logits(answers), np.array([image.label for image in images], np.int64))

    def _logits(self, answers: Sequence[Prediction]) -> Logits:
        return np.array([answer.logits for answer in answers], np.float32).reshape(-1, self.classes.count)

    def _accuracy_to_dict(self, found: Accuracy) -> dict[str, Any]:
        return {"top1": found.top1.to_dict(), "top5": found.top5 and found.top5.to_dict()}

    def _class_to_dict(self, found: OfClass) -> dict[str, Any]:
        confused = found.confused
        other = None if confused is None else {"label": self.classes.name(confused), "images": found.times}
        return {
            "index": found.index,
            "label": self.classes.name(found.index),
            "images": found.right.total,
            "right": found.right.count,
            "recall": found.right.share,
            "confused_with": other,
        }


def evaluate(
    bundle: Bundle,
    images: Sequence[Labelled],
    classes: Classes,
    options: InferenceOptions,
    listener: ProgressListener,
    network: RunnerFactory | None = None,
    required: float | None = None,
    network_batch_size: int | None = None,
) -> AccuracyResult:
    """Run a bundle on images whose class is known, and PyTorch on those that it could answer.

    Args:
        bundle: opened, verified or not.
        images: as `infexport.evaluation.accuracy.dataset` reads them.
        classes: of the bundle.
        options: how the bundle is run.
        listener: told of both runs; of every image once for each.
        network: opens the checkpoint in PyTorch; None judges the bundle alone.
        required: the least top-1, in [0, 1].
        network_batch_size: images at once in PyTorch; None for as many as in the bundle.

    Raises:
        InfexportError: the bundle cannot be run at all.
    """
    files = [image.file for image in images]
    clock, network_clock = Clock(listener), Clock(listener)
    with Predictor.of(bundle, options) as predictor:
        answers, failed = _parted(predictor.predict(files, clock))
    answered = sorted(answers)
    theirs: dict[int, Prediction] = {}
    if network is not None:
        listener.on_event(ItemsDone(len(files) - len(answered)))
        # in the same batches, but whole: PyTorch has no stages
        alone = InferenceOptions(
            size=options.size,
            edge=options.edge,
            execution="whole",
            memory=options.memory,
            batch_size=network_batch_size or options.batch_size,
        )
        with Predictor.of(bundle, alone, network) as predictor:
            found, failures = _parted(predictor.predict([files[index] for index in answered], network_clock))
        theirs = {answered[place]: answer for place, answer in found.items()}
        failed += _by_pytorch(failures)
    return AccuracyResult(
        bundle.path,
        bundle.verified,
        classes,
        tuple(LabelledPrediction(images[index].label, answers[index], theirs.get(index)) for index in answered),
        tuple(failed),
        ", ".join(clock.ran),
        clock.rate,
        None if network is None else network.runner().version,
        network_clock.rate,
        required,
    )


def _parted(rows: Sequence[ImageResult]) -> tuple[dict[int, Prediction], list[Failure]]:
    """Predictions by their place, and failures."""
    answers = {index: row for index, row in enumerate(rows) if isinstance(row, Prediction)}
    return answers, [row for row in rows if isinstance(row, Failure)]


def _by_pytorch(failures: Sequence[Failure]) -> Iterator[Failure]:
    """Failures of an image that the bundle could answer."""
    for failure in failures:
        error = failure.error
        details = f"{error.summary}\n{error.details}".rstrip()
        told = InfexportError(f"PyTorch: {failure.file}", details, "--no-pytorch judges the bundle alone")
        yield Failure(failure.file, told)
