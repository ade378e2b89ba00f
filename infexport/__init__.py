"""Deploy Infinite Self-Attention vision transformers: checkpoint → ONNX → engine → parity → images."""

from __future__ import annotations

import importlib
import os

__version__ = "0.1.0"

# ONNX Runtime's packages, from 1.32 on, report usage to Microsoft and leave a file in the temporary folder. They read
# this once, when they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

TYPE_CHECKING = False  # type checkers read this name; importing `typing` takes longer than the rest of this file
if TYPE_CHECKING:
    from infexport.bundle import open_bundle
    from infexport.conversion.convert import convert
    from infexport.conversion.onnx_export import export
    from infexport.errors import InfexportError
    from infexport.inference.predictor import Predictor

__all__ = ["InfexportError", "Predictor", "__version__", "convert", "export", "open_bundle"]

_MODULES = {
    "InfexportError": "infexport.errors",
    "Predictor": "infexport.inference.predictor",
    "convert": "infexport.conversion.convert",
    "export": "infexport.conversion.onnx_export",
    "open_bundle": "infexport.bundle",
}
"""Public name → its module, imported on first use: the command line must start without numpy and torch."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
