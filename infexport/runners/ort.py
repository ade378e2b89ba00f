"""A bundle's graph in ONNX Runtime."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from infexport.bundle import Bundle
from infexport.errors import InfexportError
from infexport.extras import require

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class OrtRunner:
    """Runs a bundle's `model.onnx` on one execution provider, and on no other.

    Args:
        bundle: what to run.
        provider: `cpu`, `cuda`, `tensorrt`, or `auto`, the fastest of cuda and cpu that is there.
        threads: of one operator; None leaves it to ONNX Runtime (all cores).
    """

    def __init__(self, bundle: Bundle, provider: str = "auto", threads: int | None = None) -> None:
        self.bundle = bundle
        self.provider = provider
        self.threads = threads
        self.name = "onnxruntime"
        self._session: Any = None

    def __enter__(self) -> Self:
        require("onnxruntime", extra="cpu")
        import onnxruntime

        self.provider = choose_provider(self.provider, onnxruntime.get_available_providers())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            self._session = onnxruntime.InferenceSession(
                self.bundle.model, sess_options=options, providers=[PROVIDERS[self.provider]]
            )
        except Exception as error:  # ONNX Runtime raises its own kinds, which share no base but Exception
            raise InfexportError(
                f"ONNX Runtime cannot load {self.bundle.model}",
                str(error),
                "convert the checkpoint again; infexport doctor shows what this machine can run",
            ) from error
        check_provider(self.provider, self._session.get_providers())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        (feed,) = self._session.get_inputs()
        value: NDArray[Any] = images
        if self.bundle.manifest.input == "float32":
            value = normalise(images, self.bundle.manifest.preprocessing)
        names = [output.name for output in self._session.get_outputs()]
        try:
            values = self._session.run(names, {feed.name: value})
        except Exception as error:
            raise InfexportError(
                f"ONNX Runtime failed on images of {images.shape[2]}x{images.shape[1]}, batch {images.shape[0]}",
                str(error),
                "try a smaller --size or --batch-size; memory grows with both",
            ) from error
        return dict(zip(names, values, strict=True))


def normalise(images: NDArray[np.uint8], preprocessing: dict[str, Any]) -> NDArray[np.float32]:
    """Normalised pixels `[B, 3, H, W]` of images `[B, H, W, 3]`, as the graph does it for uint8 input."""
    mean = np.asarray(preprocessing["mean"], np.float32)
    std = np.asarray(preprocessing["std"], np.float32)
    pixels = (images.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def choose_provider(asked: str, available: list[str]) -> str:
    """The provider to ask ONNX Runtime for.

    Raises:
        InfexportError: this build of ONNX Runtime doesn't have the one that was asked for.
    """
    if asked == "auto":
        return "cuda" if PROVIDERS["cuda"] in available else "cpu"
    if PROVIDERS[asked] not in available:
        raise InfexportError(
            f"this ONNX Runtime has no {PROVIDERS[asked]}",
            f"it has {', '.join(available)}",
            "uninstall onnxruntime and pip install 'infexport[gpu]' (the two overwrite each other), or --provider cpu",
        )
    return asked


def check_provider(asked: str, got: list[str]) -> None:
    """ONNX Runtime falls back to the CPU with no more than a log line: make that an error.

    Raises:
        InfexportError: the session does not run where it was asked to.
    """
    if not got or got[0] != PROVIDERS[asked]:
        raise InfexportError(
            f"asked for {PROVIDERS[asked]}, ONNX Runtime gave {got[0] if got else 'nothing'}",
            f"the session's providers: {', '.join(got) or 'none'}",
            "the driver, CUDA 13 or cuDNN 9 is missing or does not fit (infexport doctor), or use --provider cpu",
        )
