"""Predictions of a bundle for images, without torch or onnx."""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from infexport.inference.options import InferenceOptions
    from infexport.inference.prediction import Failure, ImageResult, Prediction
    from infexport.inference.predictor import Predictor

__all__ = ["Failure", "ImageResult", "InferenceOptions", "Prediction", "Predictor"]

_MODULES = {
    "Failure": "infexport.inference.prediction",
    "ImageResult": "infexport.inference.prediction",
    "InferenceOptions": "infexport.inference.options",
    "Prediction": "infexport.inference.prediction",
    "Predictor": "infexport.inference.predictor",
}
"""Public name → its module, imported on first use: the command line shows its help without numpy."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
