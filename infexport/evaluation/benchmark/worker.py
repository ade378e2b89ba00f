"""Measure a bundle at one size and go: `python -m infexport.evaluation.benchmark.worker`, a JSON request on stdin.

A process of its own (see `system.workers`), since cold start and peak memory are a process's, and since a size that
memory does not hold should end no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from infexport.bundle import Bundle, open_bundle
from infexport.evaluation.benchmark.gemm import Gemm, limiting
from infexport.inference.runners import ImageRunner
from infexport.inference.runners.factory import RunnerFactory
from infexport.system.gpu_meter import Meter
from infexport.system.host import peak_memory, threads_alive
from infexport.system.workers import serve

FEW = 2
"""Runs between two matrix products."""
SHORT = 0.1
"""Seconds. A run this short is slower right after a matrix product, which leaves nothing in the caches."""
PROBES = 3
"""Matrix products of each kind where no size is measured, and after one on a GPU."""
WARM_UP = 0.5
"""Seconds of runs on a GPU that don't count: its clock rises, and libraries choose their kernels."""
AT_LEAST = 1.0
"""Seconds of runs on a GPU that count: over less its counter of energy says nothing."""

Tell = Callable[[dict[str, Any]], None]


def probe(request: dict[str, Any], tell: Tell) -> None:
    """Load the bundle and run the matrix products.

    Args:
        request: `bundle`, `provider`, `engine`, `threads`.
        tell: takes `precision`, `gemm`, seconds of each run by kind, and `machine`: `threads`, `provider`, `runtime`
            and on a GPU `gpu`.

    Raises:
        InfexportError: the bundle or the provider.
    """
    bundle = open_bundle(Path(request["bundle"]))
    opened = _opening(bundle, request).runner()  # before threads are counted: importing a library may start some
    threads, before = request["threads"], threads_alive()
    with opened as runner:
        after = threads_alive()
        if runner.provider == "cpu" and before is not None and after is not None:
            threads = 1 + after - before  # the calling thread computes, too
        machine = {"threads": threads, "provider": runner.provider, "runtime": runner.version}
    if runner.provider != "cpu":
        with Meter() as meter:
            machine["gpu"] = meter.gpu
    tell({"machine": machine, "precision": runner.precision, "gemm": _probed(runner, request["threads"])})


def measure(request: dict[str, Any], tell: Tell) -> None:
    """Run the bundle, and matrix products in between; on a GPU afterwards.

    Args:
        request: `bundle`, `provider`, `engine`, `threads`, `shape` `[B, H, W, 3]`, `repeats`, and `on_gpu`: whether the
            provider is one.
        tell: takes `refused` where the runner does not take the shape; else `answered` after the first answer, then
            `peak_memory` in bytes, `seconds` of every run that counts, `gemm`, seconds by kind, and on a GPU `on_gpu`,
            the fields of `result.OnGpu`.

    Raises:
        InfexportError: the bundle, the provider or memory.
    """
    runner = _opening(open_bundle(Path(request["bundle"])), request).runner()
    if not runner.takes(request["shape"]):
        tell({"refused": f"{runner.provider} was not built for this size and batch"})
        return
    with Meter() if request["on_gpu"] else nullcontext() as meter:
        with runner:
            images = np.random.default_rng(0).integers(0, 256, request["shape"], dtype=np.uint8)
            runner.run(images)
            tell({"answered": True})

            def run() -> float:
                started = time.perf_counter()
                runner.run(images)  # its answer is in this process's memory: nothing is left to wait for
                return time.perf_counter() - started

            if meter is None:
                _in_turn(run, runner, request, tell)
            else:
                _sustained(run, meter, request["repeats"], tell)
        if meter is not None:  # the model has left, so that there is room
            tell({"gemm": _probed(runner, request["threads"])})


def _in_turn(run: Callable[[], float], runner: ImageRunner, request: dict[str, Any], tell: Tell) -> None:
    """On a CPU, whose rate changes with what else it does: runs and matrix products in turn."""
    short = run() < SHORT
    # before the matrix products are loaded: their memory is not the model's
    tell({"peak_memory": peak_memory()})
    products = _products(runner, request["threads"])
    gemm: dict[str, list[float]] = {kind: [] for kind in products}
    seconds: list[float] = []
    while True:
        for kind, product in products.items():
            gemm[kind].append(product.seconds())
        if len(seconds) == request["repeats"]:
            break
        if short:
            run()
        seconds.extend(run() for _ in range(min(FEW, request["repeats"] - len(seconds))))
    tell({"seconds": seconds, "gemm": gemm})


def _sustained(run: Callable[[], float], meter: Meter, repeats: int, tell: Tell) -> None:
    """On a GPU: run after run, `repeats` times or more, until AT_LEAST seconds have passed."""
    warm = 0.0
    while warm < WARM_UP:
        warm += run()
    # the runtimes keep what they allocate, so the runs that count take no more
    on_gpu = {"peak_memory": meter.peak_memory()}
    tell({"peak_memory": peak_memory()})
    seconds: list[float] = []
    before, total = meter.joules(), 0.0
    while len(seconds) < repeats or total < AT_LEAST:
        seconds.append(run())
        total += seconds[-1]
    after = meter.joules()
    joules = None if before is None or after is None else after - before
    tell({"seconds": seconds, "on_gpu": on_gpu | {"joules": joules, "missing": meter.missing}})


def _opening(bundle: Bundle, request: dict[str, Any]) -> RunnerFactory:
    return RunnerFactory(bundle, request["provider"], request["engine"], request["threads"])


def _products(runner: ImageRunner, threads: int | None) -> dict[str, Gemm]:
    """Those that limit it, by kind."""
    kinds = sorted(set(limiting(runner.precision, runner.provider) or ()))
    return {kind: Gemm(kind, runner.provider, threads) for kind in kinds}


def _probed(runner: ImageRunner, threads: int | None) -> dict[str, list[float]]:
    """Seconds of a few runs of every product."""
    return {kind: [product.seconds() for _ in range(PROBES)] for kind, product in _products(runner, threads).items()}


def work(request: dict[str, Any], tell: Tell) -> None:
    (measure if "shape" in request else probe)(request, tell)


if __name__ == "__main__":
    serve(work)
