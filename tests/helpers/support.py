"""Where the golden cases are, and how far is far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent.parent / "golden"
ZOO = Path(__file__).parent.parent.parent / "models" / "zoo"
MODELS = sorted(case["file"] for case in json.loads((GOLDEN / "index.json").read_text()) if case["kind"] == "model")


def relative_error(x: Any, truth: Any) -> float:
    """‖x − truth‖ / ‖truth‖, Frobenius, in float64."""
    x, truth = np.asarray(x, np.float64), np.asarray(truth, np.float64)
    return float(np.linalg.norm(x - truth) / np.linalg.norm(truth))
