"""Logits → labels, and files that hold them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from infexport.centrality import Centrality
from infexport.errors import InfexportError
from infexport.outputs import check_writable, written

SUFFIXES = (".json", ".csv", ".npz")
ELSEWHERE = "choose an --output that can be written to"


def top_k(logits: NDArray[Any], k: int, labels: Sequence[str] | None) -> list[dict[str, Any]]:
    """As of `Prediction.top_k`, of logits `[classes]`."""
    exponents = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = exponents / exponents.sum()
    order = np.argsort(-probabilities, kind="stable")[:k]
    return [
        {"index": int(i), "label": labels[i] if labels else str(i), "probability": float(probabilities[i])}
        for i in order
    ]


@dataclass(frozen=True)
class Prediction:
    """The answer for one image.

    Attributes:
        file: as the user named it.
        grid: patches, `(height, width)`.
        padded_share: share of the pixels that are not the image's.
        logits: `[classes]` float32.
        features: `[E]` float32.
        execution: `whole`, or how it was streamed.
        rounding: relative error of one rounding of the tokens that were kept in float16; 0 where none were.
        centrality: of the tokens, where it was asked for.
    """

    file: str
    grid: tuple[int, int]
    padded_share: float
    logits: NDArray[np.float32]
    features: NDArray[np.float32]
    execution: str = "whole"
    rounding: float = 0.0
    centrality: Centrality | None = None

    def top_k(self, k: int, labels: Sequence[str] | None) -> list[dict[str, Any]]:
        """The k likeliest classes, likeliest first: `index`, `label` and `probability` (softmax, float64)."""
        return top_k(self.logits, k, labels)

    def to_dict(self, k: int, labels: Sequence[str] | None) -> dict[str, Any]:
        return {
            "file": self.file,
            "grid": list(self.grid),
            "padded_share": self.padded_share,
            "execution": self.execution,
            **({"rounding": self.rounding} if self.rounding else {}),
            "top": self.top_k(k, labels),
        }


def check_output(path: Path) -> None:
    """Find out before the long work, not after it, that an output cannot be written.

    Raises:
        InfexportError: an unknown suffix, or a place that cannot be written to.
    """
    check_writable(path, "output", SUFFIXES, ELSEWHERE)


@dataclass(frozen=True)
class Failure:
    """An image that could not be read or run; the others go on."""

    file: str
    error: InfexportError

    def to_dict(self) -> dict[str, str]:
        return {"file": self.file, **self.error.to_dict()}


@dataclass(frozen=True)
class Results:
    """All answers, and how they are to be shown.

    Attributes:
        predictions, failures: in the order of the images.
        labels: of the classes, or None.
        warnings: what a reader must know before trusting the answers.
        top_k: classes per image.
        features: whether they are written too.
        shape: classes and E, for a file with no predictions in it.
        centrality: whether it is written too.
    """

    predictions: Sequence[Prediction]
    failures: Sequence[Failure]
    labels: Sequence[str] | None
    warnings: Sequence[str]
    top_k: int
    features: bool
    shape: tuple[int, int]
    centrality: bool = False

    def to_dict(self) -> dict[str, Any]:
        """One JSON document, `features` a list per image if asked for."""
        images = []
        for prediction in self.predictions:
            image = prediction.to_dict(self.top_k, self.labels)
            if self.features:
                image["features"] = prediction.features.tolist()
            images.append(image)
        failed = [failure.to_dict() for failure in self.failures]
        return {"warnings": list(self.warnings), "images": images, "failed": failed}

    def write(self, path: Path) -> None:
        """Write JSON, CSV or npz, by the suffix; the file appears when it is whole.

        In an npz: `files`, `logits [n, classes]`, and if asked for `features [n, E]` and, for the i-th image,
        `centrality_i [layers, heads, rows, columns]` and `centrality_class_token_i [layers, heads]`; a cell is the sum
        over `centrality_step[i]` patches to a side.

        Raises:
            InfexportError: it cannot be written.
        """
        with written(path, "output", ELSEWHERE) as file:
            _WRITERS[path.suffix](file, self)


def _write_json(file: BinaryIO, results: Results) -> None:
    file.write((json.dumps(results.to_dict(), indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def _write_csv(file: BinaryIO, results: Results) -> None:
    width = min(results.top_k, results.shape[0])
    header = ["file", "grid_height", "grid_width", "padded_share"]
    header += [f"{name}_{rank}" for rank in range(1, width + 1) for name in ("label", "probability")]
    if results.features:
        header += [f"feature_{i}" for i in range(results.shape[1])]
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    writer.writerow(header)
    for prediction in results.predictions:
        line: list[Any] = [prediction.file, *prediction.grid, f"{prediction.padded_share:.6g}"]
        for top in prediction.top_k(width, results.labels):
            line += [top["label"], f"{top['probability']:.6g}"]
        if results.features:
            line += [f"{value:.9g}" for value in prediction.features]
        writer.writerow(line)
    text.detach()


def _write_npz(file: BinaryIO, results: Results) -> None:
    classes, embed_dim = results.shape
    arrays: dict[str, Any] = {
        "files": np.array([prediction.file for prediction in results.predictions], dtype=np.str_),
        "logits": np.array([p.logits for p in results.predictions], np.float32).reshape(-1, classes),
    }
    if results.features:
        arrays["features"] = np.array([p.features for p in results.predictions], np.float32).reshape(-1, embed_dim)
    if results.centrality:
        found = [p.centrality for p in results.predictions if p.centrality is not None]
        arrays["centrality_step"] = np.array([one.step for one in found], np.int64)
        for i, one in enumerate(found):
            arrays |= {f"centrality_{i}": one.cells, f"centrality_class_token_{i}": one.class_token}
    np.savez(file, **arrays)


_WRITERS = {".json": _write_json, ".csv": _write_csv, ".npz": _write_npz}
