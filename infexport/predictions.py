"""Logits → labels, and files that hold them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from infexport.centrality import Centrality
from infexport.errors import InfexportError
from infexport.extras import require
from infexport.outputs import check_writable, written

SUFFIXES = (".json", ".csv", ".npz", ".parquet")
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
    if path.suffix == ".parquet":
        require("pyarrow", extra="scale")


@dataclass(frozen=True)
class Failure:
    """An image that could not be read or run; the others go on."""

    file: str
    error: InfexportError

    @property
    def text(self) -> str:
        """The error in one line."""
        text = "; ".join(filter(None, [self.error.summary, *self.error.details.splitlines()]))
        return text.encode("utf-8", "replace").decode()  # a file's name in it may be no UTF-8

    def to_dict(self) -> dict[str, str]:
        return {"file": self.file, **self.error.to_dict()}


Row = Prediction | Failure
"""What there is to say of an image."""


@dataclass(frozen=True)
class Results:
    """All answers, and how they are to be shown.

    Attributes:
        rows: in the order of the images.
        labels: of the classes, or None.
        warnings: what a reader must know before trusting the answers.
        top_k: classes per image.
        features: whether they are written too.
        shape: classes and E, for a file with no predictions in it.
        centrality: whether it is written too.
    """

    rows: Sequence[Row]
    labels: Sequence[str] | None
    warnings: Sequence[str]
    top_k: int
    features: bool
    shape: tuple[int, int]
    centrality: bool = False

    @property
    def predictions(self) -> list[Prediction]:
        return [row for row in self.rows if isinstance(row, Prediction)]

    @property
    def failures(self) -> list[Failure]:
        return [row for row in self.rows if isinstance(row, Failure)]

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
        """Write JSON, CSV, npz or Parquet, by the suffix; the file appears when it is whole.

        All but JSON have a row for every image, in order, and its `error` where there is no answer. In an npz: `files`,
        `errors` and `logits [n, classes]` (NaN where there is none), and if asked for `features [n, E]` and, for the
        i-th image, `centrality_i [layers, heads, rows, columns]` and `centrality_class_token_i [layers, heads]`; a cell
        is the sum over `centrality_step[i]` patches to a side.

        Raises:
            InfexportError: it cannot be written.
        """
        with written(path, "output", ELSEWHERE) as file:
            _WRITERS[path.suffix](file, self)

    def table(self) -> dict[str, list[Any]]:
        """Column → a value for every image, None where there is none: what CSV and Parquet have."""
        width = min(self.top_k, self.shape[0])
        names = [f"{name}_{rank}" for rank in range(1, width + 1) for name in ("label", "probability")]
        columns: dict[str, list[Any]] = {
            name: [] for name in ("file", "grid_height", "grid_width", "padded_share", *names, "error")
        }
        for row in self.rows:
            values: dict[str, Any] = {"file": row.file}
            if isinstance(row, Prediction):
                height, width = row.grid
                values |= {"grid_height": height, "grid_width": width, "padded_share": row.padded_share}
                for rank, top in enumerate(row.top_k(len(names) // 2, self.labels), 1):
                    values |= {f"label_{rank}": top["label"], f"probability_{rank}": top["probability"]}
            else:
                values["error"] = row.text
            for name, column in columns.items():
                column.append(values.get(name))
        return columns

    def stacked(self, name: Literal["logits", "features"]) -> NDArray[np.float32]:
        """`[n, classes]` or `[n, E]`, NaN for images that failed."""
        width = self.shape[0 if name == "logits" else 1]
        none = np.full(width, np.nan, np.float32)
        found = [getattr(row, name) if isinstance(row, Prediction) else none for row in self.rows]
        return np.array(found, np.float32).reshape(-1, width)


def _write_json(file: BinaryIO, results: Results) -> None:
    file.write((json.dumps(results.to_dict(), indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def _write_csv(file: BinaryIO, results: Results) -> None:
    columns = results.table()
    if results.features:
        for i, column in enumerate(results.stacked("features").T):
            columns[f"feature_{i}"] = [None if np.isnan(x) else f"{x:.9g}" for x in column]
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])
    text.detach()


def _write_npz(file: BinaryIO, results: Results) -> None:
    rows = results.rows
    arrays: dict[str, Any] = {
        "files": np.array([row.file for row in rows], np.str_),
        "errors": np.array([row.text if isinstance(row, Failure) else "" for row in rows], np.str_),
        "logits": results.stacked("logits"),
    }
    if results.features:
        arrays["features"] = results.stacked("features")
    if results.centrality:
        found = [row.centrality if isinstance(row, Prediction) else None for row in rows]
        arrays["centrality_step"] = np.array([0 if one is None else one.step for one in found], np.int64)
        for i, one in enumerate(found):
            if one is not None:
                arrays |= {f"centrality_{i}": one.cells, f"centrality_class_token_{i}": one.class_token}
    np.savez(file, **arrays)


def _write_parquet(file: BinaryIO, results: Results) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    columns = {name: pa.array(values, _TYPES[name.partition("_")[0]]) for name, values in results.table().items()}
    stacks = {"logits": results.stacked("logits")}
    if results.features:
        stacks["features"] = results.stacked("features")
    for name, stack in stacks.items():
        columns[name] = pa.FixedSizeListArray.from_arrays(stack.reshape(-1), stack.shape[1])
    pa.parquet.write_table(pa.table(columns), file)


_WRITERS = {".json": _write_json, ".csv": _write_csv, ".npz": _write_npz, ".parquet": _write_parquet}
_TYPES = {
    **dict.fromkeys(("file", "label", "error"), "string"),
    **dict.fromkeys(("padded", "probability"), "float64"),
    "grid": "int32",
}
"""First word of a column's name → its type in Parquet, which a column without values does not tell."""
