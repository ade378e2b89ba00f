"""Measure a bundle at one size and go: `python -m infexport.benchmark_worker`, a JSON request on stdin.

What it has to say are JSON objects on stdout, a line each, when it knows them. A process of its own, since cold start
and peak memory are a process's, and since a size that memory does not hold should end no other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from infexport.bundle import Bundle, open_bundle
from infexport.errors import InfexportError
from infexport.gemm import Gemm, kinds_for
from infexport.machine import peak_memory, threads_alive
from infexport.runners.ort import OrtRunner, import_onnxruntime

FEW = 2
"""Runs between two matrix products."""
SHORT = 0.1
"""Seconds. A run this short is slower right after a matrix product, which leaves nothing in the caches."""
PROBES = 3
"""Matrix products of each kind where no size is measured."""

Tell = Callable[[dict[str, Any]], None]


def probe(request: dict[str, Any], tell: Tell) -> None:
    """Load the bundle and run the matrix products.

    Args:
        request: `bundle`, `provider`, `threads`.
        tell: takes `gemm`, seconds of each run by kind, and `machine`: `threads`, `provider` and `onnxruntime`.

    Raises:
        InfexportError: the bundle or the provider.
    """
    bundle = open_bundle(Path(request["bundle"]))
    version = import_onnxruntime().__version__
    threads, before = request["threads"], threads_alive()
    with OrtRunner(bundle, request["provider"], threads) as runner:
        after = threads_alive()
        if runner.provider == "cpu" and before is not None and after is not None:
            threads = 1 + after - before  # the calling thread computes, too
        tell({"machine": {"threads": threads, "provider": runner.provider, "onnxruntime": version}})
        products = _products(bundle, runner.provider, request["threads"])
    tell({"gemm": {kind: [product.seconds() for _ in range(PROBES)] for kind, product in products.items()}})


def measure(request: dict[str, Any], tell: Tell) -> None:
    """Run the bundle, and matrix products in between.

    Args:
        request: `bundle`, `provider`, `threads`, `shape` `[B, H, W, 3]` and `repeats`.
        tell: takes `answered` after the first answer, then `peak_memory` in bytes, `seconds` of every run that counts,
            and `gemm`, seconds by kind.

    Raises:
        InfexportError: the bundle, the provider or memory.
    """
    bundle = open_bundle(Path(request["bundle"]))
    with OrtRunner(bundle, request["provider"], request["threads"]) as runner:
        images = np.random.default_rng(0).integers(0, 256, request["shape"], dtype=np.uint8)
        runner.run(images)
        tell({"answered": True})

        def run() -> float:
            started = time.perf_counter()
            runner.run(images)
            return time.perf_counter() - started

        short = run() < SHORT
        # before the matrix products are loaded: their memory is not the model's
        tell({"peak_memory": peak_memory()})
        products = _products(bundle, runner.provider, request["threads"])
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


def _products(bundle: Bundle, provider: str, threads: int | None) -> dict[str, Gemm]:
    return {kind: Gemm(kind, provider, threads) for kind in kinds_for(bundle.manifest.precision)}


def main() -> None:
    # libraries print to stdout as they like: from here on that is stderr
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        request = json.load(sys.stdin)
        (measure if "shape" in request else probe)(request, tell)
    except InfexportError as error:
        tell(error.to_dict())
    except MemoryError as error:
        tell(InfexportError("not enough memory", str(error), "try smaller --sizes or a smaller --batch-size").to_dict())


if __name__ == "__main__":
    main()
