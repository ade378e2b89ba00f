"""Judge whether two sets of logits are the same, given the truth. Sees arrays only."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

NETWORK = "infexport's own PyTorch network, with the checkpoint's weights; not with the code that trained them"
"""The other side of a comparison, in words: a mistake that both share is not found."""


@dataclass(frozen=True)
class Tolerance:
    """Relative Frobenius error that a precision may have: factor·ε·√depth.

    Errors of layers add like random steps. In float32 every layer rounds some dozens of times at ε each. In the others
    only the factors of its large products are rounded: twice each in 16 bits, and in 8 bits, where ε is a step of 1/256
    of a range of some 5 standard deviations to both sides, by 3 ε a factor.
    """

    precision: str
    factor: int
    epsilon: float
    depth: int

    @property
    def relative(self) -> float:
        return self.factor * self.epsilon * math.sqrt(self.depth)

    def __str__(self) -> str:
        rule = f"{self.factor} eps sqrt(depth), eps {self.epsilon:.1e}, depth {self.depth}"
        return f"relative error <= {self.relative:.1e} ({self.precision}: {rule})"


_RULES = {
    "fp32": (32, 2.0**-23),
    "fp16": (2, 2.0**-10),
    "tf32": (2, 2.0**-10),
    "bf16": (2, 2.0**-7),
    "int8": (6, 2.0**-8),
}


def tolerance_for(precision: str, depth: int) -> Tolerance:
    """The tolerance for logits of `precision` (`fp32`, `tf32`, `fp16`, `bf16`, `int8`) and `depth` layers."""
    factor, epsilon = _RULES[precision]
    return Tolerance(precision, factor, epsilon, depth)


@dataclass(frozen=True)
class Comparison:
    """Distance of logits from the truth.

    Attributes:
        max_abs, mean_abs: absolute error, in the logits' own units.
        relative: ‖x − truth‖ / scale, Frobenius.
        scale: ‖truth‖ or, where that is larger, the norm of what the logits are sums of; 1 where both are zero.
        cosine: of the flattened arrays.
        top1_agreement: share of rows whose largest logit is the same; never where one is not finite.
        passed: relative error within tolerance, everything finite, and the same top-1 wherever the truth's lead over
            its second class is larger than the tolerance allows two logits to move.
    """

    max_abs: float
    mean_abs: float
    relative: float
    scale: float
    cosine: float
    top1_agreement: float
    passed: bool

    def __bool__(self) -> bool:
        return self.passed

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compare(logits: Array, truth: Array, tolerance: Tolerance, terms: Array | None = None) -> Comparison:
    """Compare logits `[n, classes]` with the truth, float64 of the same shape.

    Args:
        logits: what is judged.
        truth: what they should be.
        tolerance: of the precision.
        terms: for every logit the root of the sum of squares of its terms (`layers.summand_size`), for an error is
            of their size. Where they cancel, as in a single logit near zero, that is more than the truth's.

    Raises:
        ValueError: shapes differ.
    """
    if logits.shape != truth.shape:
        raise ValueError(f"logits have shape {logits.shape}, expected the truth's, {truth.shape}")
    x, y = logits.astype(np.float64), truth.astype(np.float64)
    with np.errstate(invalid="ignore"):  # what is not finite is found below
        error = np.abs(x - y)
    norm = float(np.linalg.norm(y))
    scale = float(np.max([norm, 0.0 if terms is None else np.linalg.norm(terms)])) or 1.0
    relative = float(np.linalg.norm(error)) / scale if math.isfinite(scale) else math.nan
    norms = float(np.linalg.norm(x)) * norm
    finite = np.isfinite(x).all(-1) & np.isfinite(y).all(-1)
    same = finite & (x.argmax(-1) == y.argmax(-1))
    if y.shape[-1] > 1:
        ordered = np.sort(y, axis=-1)
        lead = ordered[:, -1] - ordered[:, -2]
    else:
        lead = np.full(len(y), np.inf)
    # the largest a logit of this row may move while the whole stays within tolerance
    decided = lead > 2 * tolerance.relative * scale
    return Comparison(
        max_abs=float(error.max(initial=0.0)),
        mean_abs=float(error.mean()),
        relative=relative,
        scale=scale,
        cosine=float((x * y).sum()) / norms if norms else float(np.array_equal(x, y)),
        top1_agreement=float(same.mean()),
        passed=bool(finite.all() and relative <= tolerance.relative and same[decided].all()),
    )
