"""The machine's limit: one matrix product in ONNX Runtime, as large as a model's."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from infexport.runners.ort import PROVIDERS, import_onnxruntime

ROWS, INNER, COLUMNS = 4096, 1024, 4096
MULTIPLY_ADDS = ROWS * INNER * COLUMNS

KINDS = ("float32", "int8")
"""A graph each: MatMul, and MatMulInteger of uint8 by int8. Their right side is a ConstantOfShape, which ONNX Runtime
folds and packs when it loads them, like weights, and which takes no room here."""

UNITS = {"float32": "GFLOP/s", "int8": "GOP/s"}
"""Of `giga_operations`."""

SETTLE = 0.05
"""Seconds. The threads of a session that ran before still spin for some time, and would halve this one's rate."""


def kinds_for(precision: str) -> tuple[str, ...]:
    """What limits a bundle of that precision: attention is float32 in all of them."""
    return KINDS if precision == "int8" else KINDS[:1]


def giga_operations(seconds: float) -> float:
    """Billions of operations per second, a multiply-add being two, of one run that took `seconds`."""
    return 2 * MULTIPLY_ADDS / seconds / 1e9


class Gemm:
    """The product `[4096, 1024] x [1024, 4096]`, its right side constant, ready to run.

    Args:
        kind: one of KINDS.
        provider: a key of `runners.ort.PROVIDERS`.
        threads: of ONNX Runtime; None leaves it to ONNX Runtime.
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
        self._session = onnxruntime.InferenceSession(graph, options, providers=[PROVIDERS[provider]])
        random = np.random.default_rng(0)
        shape = (ROWS, INNER)
        left = (
            random.standard_normal(shape, np.float32)
            if kind == "float32"
            else random.integers(0, 256, shape, dtype=np.uint8)
        )
        # both sides stay where the product is computed: neither copies nor fresh pages are its cost
        device = "cpu" if provider == "cpu" else "cuda"
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input("a", onnxruntime.OrtValue.ortvalue_from_numpy(left, device))
        product = np.float32 if kind == "float32" else np.int32
        out = onnxruntime.OrtValue.ortvalue_from_shape_and_type([ROWS, COLUMNS], product, device)
        self._binding.bind_ortvalue_output("c", out)
        self.run()

    def run(self) -> None:
        """Once; the first time was when this was made."""
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def seconds(self) -> float:
        """The time one run takes."""
        time.sleep(SETTLE)
        started = time.perf_counter()
        self.run()
        return time.perf_counter() - started
