"""The machine's limit: one matrix product in ONNX Runtime, as large as a model's."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np

from infexport.errors import InfexportError
from infexport.inference.runners.onnxruntime import PROVIDERS, import_onnxruntime, with_options

SHAPES = {"float32": (4096, 1024, 4096), "int8": (4096, 1024, 4096), "float16": (8192, 4096, 8192)}
"""A graph each, `[rows, inner] x [inner, columns]`: MatMul, and MatMulInteger of uint8 by int8. That of float16 is for
GPUs, and so large that an A100 takes some 2 ms, as it does for float32. Their right side is a ConstantOfShape, which
ONNX Runtime folds and packs when it loads them, like weights, and which takes no room here. A GPU draws less power for
one that is all ones, and may run it at a higher clock than a model's: the limit is rather too short than too long."""

UNITS = {"float32": "GFLOP/s", "int8": "GOP/s", "float16": "GFLOP/s"}
"""Units of `giga_operations`."""

SETTLE = 0.05
"""Seconds. The threads of a session that ran before still spin for some time, and would halve this one's rate."""
LONG_ENOUGH = 0.05
"""Seconds. On a GPU a product is run until they have passed: starting one and waiting for it must not count."""


def limiting(precision: str, provider: str) -> tuple[str, str] | None:
    """The kinds of product that limit a model's dense layers and its attention; None where there is none like them.

    Args:
        precision: of the layers that meet every token.
        provider: what runs them, as a runner's `provider` says it.
    """
    if provider == "cpu":  # where 16 bits are computed in float32
        return ("int8" if precision == "int8" else "float32"), "float32"
    if provider not in ("cuda", "tensorrt") or precision == "int8":
        return None
    return ("float32", "float32") if precision == "fp32" else ("float16", "float16")


def absence(precision: str, provider: str) -> str:
    """Why `limiting` names no product."""
    if provider in ("cuda", "tensorrt"):
        return f"ONNX Runtime multiplies no {precision} on a GPU"
    return f"{provider} runs without ONNX Runtime's CUDA provider, whose matrix product it would be measured by"


def multiply_adds(kind: str) -> int:
    """Multiply-adds of one run."""
    return math.prod(SHAPES[kind])


def giga_operations(seconds: float, kind: str = "float32") -> float:
    """Billions of operations per second, a multiply-add being two, of one run that took `seconds`."""
    return 2 * multiply_adds(kind) / seconds / 1e9


class Gemm:
    """A product of SHAPES, its right side constant, ready to run.

    Args:
        kind: a key of SHAPES.
        provider: `cpu`, or a provider on a GPU, where the product runs on ONNX Runtime's `cuda`.
        threads: of ONNX Runtime; None leaves it to ONNX Runtime.

    Raises:
        InfexportError: ONNX Runtime gives another provider.
    """

    def __init__(self, kind: str, provider: str, threads: int | None) -> None:
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # whoever is measured next must not meet this session's threads spinning
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        graph = Path(__file__).with_name(f"{kind}.onnx")
        device = "cpu" if provider == "cpu" else "cuda"
        self._on_gpu = device == "cuda"
        self._session = onnxruntime.InferenceSession(graph, options, providers=[with_options(device)])
        if self._session.get_providers()[0] != PROVIDERS[device]:
            raise InfexportError(
                f"ONNX Runtime gave no {PROVIDERS[device]} for the matrix product",
                hint="infexport doctor shows what this machine can run",
            )
        random = np.random.default_rng(0)
        rows, inner, columns = SHAPES[kind]
        left = (
            random.integers(0, 256, (rows, inner), dtype=np.uint8)
            if kind == "int8"
            else random.standard_normal((rows, inner), np.float32).astype(kind)
        )
        # both sides stay where the product is computed: neither copies nor fresh pages are its cost
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input("a", onnxruntime.OrtValue.ortvalue_from_numpy(left, device))
        product = np.int32 if kind == "int8" else left.dtype.type
        out = onnxruntime.OrtValue.ortvalue_from_shape_and_type([rows, columns], product, device)
        self._binding.bind_ortvalue_output("c", out)
        self.run()

    def run(self) -> None:
        """Once, to the end; the first time was when this was made."""
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def seconds(self) -> float:
        """The time one run takes; on a GPU the mean of many."""
        if self._on_gpu:
            return self._mean_seconds()
        time.sleep(SETTLE)
        started = time.perf_counter()
        self.run()
        return time.perf_counter() - started

    def _mean_seconds(self) -> float:
        started, runs, passed = time.perf_counter(), 0, 0.0
        while passed < LONG_ENOUGH:
            self.run()
            runs, passed = runs + 1, time.perf_counter() - started
        return passed / runs
