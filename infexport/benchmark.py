"""Bundle → how fast it is on this machine, and how fast the machine would let it be."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from infexport.bundle import Bundle
from infexport.errors import InfexportError
from infexport.machine import cpu_model, usable_cores
from infexport.measurements import Measured, Report, Row, limit_of
from infexport.transform import check_whole_patches
from infexport.work import work_of

DEFAULT_SIDES = (224, 512, 1024, 2048, 4096)

# -P: a json.py in the folder this is run from must not be imported
WORKER = [sys.executable, "-P", "-m", "infexport.benchmark_worker"]


def sizes_for(bundle: Bundle, asked: Sequence[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
    """The sizes to measure, each once: those asked for, or DEFAULT_SIDES in the nearest whole patches.

    Raises:
        InfexportError: a size that is no whole number of patches.
    """
    patch = bundle.manifest.config["patch_size"]

    for height, width in asked or ():
        check_whole_patches(height, width, patch)
    default = [max(1, round(side / patch)) * patch for side in DEFAULT_SIDES]
    return list(dict.fromkeys(asked or [(side, side) for side in default]))


def benchmark(
    bundle: Bundle,
    sizes: Sequence[tuple[int, int]],
    batch: int = 1,
    repeats: int = 5,
    provider: str = "auto",
    threads: int | None = None,
    max_seconds: float = 60,
    status: Callable[[str], None] = lambda message: None,
) -> Report:
    """Measure a bundle in ONNX Runtime, every size in a process of its own, on images of noise.

    Cold start has the bundle's files in the system's cache, as they were just read. `gemm` is run between the
    repeats, in the same process.

    Args:
        bundle: verified; every process verifies it again, as every use does.
        sizes: `(height, width)` in whole patches.
        batch: images at once.
        repeats: runs that count, at least 1.
        provider, threads: as of `runners.ort.OrtRunner`.
        max_seconds: a size is left out whose batch would take longer, even at the machine's limit.
        status: told of every size.

    Raises:
        InfexportError: the bundle or the provider cannot be run at all. A size that fails is a row that says so.
    """
    manifest = bundle.manifest
    patch = manifest.config["patch_size"]
    request = {"bundle": str(bundle.path), "provider": provider, "threads": threads}
    status("measuring the machine's matrix products")
    found = _ask(request)
    machine = {"cpu": cpu_model(), "cores": usable_cores()} | found["machine"]
    rows = []
    for height, width in sizes:
        tokens = (height // patch) * (width // patch) + 1
        work = work_of(manifest.config, manifest.folded, tokens)
        limit = limit_of(work, batch, manifest.precision, found["gemm"])
        row = Row(height, width, tokens, batch, work, limit, "skipped")
        if limit > max_seconds:
            row = replace(row, reason=f"at least {limit:.0f} s a batch, more than --max-seconds {max_seconds:g}")
        else:
            status(f"{row.name}: at least {limit:.2g} s a batch, {repeats} times and warm-up")
            row = _measure(row, request | {"shape": [batch, height, width, 3], "repeats": repeats}, manifest.precision)
        if row.reason:
            status(f"{row.name}: {row.status}, {row.reason}")
        rows.append(row)
    return Report(bundle.path, manifest, machine, found["gemm"], tuple(rows))


def _measure(row: Row, request: dict[str, Any], precision: str) -> Row:
    try:
        answer = _ask(request)
    except InfexportError as error:
        return replace(row, status="failed", reason=in_a_line(error))
    measured = Measured(answer["seconds"], answer["answered"], answer["peak_memory"], answer["gemm"])
    limit = limit_of(row.work, row.batch, precision, measured.gemm)
    return replace(row, limit=limit, status="measured", measured=measured)


def in_a_line(error: InfexportError) -> str:
    """What went wrong, for a cell of a table."""
    return " ".join(f"{error.summary}: {error.details}".rstrip(": ").split())


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """All a worker says; `answered` is the seconds from before it was started until it said so.

    Raises:
        InfexportError: what the worker could not do, or how it ended.
    """
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", errors="replace") as messages:
        started = time.perf_counter()
        with subprocess.Popen(
            WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, encoding="utf-8"
        ) as worker:
            assert worker.stdin is not None
            assert worker.stdout is not None
            try:
                with suppress(BrokenPipeError):  # it ended before it listened; its exit code says more
                    worker.stdin.write(json.dumps(request))
                    worker.stdin.close()
                for line in worker.stdout:
                    if line.endswith("\n"):  # else it ended within a word
                        answer |= json.loads(line)
                    if answer.get("answered") is True:
                        answer["answered"] = time.perf_counter() - started
            except BaseException:
                worker.kill()
                raise
        messages.seek(0)
        if "error" in answer:
            raise InfexportError(answer["error"], answer["details"], answer["hint"])
        if worker.returncode:
            raise ending(worker.returncode, messages.read())
    return answer


def ending(code: int, messages: str) -> InfexportError:
    """How a process ended that should not have, from its exit code and what it wrote to stderr."""
    if code < 0:
        name = signal.Signals(-code).name
        return InfexportError(f"the process was killed by {name}", "out of memory, most likely" * (name == "SIGKILL"))
    last = messages.strip().rpartition("\n")[2]
    return InfexportError(f"the process ended with exit code {code}", last, "this is a bug in infexport")
