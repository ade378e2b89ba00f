"""A bundle in Triton's python backend: this file is copied to the repository as `1/model.py`, next to `1/bundle`.

Tensors are passed by DLPack. The backend's own conversions are compiled against NumPy 1, up to Triton 24.10 at least.
With NumPy 2, `as_numpy` returns an array whose strides are 0: every pixel equals the first one, and no error is raised.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # provided by Triton in the server
from numpy.typing import NDArray

from infexport.errors import InfexportError
from infexport.inference.prediction import Failure, ImageResult
from infexport.inference.predictor import Predictor

CONSUMED = b"used_dltensor"
"""Name of a consumed DLPack capsule; a global, since a capsule holds a pointer to its name and no copy."""
ctypes.pythonapi.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]


class TritonPythonModel:
    """Model class that Triton creates once per instance."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle; after an error the model is not ready.

        Args:
            args: Triton's arguments: the model's place in the repository, and `model_config`, `config.pbtxt` as JSON.
        """
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        size = parameters["size"]
        self._max_pixels = int(parameters["max_pixels"])
        self._predictor = Predictor(
            Path(args["model_repository"]) / args["model_version"] / "bundle",
            size=int(size) if size.isdecimal() else size,
            provider=parameters["provider"],
            engine=parameters.get("engine"),
            memory=int(parameters["memory"]) if "memory" in parameters else None,
            threads=int(parameters["threads"]) if "threads" in parameters else None,
            batch_size=config["max_batch_size"],
        )
        try:
            side = self._predictor.bundle.manifest.config.image_size
            (row,) = self._predictor.predict([np.zeros((side, side, 3), np.uint8)])
            if isinstance(row, Failure):
                raise row.error
        except InfexportError as error:  # Triton shows only the text
            raise pb_utils.TritonModelException("\n".join([error.summary, error.details, error.hint])) from error

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return a response for every request, in order; an invalid request fails alone.

        Images of equal size are run together, even from several requests.
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
        """Return the images of a request, `[B, H, W, 3]`, in Triton's memory, or the error to respond with."""
        tensor = pb_utils.get_input_tensor_by_name(request, "image")
        _, height, width, _ = tensor.shape()  # Triton checks name, dtype and shape against config.pbtxt
        if not 0 < height * width <= self._max_pixels:
            text = (
                f"an image of {width}x{height} pixels; received {height * width:,}, expected 1 to {self._max_pixels:,}"
            )
            return pb_utils.TritonError(text, pb_utils.TritonError.INVALID_ARG)
        return np.from_dlpack(tensor)

    def _rows(self, images: Sequence[NDArray[np.uint8]]) -> list[ImageResult]:
        """Predict; see `Predictor.predict`. An error that concerns no single image becomes the failure of all."""
        try:
            return self._predictor.predict(images)
        except InfexportError as error:
            shown = error
        except Exception as error:  # the server continues after any error
            pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
            shown = InfexportError("a bug in infexport, or in a library below it", type(error).__name__)
        return [Failure("", shown)] * len(images)


def _response(rows: Sequence[ImageResult]) -> Any:
    """Build a response: `logits [B, classes]` and `features [B, E]`, or the first error among the images."""
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
    # the backend renames the capsule, and NumPy warns about an unknown name when it frees it
    ctypes.pythonapi.PyCapsule_SetName(capsule, CONSUMED)
    return tensor
