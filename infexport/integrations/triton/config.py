"""`config.pbtxt`: what Triton is told of a model, made as Triton's own message and judged against the graph."""

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
"""Dtype as NumPy calls it → as Triton does."""

"""Smallest, best and largest shape, as sidecars of engines have it."""


@dataclass(frozen=True)
class Service:
    """How a bundle is to be served.

    Attributes:
        name: of the model.
        backend: `onnxruntime` and `tensorrt` run a graph, which takes whole patches; `python` runs `Predictor`, which
            takes images of any size.
        device: where.
        instances: how many run side by side.
        max_batch_size: images at once.
        max_queue_delay: microseconds that a request may wait for others.
        engine: name of a set of engines; of `tensorrt` and `python`.
        threads: of ONNX Runtime, for an instance; None for all cores.
        size, memory: as of `Predictor`; of `python`.
        max_pixels: of an image; `python` refuses larger ones.
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


def make_config(bundle: Bundle, service: Service, best: Sequence[int] | None = None) -> Any:
    """Triton's message, `ModelConfig`.

    Args:
        bundle: to be served.
        service: how.
        best: shape of the input that the first request shall have, `[B, …]`; None for one image of the trained size.
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
    # of several GPUs Predictor takes the first, so that instances for the others would be there, too
    first_gpu = [0] if service.device == "gpu" and service.backend == "python" else []
    config.instance_group.add(count=service.instances, kind=kind, gpus=first_gpu)
    # Triton puts requests of equal shapes alone together unless told otherwise: none are padded to a common size
    config.dynamic_batching.max_queue_delay_microseconds = service.max_queue_delay
    warmup = config.model_warmup.add(name="first request", batch_size=1)
    first = trained if best is None else best[1:]
    warmup.inputs[name].CopyFrom(type(warmup.inputs[name])(data_type=DataType.Value(TYPES[dtype]), dims=first))
    warmup.inputs[name].zero_data = True
    for key, value in _parameters(service).items():
        config.parameters[key].string_value = str(value)
    return config


def _input(manifest: Manifest, service: Service) -> tuple[str, str, list[int], list[int]]:
    """Name, dtype, dims without the batch, and those of an image of the trained size."""
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
    """A `config.pbtxt` as Triton reads it.

    Raises:
        InfexportError: it has fields that Triton does not know, or of other types.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        return text_format.Parse(file.read_text(encoding="utf-8"), ModelConfig())
    except text_format.ParseError as error:
        raise InfexportError(f"Triton would not read {file}", str(error)) from error


def check_config(
    file: Path,
    name: str,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    profile: Mapping[str, ShapeRange] | None = None,
) -> Any:
    """A `config.pbtxt`, judged by what Triton's message does not hold it to: the graph.

    Args:
        file: it.
        name: of the model's folder.
        inputs, outputs: of what it serves; their first axis is the batch.
        profile: of an engine, by input; None where the graph takes any batch and size.

    Returns:
        Triton's message.

    Raises:
        InfexportError: they disagree; says in what.
    """
    config = read_config(file)
    wrong = [] if config.name == name else [f"name: {config.name} in the folder {name}"]
    for kind, told, ports in (("input", config.input, inputs), ("output", config.output, outputs)):
        wrong += _differences(kind, told, ports)
    for output in config.output:
        if output.label_filename:
            wrong += _wrong_labels(file.parent / output.label_filename, output)
    for tensor, (least, _, most) in (profile or {}).items():
        if not least[0] == 1 <= config.max_batch_size <= most[0]:
            wrong.append(f"batch: {tensor} 1 to {config.max_batch_size}, the engine takes {least[0]} to {most[0]}")
    for warmup in config.model_warmup:
        wrong += _wrong_warmup(warmup, config, profile or {})
    if wrong:
        raise InfexportError(f"{file} disagrees with what it serves", "\n".join(wrong))
    return config


def _differences(kind: str, told: Sequence[Any], ports: Sequence[Port]) -> list[str]:
    from tritonclient.grpc.model_config_pb2 import DataType

    says = {tensor.name: (DataType.Name(tensor.data_type), list(tensor.dims)) for tensor in told}
    # a dynamic axis has a name; the batch is no part of what Triton calls dims
    has = {port.name: (TYPES.get(port.dtype, port.dtype), [_dim(axis) for axis in port.shape[1:]]) for port in ports}
    wrong = [
        f"{kind} {name}: {says.get(name, 'missing')}, the graph has {has.get(name, 'none')}"
        for name in dict.fromkeys([*says, *has])
        if says.get(name) != has.get(name)
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
    """Whether the first request is one that the model takes: Triton finds out when it loads the model."""
    wrong = []
    for tensor in config.input:
        first = warmup.inputs[tensor.name]
        fits = len(first.dims) == len(tensor.dims) and all(
            told in (-1, size) for told, size in zip(tensor.dims, first.dims, strict=True)
        )
        if tensor.name in profile and fits:
            least, _, most = profile[tensor.name]
            fits = all(a <= size <= b for a, size, b in zip(least[1:], first.dims, most[1:], strict=True))
        if not fits or first.data_type != tensor.data_type:
            wrong.append(f"warm-up: {tensor.name} {list(first.dims)} for {list(tensor.dims)}")
    return wrong


def to_dict(config: Any) -> dict[str, Any]:
    """Triton's message for machines, its fields as `config.pbtxt` has them."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(config, preserving_proto_field_name=True)


def list_tensors(config: Any) -> list[tuple[str, str]]:
    """`input` or `output`, and what it is, of every tensor of Triton's message."""
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
