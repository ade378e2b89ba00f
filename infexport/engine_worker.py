"""Build one engine and go: `python -m infexport.engine_worker REQUEST RESPONSE`, both JSON files.

A process of its own, since a crash in the library should be an error there and not the end of the caller.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from infexport import tensorrt_rtx
from infexport.errors import InfexportError


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Parse and build.

    Args:
        request: `model` and `engine`, files; `compute_capability`, a member of the library's enum; `profile`, input
            name → minimum, optimum and maximum shape.

    Raises:
        InfexportError: the parser or the builder refuses; every one of the parser's errors is in the details.
    """
    trt = tensorrt_rtx.load()
    messages: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            # without a GPU every build logs that there is none; that is no reason for anything
            if severity in (trt.Logger.ERROR, trt.Logger.INTERNAL_ERROR) and "Cuda Runtime" not in message:
                messages.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["model"]):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise InfexportError(
            f"TensorRT-RTX's parser refuses {request['model']}",
            "\n".join(dict.fromkeys(errors + messages)),
            "convert the checkpoint again with this version of infexport",
        )
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, request["compute_capability"]), 0)
    profile = builder.create_optimization_profile()
    for name, shapes in request["profile"].items():
        profile.set_shape(name, *(tuple(shape) for shape in shapes))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise InfexportError(
            "TensorRT-RTX could not build the engine",
            "\n".join(messages),
            "try a smaller --max-size or --max-batch",
        )
    with Path(request["engine"]).open("wb") as file:
        file.write(memoryview(plan))
    return {"backend_version": trt.__version__}


def main() -> None:
    request_file, response_file = map(Path, sys.argv[1:])
    try:
        response = build(json.loads(request_file.read_text()))
    except InfexportError as error:
        response = error.to_dict()
    except Exception as error:  # whatever the library raises must reach the user as a message
        details = f"{type(error).__name__}: {error}"
        response = InfexportError("TensorRT-RTX cannot be used", details, "infexport doctor").to_dict()
    response_file.write_text(json.dumps(response))


if __name__ == "__main__":
    main()
