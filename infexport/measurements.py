"""What a benchmark found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infexport.gemm import COLUMNS, INNER, MULTIPLY_ADDS, ROWS, giga_operations
from infexport.manifest import Manifest
from infexport.work import Work


@dataclass(frozen=True)
class Spread:
    """Of repeated measurements: median, 90th percentile (interpolated), smallest and largest."""

    p50: float
    p90: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        p50, p90 = np.percentile(values, [50, 90])
        return cls(float(p50), float(p90), min(values), max(values))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def limit_of(work: Work, batch: int, precision: str, gemm: Mapping[str, Sequence[float]]) -> float:
    """Seconds the matrix products of a batch take at the rate at which the machine ran its own.

    Args:
        work: of one image.
        batch: images.
        precision: of the bundle; the dense products of `int8` run in int8.
        gemm: seconds of each `infexport.gemm` run, by kind.
    """
    rates = {kind: MULTIPLY_ADDS / Spread.of(seconds).p50 for kind, seconds in gemm.items()}
    return batch * work.seconds(rates["int8" if precision == "int8" else "float32"], rates["float32"])


@dataclass(frozen=True)
class Measured:
    """One size, measured.

    Attributes:
        seconds: of every run of the batch, in the order they were made.
        cold_start: seconds from before the process was started until its first answer.
        peak_memory: bytes resident at most, before anything else than the model was loaded.
        gemm: seconds of the matrix products run in between, by kind.
    """

    seconds: list[float]
    cold_start: float
    peak_memory: int
    gemm: dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One size: measured, or why it is not.

    Attributes:
        height, width: of the images, in pixels.
        tokens: of one image.
        batch: images at once.
        work: of one image.
        limit: seconds the batch's matrix products take at the machine's measured rate: of this size's own process
            where it was measured.
        status: `skipped` is a size that would have taken too long, `failed` one whose process did not answer.
        reason: of what is not measured.
    """

    height: int
    width: int
    tokens: int
    batch: int
    work: Work
    limit: float
    status: Literal["measured", "skipped", "failed"]
    measured: Measured | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{self.height}²" if self.height == self.width else f"{self.height}×{self.width}"

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "size": [self.height, self.width],
            "tokens": self.tokens,
            "batch": self.batch,
            "multiply_adds": asdict(self.work),
            "limit_seconds": self.limit,
            "status": self.status,
        }
        if self.measured is None:
            return values | {"reason": self.reason}
        seconds = Spread.of(self.measured.seconds)
        return values | {
            "seconds": seconds.to_dict() | {"all": self.measured.seconds},
            "images_per_second": self.batch / seconds.p50,
            "peak_memory_bytes": self.measured.peak_memory,
            "cold_start_seconds": self.measured.cold_start,
            "gemm_seconds": self.measured.gemm,
            "share_of_limit": self.limit / seconds.p50,
        }


@dataclass(frozen=True)
class Report:
    """A benchmark: true where no size failed.

    Attributes:
        bundle: the folder.
        manifest: its own.
        machine: `cpu`, `cores`, `threads`, `provider` and `onnxruntime`.
        probe: seconds of the matrix products that were run first, by kind.
        rows: in the order of the sizes.
    """

    bundle: Path
    manifest: Manifest
    machine: dict[str, Any]
    probe: dict[str, list[float]]
    rows: tuple[Row, ...]

    def __bool__(self) -> bool:
        return all(row.status != "failed" for row in self.rows)

    @property
    def gemm(self) -> dict[str, list[float]]:
        """Seconds of every matrix product of the run, by kind."""
        measured = [row.measured.gemm for row in self.rows if row.measured is not None]
        return {kind: sum((gemm[kind] for gemm in measured), seconds) for kind, seconds in self.probe.items()}

    @property
    def rates(self) -> dict[str, Spread]:
        """Billions of operations per second, by kind."""
        return {kind: Spread.of([giga_operations(s) for s in seconds]) for kind, seconds in self.gemm.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle),
            "graph": self.manifest.graph,
            "variant": self.manifest.config["variant"],
            "precision": self.manifest.precision,
            "folded": self.manifest.folded,
            "machine": self.machine,
            "gemm": {
                "rows_inner_columns": [ROWS, INNER, COLUMNS],
                "giga_operations_per_second": {kind: spread.to_dict() for kind, spread in self.rates.items()},
            },
            "rows": [row.to_dict() for row in self.rows],
        }
