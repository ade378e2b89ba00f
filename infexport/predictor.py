"""A bundle as a function of images, for other programs: pickled, sent to workers, called there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from infexport.bundle import Bundle, open_bundle
from infexport.errors import InfexportError
from infexport.execution import Execution, Policy
from infexport.predictions import Failure, Prediction, Row
from infexport.remote import Item
from infexport.run import Listener, Request, Run
from infexport.runners.opening import Opening

Batch = Mapping[str, Any] | Sequence[Item] | NDArray[Any] | Path | str


class Predictor:
    """Labels images: `Predictor("bundle")(["a.png", "b.tif"])["label"]`.

    It can be pickled at any time. The bundle is opened, its hashes checked and its session started by the first call in
    a process, and kept.

    Args:
        bundle: the folder.
        digest: the bundle's, where it is known from elsewhere; another bundle is refused.
        size, edge, provider, engine, threads, execution, memory, chunk, tokens, scratch, batch_size: as of
            `infexport run-engine`; `memory` in bytes.
        centrality: what `predict` returns has it.
    """

    def __init__(
        self,
        bundle: Path | str,
        *,
        digest: str | None = None,
        size: Literal["trained", "native"] | int = "trained",
        edge: Literal["pad", "crop"] = "pad",
        execution: Execution = "auto",
        memory: int | None = None,
        chunk: int | None = None,
        tokens: Literal["float32", "float16"] = "float32",
        scratch: Path | str | None = None,
        provider: str = "auto",
        engine: str | None = None,
        batch_size: int = 1,
        threads: int | None = None,
        centrality: bool = False,
    ) -> None:
        folder = None if scratch is None else Path(scratch)
        policy = Policy(execution, memory, folder, chunk, tokens == "float16", batch_size, centrality)
        self.path, self._digest = Path(bundle), digest
        self._request = Request(policy, size, edge, provider, engine, threads, centrality)

    @classmethod
    def of(cls, bundle: Bundle, request: Request, opening: Opening | None = None) -> Self:
        """For a bundle that is open already, and, if given, with what opens other runners (`infexport.run.Run`)."""
        self = cls.__new__(cls)
        self.path, self._digest, self.bundle = bundle.path, None, bundle
        self._request, self._run = request, Run(bundle, request, opening)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # what is open stays where it is; elsewhere it is to be the same bundle
        digest = self.bundle.manifest.digest if "bundle" in vars(self) else self._digest
        return {"path": self.path, "_digest": digest, "_request": self._request}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def bundle(self) -> Bundle:
        """Opened, its hashes checked.

        Raises:
            InfexportError: as of `open_bundle`.
        """
        return open_bundle(self.path, digest=self._digest)

    @cached_property
    def _run(self) -> Run:
        return Run(self.bundle, self._request)

    def predict(self, images: Sequence[Item], listener: Listener | None = None) -> list[Row]:
        """A `Prediction`, or a `Failure` that says why there is none, for every image, in their order.

        Args:
            images: files, URLs (extra `scale`), or uint8 RGB arrays `[H, W, 3]`, of any sizes.
            listener: told of it.

        Raises:
            InfexportError: the bundle cannot be run at all.
        """
        return self._run(images, listener)

    def close(self) -> None:
        """Give back what the first call opened; the next one opens it again."""
        if "_run" in vars(self):
            self._run.close()

    def __call__(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """A row for every image of a batch, in its order; never fewer.

        Args:
            batch: as `predict` takes it, `[n, H, W, 3]` too, or a mapping with these under `image` or `file`, whose
                other columns are handed on, as Ray Data's `map_batches` has it. With both, `file` names the images.

        Returns:
            `file`, `index` (of the likeliest class), `label` and `probability` `[n]`, `logits [n, classes]` and
            `features [n, E]` float32, `grid [n, 2]` (patches), `padded_share`, `rounding` and `execution` `[n]`, and
            `error`, `error_details` and `error_hint` `[n]`, empty where all is well. Where it is not, `index` is −1
            and what is no text is NaN or 0.

        Raises:
            InfexportError: the bundle cannot be run at all, or the batch has no images, or columns of these names.
        """
        images, others = _images(batch)
        lost = sorted(others.keys() & columns_of([], None, 1, 1).keys() - {"file"})
        if lost:
            raise InfexportError(
                f"columns of the batch that the answer has, too: {', '.join(lost)}",
                hint="rename them before, such as to true_label",
            )
        config = self.bundle.manifest.config
        columns = columns_of(self.predict(images), self.bundle.labels, config["num_classes"], config["embed_dim"])
        return {**columns, **others}


def columns_of(
    rows: Sequence[Row], labels: Sequence[str] | None, classes: int, embed_dim: int
) -> dict[str, NDArray[Any]]:
    """Rows as columns; as of `Predictor.__call__`."""
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


def rows_of(columns: Mapping[str, Any]) -> list[Row]:
    """What `columns_of` made columns of."""
    rows: list[Row] = []
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


def _images(batch: Batch) -> tuple[Sequence[Item], dict[str, Any]]:
    """The images of a batch, and its other columns."""
    if isinstance(batch, str | Path):
        return [batch], {}
    if not isinstance(batch, Mapping):
        return list(batch), {}
    name = next((name for name in ("image", "file") if name in batch), None)
    if name is None:
        raise InfexportError(
            "a batch without images", f"received columns {', '.join(batch) or '(none)'}, expected image or file"
        )
    return list(batch[name]), {other: values for other, values in batch.items() if other != name}
