"""Where the golden cases are, how far is far, and what rounds as hardware does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from infexport.system.progress import ProgressEvent, ProgressListener, Status
from infvit.config import InfViTConfig

TINY = {
    family: InfViTConfig(
        variant=variant, image_size=24, patch_size=8, depth=2, embed_dim=24, num_heads=3, mlp_dim=40, num_classes=5,
        norm_eps=1e-6,
    )
    for family, variant in (("linear", "linear_infsa"), ("pure", "pure_infsa"), ("softmax", "softmax"))
}  # fmt: skip
"""Configs of the families that scripts/benchmarks/bench_peers.py measures."""

GOLDEN = Path(__file__).parent.parent / "golden"
ZOO = Path(__file__).parent.parent.parent / "models" / "zoo"
MODELS = sorted(case["file"] for case in json.loads((GOLDEN / "index.json").read_text()) if case["kind"] == "model")


def relative_error(x: Any, truth: Any) -> float:
    """‖x − truth‖ / ‖truth‖, Frobenius, in float64."""
    x, truth = np.asarray(x, np.float64), np.asarray(truth, np.float64)
    return float(np.linalg.norm(x - truth) / np.linalg.norm(truth))


class MatMul(OpRun):
    """Products as hardware forms them in half types: summed in float32, rounded once. Numpy's know no bfloat16."""

    op_domain = ""

    def _run(self, a, b):
        return (np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype),)


class Rounding:
    """A model run by ONNX's reference evaluator, which rounds after every operator.

    ONNX Runtime on a CPU computes between casts in float32, and not in bfloat16.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._evaluator = ReferenceEvaluator(onnx.inliner.inline_local_functions(model), new_ops=[MatMul])

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        return self._evaluator.run(None, feeds)


class StatusRecorder(ProgressListener):
    """Adds every status to a list."""

    def __init__(self, messages: list[str]) -> None:
        self._messages = messages

    def on_event(self, event: ProgressEvent) -> None:
        if isinstance(event, Status):
            self._messages.append(event.message)
