"""Results of a comparison with PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infexport.errors import InfexportError
from infexport.evaluation.parity.layers import Part
from infexport.evaluation.parity.metrics import NETWORK, Comparison, Tolerance

Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Case:
    """One input, judged: the bundle and PyTorch's float32, each against float64. True where all is within tolerance.

    Attributes:
        name: the size, or the image's file.
        shape: of the images, `[B, H, W, 3]`.
        bundle: the bundle, or its engine; what the verdict is made of.
        torch: PyTorch in float32, for comparison: its own rounding is no better.
        parts: of the network, first to last, where they were asked for.
        logits, eager: `[B, classes]` of the bundle, and of PyTorch in float32.
        truth: the same of float64.
        file: the image's; None where the images are synthetic.
    """

    name: str
    shape: tuple[int, ...]
    bundle: Comparison
    torch: Comparison
    parts: tuple[Part, ...]
    logits: Logits
    eager: Logits
    truth: Logits
    file: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.bundle) and all(self.parts)

    @property
    def first_over_budget(self) -> Part | None:
        """The first part whose own error is out of its budget."""
        return next((part for part in self.parts if not part), None)

    def to_dict(self) -> dict[str, Any]:
        layers = {"layers": [part.to_dict() for part in self.parts]} if self.parts else {}
        return {
            "name": self.name,
            "shape": list(self.shape),
            "bundle": self.bundle.to_dict(),
            "torch_float32": self.torch.to_dict(),
            **layers,
        }


@dataclass(frozen=True)
class ParityResult:
    """The verdict: true where there are cases, all are within tolerance, and every image could be read.

    Attributes:
        bundle, checkpoint: what was compared.
        verified: the bundle's hashes were right.
        ran: what ran the bundle, in words.
        tolerance: what the logits were judged by.
        cases: sizes, then images, in the order given.
        failed: images that could not be compared, and why.
    """

    bundle: Path
    checkpoint: Path
    verified: bool
    ran: str
    tolerance: Tolerance
    cases: tuple[Case, ...]
    failed: tuple[tuple[Path, InfexportError], ...]

    def __bool__(self) -> bool:
        return bool(self.cases) and not self.failed and all(self.cases)

    @property
    def compared(self) -> str:
        """The two sides that were compared, in words."""
        return f"the bundle with {NETWORK}"

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        verdict = "parity holds" if self else "parity FAILED"
        return verdict if self.verified else f"{verdict} (unverified: the bundle was modified)"

    @property
    def first_over_budget(self) -> str:
        """The first part that is out of its budget, in words; empty where none is."""
        for case in self.cases:
            part = case.first_over_budget
            if part is None:
                continue
            told = [
                f"{name} is off by {error.local_error:.1e}, its budget {error.budget:.1e}" for name, error in part.out
            ]
            return f"the first part out of its budget is {part.name}, at {case.name}: {'; '.join(told)}"
        return ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle),
            "checkpoint": str(self.checkpoint),
            "passed": bool(self),
            "verified": self.verified,
            "compared": self.compared,
            "ran": self.ran,
            "culprit": self.first_over_budget,
            "tolerance": {
                "relative": self.tolerance.relative,
                "precision": self.tolerance.precision,
                "factor": self.tolerance.factor,
                "epsilon": self.tolerance.epsilon,
                "depth": self.tolerance.depth,
            },
            "cases": [case.to_dict() for case in self.cases],
            "failed": [{"file": str(path), **error.to_dict()} for path, error in self.failed],
        }
