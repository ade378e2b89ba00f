"""Deploy Infinite Self-Attention vision transformers: checkpoint → ONNX → engine → parity → images."""

from __future__ import annotations

import os

__version__ = "0.1.0"

# from 1.32 on ONNX Runtime's packages send Microsoft what they run, and leave a file in the temporary folder; it asks
# once, when it is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

TYPE_CHECKING = False  # as type checkers know it; the module `typing` takes longer than all of this
if TYPE_CHECKING:
    from infexport.conversion.onnx_export import export
    from infexport.inference.predictor import Predictor

__all__ = ["Predictor", "__version__", "export"]


def __getattr__(name: str) -> object:
    # torch is imported only by who exports: the command line must answer without it
    if name == "export":
        from infexport.conversion.onnx_export import export

        return export
    if name == "Predictor":
        from infexport.inference.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
