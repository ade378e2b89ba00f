"""The sidecar of an engine: what it was built for, from which graph, by which library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from infexport.bundle.integrity import DIGEST, SEAL
from infexport.bundle.manifest import MODEL, Calibration
from infexport.system.gpus import Gpu

ENGINE_PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")
EngineState = Literal["current", "stale", "modified", "missing", "unreadable"]


class ShapeRange(NamedTuple):
    """The shapes that an input of an engine may have: smallest, the one it is fastest at, largest."""

    min: list[int]
    opt: list[int]
    max: list[int]

    def holds(self, shape: list[int]) -> bool:
        """Tell whether an input may have a shape."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """An engine as its sidecar describes it.

    Attributes:
        target: name of the GPU that it was built for.
        compute_capability: of that GPU, such as `8.0`.
        precision: of the layers that meet every token, one of ENGINE_PRECISIONS.
        calibration: images that fixed the ranges of int8; None for other precisions.
        chunk: tokens at a time, at most, of a stage; None for the whole graph.
        backend: name of the library.
        versions: of the tools that built it.
        gpu: of the machine that built it; None where it had none.
        caveat: a sentence of the backend on where the engine runs.
        checkpoint: name → SHA-256 of the checkpoint's files.
        backend_version: of the library.
        graph: name → SHA-256 of the files that it was built from.
        profile: input → its shapes, for inputs whose shapes vary.
        sha256: of the engine.
        bytes: its size.
        seconds: that the build took.
        layers: kind → type → number of layers.
        log: lines of the library.
    """

    target: str
    compute_capability: str
    precision: str
    calibration: Calibration | None = None
    chunk: int | None
    backend: str
    versions: dict[str, str] = field(default_factory=dict)
    gpu: Gpu | None = None
    caveat: str = ""
    checkpoint: dict[str, str] = field(default_factory=dict)
    backend_version: str
    graph: dict[str, str]
    profile: dict[str, ShapeRange]
    sha256: str
    bytes: int = 0
    seconds: float = 0.0
    layers: dict[str, dict[str, int]]
    log: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineRecord:
        """Return the record of a sidecar.

        Raises:
            ValueError: a field is missing, unknown, or of a wrong type.
        """
        fields = {name: value for name, value in values.items() if name not in (DIGEST, SEAL)}
        if not _is_sidecar(fields):
            raise ValueError("the sidecar is not as infexport wrote it")
        try:
            for name, kind in (("calibration", Calibration), ("gpu", Gpu)):
                if fields.get(name) is not None:
                    fields[name] = kind(**fields[name])
            fields["profile"] = {name: ShapeRange(*shapes) for name, shapes in fields["profile"].items()}
            return cls(**fields)
        except TypeError as error:
            raise ValueError(str(error)) from error

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return dataclasses.asdict(self)

    @property
    def library(self) -> str:
        """The library that runs it, and its version, in words."""
        return f"{self.backend} {self.backend_version}"

    @property
    def set_name(self) -> str:
        """The name of the set of engines that it belongs to."""
        return f"{self.target}-{self.precision}"


@dataclass(frozen=True)
class Engine:
    """An engine that lies in a bundle.

    Attributes:
        file: its name.
        state: `current` where the engine is what its sidecar says, built from this very graph; `stale` where the graph
            is another; `modified` or `missing` where the engine is; `unreadable` where the sidecar is.
        record: the sidecar; None where it is unreadable.
    """

    file: str
    state: EngineState
    record: EngineRecord | None

    @property
    def recorded(self) -> EngineRecord:
        """The sidecar of an engine that is known to have one."""
        assert self.record is not None, "an unreadable sidecar says nothing"
        return self.record

    def to_dict(self) -> dict[str, Any]:
        """Return the sidecar's fields, the file and the state, as JSON has them."""
        fields = {} if self.record is None else self.record.to_dict()
        return fields | {"file": self.file, "state": self.state}


def _is_sidecar(fields: Mapping[str, Any]) -> bool:
    """Tell whether a sidecar has all that the tool relies on, of the right types."""
    texts = ("target", "compute_capability", "precision", "backend", "backend_version", "sha256")
    graph, profile, chunk, layers = (fields.get(name) for name in ("graph", "profile", "chunk", "layers"))
    images = profile.get("image", profile.get("pixels")) if isinstance(profile, dict) else None
    return (
        all(isinstance(fields.get(name), str) for name in texts)
        and all(isinstance(fields.get(name), dict | None) for name in ("calibration", "gpu"))
        and isinstance(graph, dict)
        and any(name.endswith(".onnx") for name in graph)
        and isinstance(profile, dict)
        and all(map(_is_range, profile.values()))
        # of the whole graph it is the images alone
        and (MODEL not in graph or (len(profile) == 1 and images is not None and len(images[0]) == 4))
        and fields["precision"] in ENGINE_PRECISIONS
        and "chunk" in fields
        and (chunk is None or (type(chunk) is int and chunk > 0))
        and isinstance(layers, dict)
        and all(isinstance(types, dict) and _is_shape([*types.values()]) for types in layers.values())
    )


def _is_range(value: Any) -> bool:
    """Tell whether a value is three shapes of equal rank."""
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(shape, list) for shape in value):
        return False
    return len(set(map(len, value))) == 1 and all(map(_is_shape, value))


def _is_shape(value: list[Any]) -> bool:
    return all(type(size) is int for size in value)
