"""Images → predictions."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from infexport.bundle import Bundle
from infexport.errors import InfexportError
from infexport.images import read_image
from infexport.predictions import Failure, Prediction
from infexport.runners import Runner
from infexport.transform import Fitted, fit, transform_of


def run(
    bundle: Bundle,
    runner: Runner,
    files: Sequence[Path],
    size: Literal["trained", "native"] | int = "trained",
    edge: Literal["pad", "crop"] = "pad",
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Prediction], list[Failure]]:
    """Run images through a bundle, images of equal grids together.

    Args:
        bundle: whose preprocessing is applied.
        runner: entered.
        files: images.
        size: `trained` applies the recorded evaluation transform, `native` leaves the image as it is, N is the
            transform at N pixels.
        edge: how a side becomes a whole number of patches: `pad` replicates the edge, `crop` cuts.
        batch_size: the most images at a time. Images are never padded to a common size: every token enters the
            pooled state.
        progress: told of every image that is done, with 1.

    Returns:
        Predictions and failures, each in the order of `files`.
    """
    answers: dict[int, Prediction] = {}
    failures: dict[int, Failure] = {}

    patch = bundle.manifest.config["patch_size"]
    transform = transform_of(bundle.manifest.preprocessing)

    def name(index: int) -> str:
        # a name that is no UTF-8 must not end the run when it is written
        return os.fsencode(files[index]).decode("utf-8", "replace")

    def fitted() -> Iterator[tuple[int, Fitted]]:
        for index, file in enumerate(files):
            try:
                image = fit(read_image(file), patch, size, transform, edge)
            except (InfexportError, MemoryError) as error:
                reason = error if isinstance(error, InfexportError) else _out_of_memory([])
                failures[index] = Failure(name(index), reason)
                progress(1)
            else:
                yield index, image

    for batch in _batches(fitted(), batch_size):
        try:
            values = runner.run(np.stack([image.pixels for _, image in batch]))
        except (InfexportError, MemoryError) as error:
            reason = error if isinstance(error, InfexportError) else _out_of_memory(batch)
            failures |= {index: Failure(name(index), reason) for index, _ in batch}
        else:
            for row, (index, image) in enumerate(batch):
                grid = (image.pixels.shape[0] // patch, image.pixels.shape[1] // patch)
                logits, features = values["logits"][row], values["features"][row]
                if np.isfinite(logits).all():
                    answers[index] = Prediction(name(index), grid, image.padded_share, logits, features)
                else:
                    failures[index] = Failure(name(index), _not_finite(name(index)))
        progress(len(batch))
    return [answers[i] for i in sorted(answers)], [failures[i] for i in sorted(failures)]


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
