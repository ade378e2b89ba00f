"""Bundle → how fast it is on this machine, and how fast the machine would let it be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from infexport.bundle import Bundle
from infexport.errors import InfexportError
from infexport.evaluation.benchmark.result import BenchmarkResult, BenchmarkRow, Machine, Measured, OnGpu, speed_limit
from infexport.evaluation.flops import matmul_cost
from infexport.images.preprocess import check_whole_patches
from infexport.system.host import cpu_model, usable_cores
from infexport.system.progress import (
    SILENT,
    ProgressListener,
    Status,
)
from infexport.system.workers import ask, worker_command

DEFAULT_SIDES = (224, 512, 1024, 2048, 4096)
REPEATS, REPEATS_ON_GPU = 5, 100

WORKER = worker_command("infexport.evaluation.benchmark.worker")


def sizes_for(bundle: Bundle, asked: Sequence[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
    """The sizes to measure, each once: those asked for, or DEFAULT_SIDES in the nearest whole patches.

    Raises:
        InfexportError: a size that is no whole number of patches.
    """
    patch = bundle.manifest.config.patch_size

    for height, width in asked or ():
        check_whole_patches(height, width, patch)
    default = [max(1, round(side / patch)) * patch for side in DEFAULT_SIDES]
    return list(dict.fromkeys(asked or [(side, side) for side in default]))


def benchmark(
    bundle: Bundle,
    sizes: Sequence[tuple[int, int]],
    batch: int = 1,
    repeats: int | None = None,
    provider: str = "auto",
    engine: str | None = None,
    threads: int | None = None,
    max_seconds: float = 60,
    listener: ProgressListener = SILENT,
) -> BenchmarkResult:
    """Measure a bundle, every size in a process of its own, on images of noise.

    Cold start has the bundle's files in the system's cache, as they were just read. `gemm` is run between the
    repeats, in the same process; on a GPU after them.

    Args:
        bundle: verified; every process verifies it again, as every use does.
        sizes: `(height, width)` in whole patches.
        batch: images at once.
        repeats: runs that count, at least 1; on a GPU more where they would take less than a second. None for REPEATS,
            on a GPU for REPEATS_ON_GPU.
        provider, engine, threads: see `inference.runners.factory.RunnerFactory`.
        max_seconds: a size is left out whose batch would take longer, even at the machine's limit; none is where
            there is no limit.
        listener: told of every size.

    Raises:
        InfexportError: the bundle or the provider cannot be run at all. A size that fails is a row that says so.
    """
    manifest = bundle.manifest
    patch = manifest.config.patch_size
    request = {"bundle": str(bundle.path), "provider": provider, "engine": engine, "threads": threads}
    listener.on_event(Status("measuring the machine's matrix products"))
    found = ask(WORKER, request)
    machine = Machine(cpu=cpu_model(), cores=usable_cores(), **found["machine"])
    precision, where = found["precision"], machine.provider
    on_gpu = where != "cpu"
    repeats = repeats or (REPEATS_ON_GPU if on_gpu else REPEATS)
    request |= {"repeats": repeats, "on_gpu": on_gpu}
    rows = []
    for height, width in sizes:
        tokens = (height // patch) * (width // patch) + 1
        work = matmul_cost(manifest.config, manifest.folded, tokens)
        limit = speed_limit(work, batch, precision, found["gemm"], where)
        row = BenchmarkRow(height, width, tokens, batch, work, limit, "skipped")
        if limit is not None and limit > max_seconds:
            row = replace(row, reason=f"at least {limit:.0f} s a batch, more than --max-seconds {max_seconds:g}")
        else:
            least = "" if limit is None else f"at least {limit:.2g} s a batch, "
            listener.on_event(Status(f"{row.name}: {least}{repeats} times {'or more ' * on_gpu}and warm-up"))
            row = _measure(row, request | {"shape": [batch, height, width, 3]}, precision, where)
        if row.reason:
            listener.on_event(Status(f"{row.name}: {row.status}, {row.reason}"))
        rows.append(row)
    return BenchmarkResult(bundle.path, manifest, precision, machine, found["gemm"], tuple(rows))


def _measure(row: BenchmarkRow, request: dict[str, Any], precision: str, provider: str) -> BenchmarkRow:
    started, answered = time.perf_counter(), []
    try:
        answer = ask(WORKER, request, lambda message: answered.append(time.perf_counter() - started))
    except InfexportError as error:
        return replace(row, status="failed", reason=error.one_line())
    if "refused" in answer:
        return replace(row, reason=answer["refused"])
    on_gpu = OnGpu(**answer["on_gpu"]) if "on_gpu" in answer else None
    # the first thing it says is that it has answered
    measured = Measured(answer["seconds"], answered[0], answer["peak_memory"], answer["gemm"], on_gpu)
    limit = speed_limit(row.work, row.batch, precision, measured.gemm, provider)
    return replace(row, limit=limit, status="measured", measured=measured)
