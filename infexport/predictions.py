"""Logits → labels, and files that hold them."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from infexport.errors import InfexportError

SUFFIXES = (".json", ".csv", ".npz")


@dataclass(frozen=True)
class Prediction:
    """The answer for one image.

    Attributes:
        file: as the user named it.
        grid: patches, `(height, width)`.
        padded_share: share of the pixels that are not the image's.
        logits: `[classes]` float32.
        features: `[E]` float32.
    """

    file: str
    grid: tuple[int, int]
    padded_share: float
    logits: NDArray[np.float32]
    features: NDArray[np.float32]

    def top_k(self, k: int, labels: Sequence[str] | None) -> list[dict[str, Any]]:
        """The k likeliest classes, likeliest first: `index`, `label` and `probability` (softmax, float64)."""
        exponents = np.exp(self.logits.astype(np.float64) - self.logits.max())
        probabilities = exponents / exponents.sum()
        order = np.argsort(-probabilities, kind="stable")[:k]
        return [
            {
                "index": int(i),
                "label": labels[i] if labels else str(i),
                "probability": float(probabilities[i]),
            }
            for i in order
        ]

    def to_dict(self, k: int, labels: Sequence[str] | None) -> dict[str, Any]:
        return {
            "file": self.file,
            "grid": list(self.grid),
            "padded_share": self.padded_share,
            "top": self.top_k(k, labels),
        }


def check_output(path: Path) -> None:
    """Find out before the long work, not after it, that an output cannot be written.

    Raises:
        InfexportError: an unknown suffix, or a place that cannot be written to.
    """
    if path.suffix not in SUFFIXES:
        raise InfexportError(
            f"unknown kind of output: {path}",
            f"received {path.suffix or 'no suffix'}, expected {', '.join(SUFFIXES)}",
        )
    if path.is_dir():
        raise InfexportError(f"the output is a folder: {path}", hint="name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InfexportError(
            f"cannot write the output: {path}", str(error), "choose an --output that can be written to"
        ) from error


def write(
    path: Path,
    predictions: Sequence[Prediction],
    k: int,
    labels: Sequence[str] | None,
    features: bool,
    warnings: Sequence[str],
) -> None:
    """Write predictions as JSON, CSV or npz, by the suffix; the file appears when it is whole.

    In an npz: `files`, `logits [n, classes]`, and `features [n, E]` if asked for.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _WRITERS[path.suffix](file, predictions, k, labels, features, warnings)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def document(
    predictions: Sequence[Prediction],
    k: int,
    labels: Sequence[str] | None,
    features: bool,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Predictions as one JSON document, `features` a list per image if asked for."""
    images = []
    for prediction in predictions:
        image = prediction.to_dict(k, labels)
        if features:
            image["features"] = prediction.features.tolist()
        images.append(image)
    return {"warnings": list(warnings), "images": images}


def _write_json(file: BinaryIO, *arguments: Any) -> None:
    file.write((json.dumps(document(*arguments), indent=2, ensure_ascii=False) + "\n").encode())


def _write_csv(
    file: BinaryIO,
    predictions: Sequence[Prediction],
    k: int,
    labels: Sequence[str] | None,
    features: bool,
    _: Any,
) -> None:
    rows = [prediction.top_k(k, labels) for prediction in predictions]
    width = max((len(row) for row in rows), default=0)
    header = ["file", "grid_height", "grid_width", "padded_share"]
    header += [f"{name}_{rank}" for rank in range(1, width + 1) for name in ("label", "probability")]
    if features and predictions:
        header += [f"feature_{i}" for i in range(len(predictions[0].features))]
    lines = [header]
    for prediction, row in zip(predictions, rows, strict=True):
        line = [prediction.file, *map(str, prediction.grid), f"{prediction.padded_share:.6g}"]
        line += [value for top in row for value in (top["label"], f"{top['probability']:.6g}")]
        if features:
            line += [f"{value:.9g}" for value in prediction.features]
        lines.append(line)
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    csv.writer(text).writerows(lines)
    text.detach()


def _write_npz(
    file: BinaryIO,
    predictions: Sequence[Prediction],
    k: int,
    labels: Sequence[str] | None,
    features: bool,
    _: Any,
) -> None:
    arrays: dict[str, Any] = {
        "files": np.array([prediction.file for prediction in predictions]),
        "logits": np.stack([prediction.logits for prediction in predictions]),
    }
    if features:
        arrays["features"] = np.stack([prediction.features for prediction in predictions])
    np.savez(file, **arrays)


_WRITERS = {".json": _write_json, ".csv": _write_csv, ".npz": _write_npz}
