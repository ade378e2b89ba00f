"""A bundle in Triton's python backend: this file lies in the repository as `1/model.py`, beside `1/bundle`.

Tensors pass by DLPack. The backend's own conversions are compiled against NumPy 1 up to Triton 24.10 at least: under
NumPy 2 `as_numpy` there gives an array whose strides are 0, every pixel the first one, and no error.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # Triton's own, there where it runs
from numpy.typing import NDArray

from infexport.errors import InfexportError
from infexport.inference.prediction import Failure, ImageResult
from infexport.inference.predictor import Predictor

CONSUMED = b"used_dltensor"
"""Name of a DLPack capsule that has been taken; kept here, since a capsule holds no copy of it."""
ctypes.pythonapi.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]


class TritonPythonModel:
    """What Triton starts, once for every instance."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle; an error here is a model that is not ready.

        Args:
            args: of Triton: where the repository is, and `model_config`, `config.pbtxt` as JSON.
        """
        config = json.loads(args["model_config"])
        told = {name: value["string_value"] for name, value in config["parameters"].items()}
        size = told["size"]
        self._max_pixels = int(told["max_pixels"])
        self._predictor = Predictor(
            Path(args["model_repository"]) / args["model_version"] / "bundle",
            size=int(size) if size.isdecimal() else size,
            provider=told["provider"],
            engine=told.get("engine"),
            memory=int(told["memory"]) if "memory" in told else None,
            threads=int(told["threads"]) if "threads" in told else None,
            batch_size=config["max_batch_size"],
        )
        try:
            side = self._predictor.bundle.manifest.config.image_size
            (row,) = self._predictor.predict([np.zeros((side, side, 3), np.uint8)])
            if isinstance(row, Failure):
                raise row.error
        except InfexportError as error:  # its text alone is what Triton shows
            raise pb_utils.TritonModelException("\n".join([error.summary, error.details, error.hint])) from error

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for every request, in their order; what is wrong with one is an error of that one.

        Images of equal size are run together, whichever requests they are of.
        """
        given = [self._images(request) for request in requests]
        images = [image for each in given if isinstance(each, np.ndarray) for image in each]
        rows = iter(self._rows(images))
        return [
            _response([next(rows) for _ in each])
            if isinstance(each, np.ndarray)
            else pb_utils.InferenceResponse(output_tensors=[], error=each)
            for each in given
        ]

    def finalize(self) -> None:
        self._predictor.close()

    def _images(self, request: Any) -> NDArray[np.uint8] | Any:
        """The images of a request, `[B, H, W, 3]`, in Triton's memory; or the error it is answered with."""
        tensor = pb_utils.get_input_tensor_by_name(request, "image")
        _, height, width, _ = tensor.shape()  # Triton has refused all that is not as config.pbtxt says
        if not 0 < height * width <= self._max_pixels:
            text = (
                f"an image of {width}x{height} pixels; received {height * width:,}, expected 1 to {self._max_pixels:,}"
            )
            return pb_utils.TritonError(text, pb_utils.TritonError.INVALID_ARG)
        return np.from_dlpack(tensor)

    def _rows(self, images: Sequence[NDArray[np.uint8]]) -> list[ImageResult]:
        """As of `Predictor.predict`; an error that is no image's is every image's."""
        try:
            return self._predictor.predict(images)
        except InfexportError as error:
            told = error
        except Exception as error:  # the server goes on, whatever it is
            pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
            told = InfexportError("a bug in infexport, or in what it runs on", type(error).__name__)
        return [Failure("", told)] * len(images)


def _response(rows: Sequence[ImageResult]) -> Any:
    """Of one request: `logits [B, classes]` and `features [B, E]`, or the error of the first image that has one."""
    for row in rows:
        if isinstance(row, Failure):
            error = pb_utils.TritonError(row.text, pb_utils.TritonError.INTERNAL)
            return pb_utils.InferenceResponse(output_tensors=[], error=error)
    tensors = [
        _tensor(name, np.array([getattr(row, name) for row in rows], np.float32)) for name in ("logits", "features")
    ]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _tensor(name: str, values: NDArray[np.float32]) -> Any:
    capsule = values.__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    # the backend marks a capsule by a name of its own, at which NumPy complains when it comes to free it
    ctypes.pythonapi.PyCapsule_SetName(capsule, CONSUMED)
    return tensor
