"""Results of a run, written as JSON, CSV, npz or Parquet."""

from __future__ import annotations

import csv
import io
import json
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from infexport.errors import InfexportError
from infexport.inference.prediction import Failure, ImageResult, Prediction
from infexport.outputs.files import check_writable, written
from infexport.system.dependencies import require

SUFFIXES = (".json", ".csv", ".npz", ".parquet")


ELSEWHERE = "choose an --output that can be written to"


def check_output(path: Path) -> None:
    """Check before the long work that an output can be written.

    Raises:
        InfexportError: the suffix is unknown, or the path cannot be written to.
    """
    check_writable(path, "output", SUFFIXES, ELSEWHERE)
    if path.suffix.lower() == ".parquet":
        require("pyarrow", extra="scale")


@dataclass(frozen=True)
class Results:
    """Predictions and failures of a run, and how to present them.

    Attributes:
        rows: a prediction or a failure for every image, in order.
        labels: labels of the classes; None if there are none.
        warnings: what a reader must know before trusting the predictions.
        top_k: classes per image.
        features: write the features, too.
        shape: number of classes, and of features E; needed where no image has a prediction.
    """

    rows: Sequence[ImageResult]
    labels: Sequence[str] | None
    warnings: Sequence[str]
    top_k: int
    features: bool
    shape: tuple[int, int]

    @property
    def predictions(self) -> list[Prediction]:
        return [row for row in self.rows if isinstance(row, Prediction)]

    @property
    def failures(self) -> list[Failure]:
        return [row for row in self.rows if isinstance(row, Failure)]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document; `index` is an image's position among all images."""
        images, failed = [], []
        for index, row in enumerate(self.rows):
            if isinstance(row, Failure):
                failed.append({"index": index, **row.to_dict()})
                continue
            image = {"index": index, **row.to_dict(self.top_k, self.labels)}
            if self.features:
                image["features"] = row.features.tolist()
            images.append(image)
        return {"warnings": list(self.warnings), "images": images, "failed": failed}

    def write(self, path: Path) -> None:
        """Write JSON, CSV, npz or Parquet, by the suffix; the file appears once it is complete.

        All but JSON have a row for every image, in order, with its `error` if it failed. An npz holds `files`, `errors`
        and `logits [n, classes]` (NaN for a failed image), and with `features` also `features [n, E]`.

        Raises:
            InfexportError: it cannot be written.
        """
        with written(path, "output", ELSEWHERE) as file:
            _WRITERS[path.suffix.lower()](file, self)

    def table(self) -> dict[str, list[Any]]:
        """Return column → a value for every image, None where it has none: the columns of CSV and Parquet."""
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
        """Return `[n, classes]` or `[n, E]`, with NaN for images that failed."""
        width = self.shape[0 if name == "logits" else 1]
        none = np.full(width, np.nan, np.float32)
        found = [getattr(row, name) if isinstance(row, Prediction) else none for row in self.rows]
        return np.array(found, np.float32).reshape(-1, width)


class CentralityFile:
    """An npz file that the centrality of each image is written to at once, so that memory does not grow.

    `write` completes the file, which then appears; `close` deletes an incomplete one. A full disk does not end the run:
    `write` raises the error.

    Args:
        output: the file.

    Raises:
        InfexportError: it cannot be created.
    """

    def __init__(self, output: Path) -> None:
        self._steps: dict[int, int] = {}
        self._grids: dict[int, tuple[int, int]] = {}
        self._error: OSError | None = None
        self._stack = ExitStack()
        self._archive = zipfile.ZipFile(self._stack.enter_context(written(output, "output", ELSEWHERE)), "w")

    def on_prediction(self, index: int, prediction: Prediction) -> None:
        """Write the centrality of the image at this index."""
        centrality = prediction.centrality
        assert centrality is not None, "the run computes it"
        try:
            if self._error is None:
                _write_array(self._archive, f"centrality_{index}", centrality.cells)
                _write_array(self._archive, f"centrality_class_token_{index}", centrality.class_token)
                self._steps[index], self._grids[index] = centrality.step, centrality.grid
        except OSError as error:
            self._error = error

    def write(self, results: Results) -> None:
        """Write the arrays of `Results.write`, and complete the file.

        The i-th image has `centrality_i [layers, heads, rows, columns]` and `centrality_class_token_i [layers, heads]`.
        A cell is the sum over a square of `centrality_step[i]` patches a side, fewer at the edge of the grid.
        `centrality_grid[i]` is the grid's height and width in patches.

        Raises:
            InfexportError: it cannot be written.
        """
        images = range(len(results.rows))
        shapes = {
            "centrality_step": np.array([self._steps.get(index, 0) for index in images], np.int64),
            "centrality_grid": np.array([self._grids.get(index, (0, 0)) for index in images], np.int64).reshape(-1, 2),
        }
        with self._stack:
            if self._error is not None:
                raise self._error
            for name, values in (_arrays(results) | shapes).items():
                _write_array(self._archive, name, values)
            self._archive.close()

    def close(self) -> None:
        """Delete the file if it is incomplete."""
        with suppress(_UnfinishedError), self._stack:
            raise _UnfinishedError
        self._archive.fp = None  # else it would write to a closed file when it is freed


class _UnfinishedError(Exception):
    """Makes the open file discard what was written."""


def _write_array(archive: zipfile.ZipFile, name: str, values: NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, np.asanyarray(values), allow_pickle=False)


def keep_elsewhere(path: Path, results: Results) -> Path | None:
    """Write results to a temporary folder, after writing to `path` has failed.

    Args:
        path: the output that failed; the copy has its name.
        results: the results, of which centrality is no part.

    Returns:
        The copy; None if it cannot be written either.
    """
    try:
        copy = Path(tempfile.mkdtemp(prefix="infexport-kept-")) / path.name
    except OSError:
        return None
    try:
        results.write(copy)
        return copy
    except InfexportError:
        copy.parent.rmdir()
        return None


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
    with zipfile.ZipFile(file, "w") as archive:
        for name, values in _arrays(results).items():
            _write_array(archive, name, values)


def _arrays(results: Results) -> dict[str, NDArray[Any]]:
    rows = results.rows
    arrays: dict[str, NDArray[Any]] = {
        "files": np.array([row.file for row in rows], np.str_),
        "errors": np.array([row.text if isinstance(row, Failure) else "" for row in rows], np.str_),
        "logits": results.stacked("logits"),
    }
    if results.features:
        arrays["features"] = results.stacked("features")
    return arrays


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
"""First word of a column's name → its type in Parquet, which cannot be inferred from an empty column."""
