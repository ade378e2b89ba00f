"""A bundle as a function of images, for other programs: pickled, sent to workers, called there."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infexport.bundle import Bundle, open_bundle
from infexport.errors import InfexportError
from infexport.images.fetch import Item
from infexport.inference.executor import Run
from infexport.inference.options import Edge, Execution, InferenceOptions, Size, TokenDtype, parse_bytes, parse_size
from infexport.inference.prediction import Failure, ImageResult, Prediction
from infexport.inference.runners.factory import RunnerFactory
from infexport.system.progress import (
    ProgressListener,
)

Batch = Mapping[str, Any] | Sequence[Item] | NDArray[Any] | Item


class Predictor:
    """Labels images: `Predictor("bundle")(["a.png", "b.tif"])["label"]`.

    It can be pickled at any time. The bundle is opened, its hashes checked and its session started by the first call in
    a process, and kept.

    Threads may share one: a call keeps nothing on it. Images that are run whole are run side by side, so that `memory`
    is of each call; images that are streamed take turns. `close` gives back what is open once no call is under way.
    Processes may not: what is open does not survive a fork. Pickle it, or make one in each.

    Args:
        bundle: the folder.
        digest: the bundle's, where it is known from elsewhere; another bundle is refused.
        size, edge, provider, engine, threads, execution, memory, chunk, tokens, scratch, batch_size: as of
            `infexport run-engine`, and as there `size` and `memory` may be text.
        centrality: what `predict` returns has it.

    Raises:
        InfexportError: a value that an option does not take, or an option that would be ignored.
    """

    def __init__(
        self,
        bundle: Path | str,
        *,
        digest: str | None = None,
        size: Size | str = "trained",
        edge: Edge = "pad",
        execution: Execution = "auto",
        memory: int | str | None = None,
        chunk: int | None = None,
        tokens: TokenDtype = "float32",
        scratch: Path | str | None = None,
        provider: str = "auto",
        engine: str | None = None,
        batch_size: int = 1,
        threads: int | None = None,
        centrality: bool = False,
    ) -> None:
        self._options = InferenceOptions(
            size=parse_size(size),
            edge=edge,
            execution=execution,
            memory=parse_bytes(memory),
            chunk=chunk,
            tokens=tokens,
            scratch=Path(scratch).absolute() if isinstance(scratch, str | Path) else scratch,
            provider=provider,
            engine=engine,
            batch_size=batch_size,
            threads=threads,
            centrality=centrality,
        )
        self._digest = digest
        self._begin(Path(bundle).absolute())  # it may be called in another folder, or sent to a process that is there

    @classmethod
    def of(cls, bundle: Bundle, options: InferenceOptions, opening: RunnerFactory | None = None) -> Self:
        """Make a predictor of a bundle that is open already; for `opening` see `executor.Run`."""
        self = cls.__new__(cls)
        self._options, self._digest = options, None
        self._begin(bundle.path.absolute())
        self._bundle, self._run = bundle, Run(bundle, options, opening)
        return self

    def _begin(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._bundle: Bundle | None = None
        self._run: Run | None = None

    def __getstate__(self) -> dict[str, Any]:
        # what is open stays where it is; elsewhere it is to be the same bundle
        digest = self._digest if self._bundle is None else self._bundle.manifest.digest
        return {"path": self.path, "digest": digest, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._options, self._digest = state["options"], state["digest"]
        self._begin(state["path"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def bundle(self) -> Bundle:
        """Opened, its hashes checked.

        Raises:
            InfexportError: see `open_bundle`.
        """
        with self._lock:
            return self._open()

    def _open(self) -> Bundle:
        if self._bundle is None:
            self._bundle = open_bundle(self.path, digest=self._digest)
        return self._bundle

    def predict(
        self, images: Sequence[Item], listener: ProgressListener | None = None, keep_centrality: bool = True
    ) -> list[ImageResult]:
        """Return a `Prediction`, or a `Failure` that says why there is none, for every image, in their order.

        Args:
            images: files, URLs (extra `scale`), uint8 RGB arrays `[H, W, 3]`, or images of Pillow, of any sizes.
            listener: told of it, in this thread.
            keep_centrality: see `infexport.inference.executor.Run`.

        Raises:
            InfexportError: the bundle cannot be run at all, or these are no images.
        """
        images = _items(images)
        with self._lock:
            if self._run is None:
                self._run = Run(self._open(), self._options)
            run = self._run
        return run(images, listener, keep_centrality)

    def close(self) -> None:
        """Give back what the first call opened, once the last call under way is done; the next one opens it again."""
        with self._lock:
            run = self._run
        if run is not None:
            run.close()

    def __call__(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """A row for every image of a batch, in its order; never fewer.

        Args:
            batch: as `predict` takes it, one image or `[n, H, W, 3]` too, or a mapping with these under `image` or
                `file`, whose other columns are handed on, as Ray Data's `map_batches` has it. With both, `file` names
                the images.

        Returns:
            `file`, `index` (of the likeliest class), `label` and `probability` `[n]`, `logits [n, classes]` and
            `features [n, E]` float32, `grid [n, 2]` (patches), `padded_share`, `rounding` and `execution` `[n]`, and
            `error`, `error_details` and `error_hint` `[n]`, empty where all is well. Where it is not, `index` is −1
            and what is no text is NaN or 0.

        Raises:
            InfexportError: the bundle cannot be run at all, or the batch has no images, or columns of these names.
        """
        images, others = _images(batch)
        lost = sorted(others.keys() & to_columns([], None, 1, 1).keys() - {"file"})
        if lost:
            raise InfexportError(
                f"columns of the batch that the answer has, too: {', '.join(lost)}",
                hint="rename them before, such as to true_label",
            )
        config = self.bundle.manifest.config
        columns = to_columns(self.predict(images), self.bundle.labels, config.num_classes, config.embed_dim)
        return {**columns, **others}


def to_columns(
    rows: Sequence[ImageResult], labels: Sequence[str] | None, classes: int, embed_dim: int
) -> dict[str, NDArray[Any]]:
    """Return rows as columns; see `Predictor.__call__`."""
    found = [row if isinstance(row, Prediction) else None for row in rows]
    none = np.full(classes, np.nan, np.float32), np.full(embed_dim, np.nan, np.float32)
    tops = [None if row is None else row.top_k(1, labels)[0] for row in found]
    errors = [row.error if isinstance(row, Failure) else InfexportError("") for row in rows]

    def texts(values: Iterable[str]) -> NDArray[Any]:
        return np.array([*values], np.str_) if rows else np.empty(0, np.str_)

    return {
        "file": texts(row.file for row in rows),
        "index": np.array([-1 if top is None else top["index"] for top in tops], np.int64),
        "label": texts("" if top is None else top["label"] for top in tops),
        "probability": np.array([np.nan if top is None else top["probability"] for top in tops], np.float64),
        "logits": np.array([none[0] if row is None else row.logits for row in found], np.float32).reshape(-1, classes),
        "features": np.array([none[1] if row is None else row.features for row in found], np.float32).reshape(
            -1, embed_dim
        ),
        "grid": np.array([(0, 0) if row is None else row.grid for row in found], np.int64).reshape(-1, 2),
        "padded_share": np.array([np.nan if row is None else row.padded_share for row in found], np.float64),
        "rounding": np.array([0.0 if row is None else row.rounding for row in found], np.float64),
        "execution": texts("" if row is None else row.execution for row in found),
        "error": texts(error.summary for error in errors),
        "error_details": texts(error.details for error in errors),
        "error_hint": texts(error.hint for error in errors),
    }


def rows_from_columns(columns: Mapping[str, Any]) -> list[ImageResult]:
    """Return the rows from which `to_columns` made columns."""
    rows: list[ImageResult] = []
    for i, file in enumerate(columns["file"]):
        if columns["error"][i]:
            told = (str(columns[name][i]) for name in ("error", "error_details", "error_hint"))
            rows.append(Failure(str(file), InfexportError(*told)))
            continue
        height, width = (int(side) for side in columns["grid"][i])
        logits, features = (np.array(columns[name][i], np.float32) for name in ("logits", "features"))
        share, rounding = (float(columns[name][i]) for name in ("padded_share", "rounding"))
        execution = str(columns["execution"][i])
        rows.append(Prediction(str(file), (height, width), share, logits, features, execution, rounding))
    return rows


def _images(batch: Batch) -> tuple[list[Item], dict[str, Any]]:
    """The images of a batch, and its other columns."""
    if not isinstance(batch, Mapping):
        return _items(batch), {}
    name = next((name for name in ("image", "file") if name in batch), None)
    if name is None:
        raise InfexportError(
            "a batch without images", f"received columns {', '.join(batch) or '(none)'}, expected image or file"
        )
    return _items(batch[name]), {other: values for other, values in batch.items() if other != name}


def _items(images: Any) -> list[Item]:
    """Images as a list: one of them, `[H, W, 3]` too, is a list of one.

    Raises:
        InfexportError: they cannot be counted.
    """
    single = isinstance(images, str | bytes | os.PathLike | Image.Image)
    if single or (isinstance(images, np.ndarray) and images.ndim == 3):
        return [images]
    received = f"received {type(images).__name__}, expected a list of files, URLs or arrays"
    if isinstance(images, Mapping):  # whose keys would be taken for files
        raise InfexportError("no images", received)
    try:
        return list(images)
    except TypeError as error:
        raise InfexportError("no images", received) from error
