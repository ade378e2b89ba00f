"""Results of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infexport.bundle.manifest import Manifest
from infexport.evaluation.benchmark.gemm import SHAPES, giga_operations, limiting, multiply_adds
from infexport.evaluation.flops import MatmulCost


@dataclass(frozen=True)
class Machine:
    """The machine of a measurement.

    Attributes:
        cpu: name of its processor.
        cores: that the process may use.
        threads: of the runtime; None where it chooses.
        provider: that ran the bundle.
        runtime: the library and its version.
        gpu: name of the GPU; None on a CPU, or where NVML does not name it.
    """

    cpu: str
    cores: int
    threads: int | None
    provider: str
    runtime: str
    gpu: str | None = None

    @property
    def on_gpu(self) -> bool:
        """Tell whether the bundle ran on a GPU."""
        return self.provider != "cpu"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them; `gpu` only for a GPU."""
        return {name: value for name, value in asdict(self).items() if name != "gpu" or self.on_gpu}


@dataclass(frozen=True)
class Spread:
    """Statistics of repeated measurements: median, 90th and 99th percentile (interpolated), smallest and largest."""

    p50: float
    p90: float
    p99: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        p50, p90, p99 = map(float, np.percentile(values, [50, 90, 99]))
        return cls(p50, p90, p99, min(values), max(values))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def speed_limit(
    work: MatmulCost, batch: int, precision: str, gemm: Mapping[str, Sequence[float]], provider: str = "cpu"
) -> float | None:
    """Seconds the matrix products of a batch take at the rate at which the machine ran its own; None where it ran none
    that are like them.

    Args:
        work: of one image.
        batch: images.
        precision: of the layers that meet every token.
        gemm: seconds of each `infexport.evaluation.benchmark.gemm` run, by kind.
        provider: what runs the model, as of `infexport.evaluation.benchmark.gemm.limiting`.
    """
    kinds = limiting(precision, provider)
    if kinds is None or not gemm.keys() >= set(kinds):
        return None
    dense, attention = (multiply_adds(kind) / Spread.of(gemm[kind]).p50 for kind in kinds)
    return batch * work.seconds(dense, attention)


@dataclass(frozen=True)
class OnGpu:
    """Energy and memory of one size on the GPU.

    Attributes:
        peak_memory: bytes on the GPU at most, less what was in use before the model was loaded.
        joules: drawn while the runs of `Measured.seconds` were made.
        missing: why one of the two is None.
    """

    peak_memory: int | None
    joules: float | None
    missing: list[str]


@dataclass(frozen=True)
class Measured:
    """One size, measured.

    Attributes:
        seconds: of every run of the batch, in the order they were made.
        cold_start: seconds from before the process was started until its first answer.
        peak_memory: bytes resident at most, before anything else than the model was loaded.
        gemm: seconds of the matrix products run in between (on a GPU: afterwards), by kind.
        on_gpu: None where it ran on a CPU.
    """

    seconds: list[float]
    cold_start: float
    peak_memory: int
    gemm: dict[str, list[float]]
    on_gpu: OnGpu | None = None


@dataclass(frozen=True)
class BenchmarkRow:
    """One size: measured, or why it is not.

    Attributes:
        height, width: of the images, in pixels.
        tokens: of one image.
        batch: images at once.
        work: of one image.
        limit: seconds the batch's matrix products take at the machine's measured rate: of this size's own process
            where it was measured. None where there is no such rate.
        status: `skipped` is a size that would have taken too long, `failed` one whose process did not answer.
        reason: of what is not measured.
    """

    height: int
    width: int
    tokens: int
    batch: int
    work: MatmulCost
    limit: float | None
    status: Literal["measured", "skipped", "failed"]
    measured: Measured | None = None
    reason: str = ""

    @property
    def joules_per_image(self) -> float | None:
        if self.measured is None or self.measured.on_gpu is None or self.measured.on_gpu.joules is None:
            return None
        return self.measured.on_gpu.joules / (self.batch * len(self.measured.seconds))

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
        if (gpu := self.measured.on_gpu) is not None:
            values["on_gpu"] = {
                "peak_memory_bytes": gpu.peak_memory,
                "joules_per_image": self.joules_per_image,
                "missing": gpu.missing,
            }
        return values | {
            "seconds": seconds.to_dict() | {"all": self.measured.seconds},
            "images_per_second": self.batch / seconds.p50,
            "peak_memory_bytes": self.measured.peak_memory,
            "cold_start_seconds": self.measured.cold_start,
            "gemm_seconds": self.measured.gemm,
            "share_of_limit": None if self.limit is None else self.limit / seconds.p50,
        }


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark: true where no size failed.

    Attributes:
        bundle: the folder.
        manifest: its own.
        precision: in which it ran, which for engines is not the bundle's.
        machine: where it was measured.
        probe: seconds of the matrix products that were run first, by kind.
        rows: in the order of the sizes.
    """

    bundle: Path
    manifest: Manifest
    precision: str
    machine: Machine
    probe: dict[str, list[float]]
    rows: tuple[BenchmarkRow, ...]

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
        return {kind: Spread.of([giga_operations(s, kind) for s in seconds]) for kind, seconds in self.gemm.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle),
            "graph": self.manifest.graph,
            "variant": self.manifest.config.variant,
            "precision": self.precision,
            "folded": self.manifest.folded,
            "machine": self.machine.to_dict(),
            "gemm": {
                "rows_inner_columns": {kind: list(SHAPES[kind]) for kind in self.gemm},
                "giga_operations_per_second": {kind: spread.to_dict() for kind, spread in self.rates.items()},
            },
            "rows": [row.to_dict() for row in self.rows],
        }
