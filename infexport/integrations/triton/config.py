"""`config.pbtxt`, the configuration of a model: built as Triton's own message and checked against the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infexport.bundle import Bundle
from infexport.bundle.engine_record import ShapeRange
from infexport.bundle.manifest import Manifest
from infexport.errors import InfexportError
from infexport.inference.runners.onnxruntime import Port

CONFIG = "config.pbtxt"
LABELS = "labels.txt"
PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan", "python": ""}
TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}
"""NumPy's name of a dtype → Triton's."""


@dataclass(frozen=True)
class Service:
    """Options of a served model.

    Attributes:
        name: name of the model.
        backend: `onnxruntime` and `tensorrt` run a graph, which takes whole patches; `python` runs `Predictor`, which
            takes images of any size.
        device: device of the instances.
        instances: number of instances that run in parallel.
        max_batch_size: images per batch.
        max_queue_delay: microseconds that a request may wait for others.
        engine: name of a set of engines, for `tensorrt` and `python`.
        threads: threads of ONNX Runtime per instance; None for all cores.
        size, memory: options of `Predictor`, for `python`.
        max_pixels: largest number of pixels of an image; `python` refuses larger ones.
    """

    name: str
    backend: Literal["onnxruntime", "tensorrt", "python"] = "onnxruntime"
    device: Literal["cpu", "gpu"] = "cpu"
    instances: int = 1
    max_batch_size: int = 8
    max_queue_delay: int = 0
    engine: str | None = None
    threads: int | None = None
    size: str | int = "native"
    memory: int | None = None
    max_pixels: int = 2**26


def make_config(bundle: Bundle, service: Service, opt: Sequence[int] | None = None) -> Any:
    """Build Triton's message `ModelConfig`.

    Args:
        bundle: the bundle to serve.
        service: options of the model.
        opt: input shape of the warm-up request, `[B, …]`; None for one image of the trained size.
    """
    from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

    manifest = bundle.manifest
    config = ModelConfig(name=service.name, backend=service.backend, platform=PLATFORMS[service.backend])
    config.max_batch_size = service.max_batch_size
    name, dtype, dims, trained = _input(manifest, service)
    config.input.add(name=name, data_type=DataType.Value(TYPES[dtype]), dims=dims)
    for output, width in (("logits", manifest.config.num_classes), ("features", manifest.config.embed_dim)):
        config.output.add(name=output, data_type=DataType.TYPE_FP32, dims=[width])
    if bundle.labels is not None:
        config.output[0].label_filename = LABELS
    kind = ModelInstanceGroup.KIND_GPU if service.device == "gpu" else ModelInstanceGroup.KIND_CPU
    # Predictor uses the first GPU: without this Triton would start instances for the other GPUs on it, too
    first_gpu = [0] if service.device == "gpu" and service.backend == "python" else []
    config.instance_group.add(count=service.instances, kind=kind, gpus=first_gpu)
    # by default Triton batches only requests of equal shapes: none are padded to a common size
    config.dynamic_batching.max_queue_delay_microseconds = service.max_queue_delay
    warmup = config.model_warmup.add(name="first request", batch_size=1)
    first = trained if opt is None else opt[1:]
    warmup.inputs[name].CopyFrom(type(warmup.inputs[name])(data_type=DataType.Value(TYPES[dtype]), dims=first))
    warmup.inputs[name].zero_data = True
    for key, value in _parameters(service).items():
        config.parameters[key].string_value = str(value)
    return config


def _input(manifest: Manifest, service: Service) -> tuple[str, str, list[int], list[int]]:
    """Return the input's name, dtype and dims without the batch, and the dims of an image of the trained size."""
    side = manifest.config.image_size
    if service.backend == "python" or manifest.input == "uint8":
        return "image", "uint8", [-1, -1, 3], [side, side, 3]
    return "pixels", "float32", [3, -1, -1], [3, side, side]


def _parameters(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if service.backend == "onnxruntime":
        found = {"intra_op_thread_count": service.threads}
    elif service.backend == "python":
        found = {
            "size": service.size,
            "max_pixels": service.max_pixels,
            "provider": "engine" if service.engine else {"cpu": "cpu", "gpu": "cuda"}[service.device],
            "engine": service.engine,
            "memory": service.memory,
            "threads": service.threads,
        }
    return {key: value for key, value in found.items() if value is not None}


def write_config(config: Any, file: Path) -> None:
    from google.protobuf import text_format

    file.write_text(text_format.MessageToString(config), encoding="utf-8")


def read_config(file: Path) -> Any:
    """Parse a `config.pbtxt` as Triton does.

    Raises:
        InfexportError: it has fields that Triton does not know, or values of a wrong type.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        return text_format.Parse(file.read_text(encoding="utf-8"), ModelConfig())
    except text_format.ParseError as error:
        raise InfexportError(f"Triton cannot read {file}", str(error)) from error


def check_config(
    file: Path,
    name: str,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    profile: Mapping[str, ShapeRange] | None = None,
) -> Any:
    """Check a `config.pbtxt` against the graph, which Triton's message does not cover.

    Args:
        file: the `config.pbtxt`.
        name: name of the model's folder.
        inputs, outputs: ports of the served graph; their first axis is the batch.
        profile: profile of the engine, by input; None if the graph takes any batch and size.

    Returns:
        Triton's message.

    Raises:
        InfexportError: they disagree; the details list every difference.
    """
    config = read_config(file)
    wrong = [] if config.name == name else [f"name: {config.name} in the folder {name}"]
    for kind, tensors, ports in (("input", config.input, inputs), ("output", config.output, outputs)):
        wrong += _differences(kind, tensors, ports)
    for output in config.output:
        if output.label_filename:
            wrong += _wrong_labels(file.parent / output.label_filename, output)
    for tensor, shapes in (profile or {}).items():
        if not shapes.min[0] == 1 <= config.max_batch_size <= shapes.max[0]:
            wrong.append(
                f"batch: {tensor} 1 to {config.max_batch_size}, the engine takes {shapes.min[0]} to {shapes.max[0]}"
            )
    for warmup in config.model_warmup:
        wrong += _wrong_warmup(warmup, config, profile or {})
    if wrong:
        raise InfexportError(f"{file} disagrees with the served graph", "\n".join(wrong))
    return config


def _differences(kind: str, tensors: Sequence[Any], ports: Sequence[Port]) -> list[str]:
    from tritonclient.grpc.model_config_pb2 import DataType

    configured = {tensor.name: (DataType.Name(tensor.data_type), list(tensor.dims)) for tensor in tensors}
    # a dynamic axis has a name; Triton's dims do not include the batch
    actual = {port.name: (TYPES.get(port.dtype, port.dtype), [_dim(axis) for axis in port.shape[1:]]) for port in ports}
    wrong = [
        f"{kind} {name}: {configured.get(name, 'missing')}, the graph has {actual.get(name, 'none')}"
        for name in dict.fromkeys([*configured, *actual])
        if configured.get(name) != actual.get(name)
    ]
    return wrong + [
        f"{kind} {port.name}: the graph's batch is fixed, {port.shape[0]}"
        for port in ports
        if isinstance(port.shape[0], int)
    ]


def _dim(axis: int | str | None) -> int:
    return axis if isinstance(axis, int) else -1


def _wrong_labels(file: Path, output: Any) -> list[str]:
    count = len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0
    return (
        [] if [count] == list(output.dims) else [f"{file.name}: {count} labels for {output.name} {list(output.dims)}"]
    )


def _wrong_warmup(warmup: Any, config: Any, profile: Mapping[str, ShapeRange]) -> list[str]:
    """List warm-up inputs that the model does not take, which Triton would report when it loads the model."""
    wrong = []
    for tensor in config.input:
        first = warmup.inputs[tensor.name]
        fits = len(first.dims) == len(tensor.dims) and all(
            dim in (-1, size) for dim, size in zip(tensor.dims, first.dims, strict=True)
        )
        if tensor.name in profile and fits:
            shapes = profile[tensor.name]
            fits = all(a <= size <= b for a, size, b in zip(shapes.min[1:], first.dims, shapes.max[1:], strict=True))
        if not fits or first.data_type != tensor.data_type:
            wrong.append(f"warm-up: {tensor.name} {list(first.dims)} for {list(tensor.dims)}")
    return wrong


def to_dict(config: Any) -> dict[str, Any]:
    """Convert Triton's message to JSON values, with the field names of `config.pbtxt`."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(config, preserving_proto_field_name=True)


def list_tensors(config: Any) -> list[tuple[str, str]]:
    """Return (`input` or `output`, description) for every tensor of Triton's message."""
    from tritonclient.grpc.model_config_pb2 import DataType

    def text(tensor: Any) -> str:
        dims = ", ".join(map(str, tensor.dims)).replace("-1", "any")
        return (
            f"{tensor.name} {DataType.Name(tensor.data_type).removeprefix('TYPE_')} [1…{config.max_batch_size}, {dims}]"
        )

    return [
        (kind, text(tensor))
        for kind, tensors in (("input", config.input), ("output", config.output))
        for tensor in tensors
    ]
