"""Results of images: predictions and failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infexport.errors import InfexportError
from infexport.inference.centrality import Centrality
from infexport.system.progress import ProgressEvent


def top_k(logits: NDArray[Any], k: int, labels: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return the k likeliest classes of logits `[classes]`; see `Prediction.top_k`."""
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
        """Return the k likeliest classes, likeliest first: `index`, `label` and `probability` (softmax, float64)."""
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


@dataclass(frozen=True)
class Answered(ProgressEvent):
    """The image of this index has its prediction."""

    index: int
    prediction: Prediction


@dataclass(frozen=True)
class Failure:
    """An image that could not be read or run; it does not stop the others."""

    file: str
    error: InfexportError

    @property
    def text(self) -> str:
        """The error in one line."""
        text = "; ".join(filter(None, [self.error.summary, *self.error.details.splitlines()]))
        return text.encode("utf-8", "replace").decode()  # a file name in it may not be UTF-8

    def to_dict(self) -> dict[str, str]:
        return {"file": self.file, **self.error.to_dict()}


ImageResult = Prediction | Failure
"""Result of one image."""
