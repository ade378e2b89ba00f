"""Accuracy of logits, and agreement of two sets of them. Sees arrays only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.floating[Any]]

Z = 1.959963984540054
"""Quantile 97.5% of the standard normal distribution: intervals are of 95%."""


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% score interval of a share: bounds in [0, 1], unlike the normal approximation also where none is wrong.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", J. Am. Stat. Assoc. 22 (1927),
    209-212: the shares p with |right/total − p| ≤ z √(p (1 − p) / total).
    """
    if not total:
        return 0.0, 1.0
    share, spread = right / total, Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    reach = Z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # exactly so at the ends, where the formula's two terms only round to it
    return (centre - reach if right else 0.0), (centre + reach if right < total else 1.0)


@dataclass(frozen=True)
class Share:
    """A count of a total."""

    count: int
    total: int

    @property
    def share(self) -> float:
        """The share, in [0, 1]; NaN where the total is 0."""
        return self.count / self.total if self.total else math.nan

    def to_dict(self) -> dict[str, Any]:
        return {"share": self.share, "count": self.count, "of": self.total, "interval": wilson(self.count, self.total)}


@dataclass(frozen=True)
class OfClass:
    """Results of the images of one class.

    Attributes:
        index: of the class.
        right: of its images, with top-1.
        confused: the class most often answered in its place, None where no other was.
        times: how often that was.
    """

    index: int
    right: Share
    confused: int | None
    times: int


@dataclass(frozen=True)
class Accuracy:
    """Shares of images whose class is the likeliest, or among the five likeliest; `top5` is None for 5 classes or
    fewer.

    Attributes:
        classes: those that have images, by index.
    """

    top1: Share
    top5: Share | None
    classes: tuple[OfClass, ...]


def accuracy(logits: Logits, labels: NDArray[np.integer[Any]]) -> Accuracy:
    """Judge logits `[n, classes]` by the classes' indices `[n]`. Of equal logits the first class's is the larger.

    A row with a logit that is not finite is no answer: it is never right, and counts among those judged.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits have shape {logits.shape} and labels {labels.shape}, expected [n, classes] and [n]")
    total, count = logits.shape
    finite = np.isfinite(logits).all(1)
    its_own = np.take_along_axis(logits, labels[:, None], axis=1)
    before = (logits > its_own) | ((logits == its_own) & (np.arange(count) < labels[:, None]))
    rank = np.where(finite, before.sum(1), count)
    answered = logits.argmax(1) if total else labels
    classes = []
    for index in np.unique(labels).tolist():
        own = labels == index
        answers = np.bincount(answered[own & finite], minlength=count)
        right = Share(int(answers[index]), int(own.sum()))
        answers[index] = 0
        confused = int(answers.argmax())
        times = int(answers[confused])
        classes.append(OfClass(index, right, confused if times else None, times))
    top5 = Share(int((rank < 5).sum()), total) if count > 5 else None
    return Accuracy(Share(int((rank < 1).sum()), total), top5, tuple(classes))


@dataclass(frozen=True)
class Agreement:
    """Share of images for which two sets of logits have the same top-1.

    Attributes:
        same: of the rows.
        disagreeing: rows that have not; so are those where either has a logit that is not finite.
        largest_difference: of a row, ‖x − y‖ / ‖y‖; the absolute one where y is zero, infinite where it is no number.
    """

    same: Share
    disagreeing: tuple[int, ...]
    largest_difference: float


def agreement(x: Logits, y: Logits) -> Agreement:
    """Compare logits `[n, classes]` with others of the same shape.

    Raises:
        ValueError: shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"logits have shape {x.shape}, expected the others', {y.shape}")
    x, y = x.astype(np.float64), y.astype(np.float64)
    finite = np.isfinite(np.concatenate([x, y], axis=1)).all(axis=1)
    x, y = (np.where(finite[:, None], rows, 0.0) for rows in (x, y))
    norms = np.linalg.norm(y, axis=1)
    differences = np.where(finite, np.linalg.norm(x - y, axis=1) / np.where(norms > 0, norms, 1.0), np.inf)
    disagreeing = np.flatnonzero(~finite | (x.argmax(1) != y.argmax(1))).tolist() if len(x) else []
    same = Share(len(x) - len(disagreeing), len(x))
    return Agreement(same, tuple(disagreeing), float(differences.max(initial=0.0)))
