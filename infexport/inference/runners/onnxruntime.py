"""Runners of a bundle's graphs in ONNX Runtime."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from infexport.bundle import Bundle
from infexport.bundle.manifest import CENTRALITY_MODEL, Stage
from infexport.errors import InfexportError
from infexport.inference.runners.base import ImageRunner, Placement, StageRunner
from infexport.inference.runners.output_checks import graph_mismatch
from infexport.system.dependencies import require
from infexport.system.host import has_int8_products

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
RTX_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
"""Package of a separate library, which ONNX Runtime loads."""


@dataclass(frozen=True)
class Port:
    """An input or output of a graph: its name, dtype as NumPy calls it, and shape; a dynamic axis has a name."""

    name: str
    dtype: str
    shape: list[int | str | None]


class OrtRunner(ImageRunner):
    """Runs a bundle's `model.onnx` on an execution provider.

    ONNX Runtime runs operators that the provider lacks on the CPU. A session that does not get the provider at all is
    an error.

    Args:
        bundle: what to run.
        provider: `cpu`, `cuda`, `tensorrt`, `tensorrt-rtx`, or `auto`: cuda where it works, else cpu. The attribute
            `provider` names the one in use, once the runner is entered.
        threads: of one operator; None leaves it to ONNX Runtime (all cores).
        placed: `placement` is read on a CPU, too.
        centrality: `run` also returns `centrality [B, layers, H, N]`.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str = "auto",
        threads: int | None = None,
        placed: bool = False,
        centrality: bool = False,
    ) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self._graph = bundle.path / CENTRALITY_MODEL if centrality else bundle.model
        self.checked_graph = self._graph.name
        self.provider, self.precision = provider, bundle.manifest.precision
        self.version = f"onnxruntime {import_onnxruntime().__version__}"
        self.threads, self._placed = threads, placed
        self._session: Any = None

    @property
    def placement(self) -> Placement:
        """Placement of the nodes, once the runner is entered."""
        return read_placement(self._session)

    @property
    def ports(self) -> tuple[list[Port], list[Port]]:
        """Inputs and outputs of the graph, once the runner is entered."""
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        return [_make_port(value) for value in inputs], [_make_port(value) for value in outputs]

    def _open(self) -> None:
        self._session, self.provider = open_session(self._graph, self.provider, self.threads, self._placed)

    def _close(self) -> None:
        self._session = None

    def _infer(self, value: NDArray[Any], shape: Sequence[int]) -> dict[str, NDArray[Any]]:
        feeds = self._session.get_inputs()
        if len(feeds) != 1:
            raise graph_mismatch(self._graph.name, f"{len(feeds)} inputs, expected one")
        names = [output.name for output in self._session.get_outputs()]
        try:
            values = self._session.run(names, {feeds[0].name: value})
        except Exception as error:
            raise InfexportError(
                f"ONNX Runtime failed on images of {shape[2]}x{shape[1]}, batch {shape[0]}",
                str(error),
                "smaller images or batches need less memory",
            ) from error
        return dict(zip(names, values, strict=True))


class OrtStages(StageRunner):
    """Runs a bundle's stages, one session at a time: only the weights of the current stage are in memory.

    Args:
        bundle, provider, threads: see `OrtRunner`.
    """

    checks_outputs = True

    def __init__(self, bundle: Bundle, provider: str = "auto", threads: int | None = None) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self.provider, self.precision = provider, bundle.manifest.precision
        self.version = f"onnxruntime {import_onnxruntime().__version__}"
        self.identity = {"onnxruntime": self.version}
        self.threads = threads
        self._graph = ""
        self._session: Any = None

    def _open(self) -> None:
        assert self.bundle.manifest.stages, "the caller checks that there are stages"
        self._load(self.bundle.manifest.stages[0])  # which decides what `auto` is

    def _load(self, stage: Stage) -> None:
        if stage.graph != self._graph:
            self._session, self._graph = None, ""  # before the next is loaded
            self._session, self.provider = open_session(self.bundle.path / stage.graph, self.provider, self.threads)
            self._graph = stage.graph

    def _close(self) -> None:
        self._session, self._graph = None, ""

    def _infer(self, stage: Stage, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        try:
            outputs = self._session.run(None, dict(values))  # in the stage's order
        except Exception as error:
            raise InfexportError(
                f"ONNX Runtime failed in {stage.graph}", str(error), "fewer tokens at a time need less memory"
            ) from error
        if len(outputs) != len(stage.outputs):
            raise graph_mismatch(stage.graph, f"{len(outputs)} outputs, expected {', '.join(stage.outputs)}")
        return dict(zip(stage.outputs, outputs, strict=True))


def open_session(graph: Path | bytes, provider: str, threads: int | None, placed: bool = False) -> tuple[Any, str]:
    """Open a session of a graph; return it and the provider that it runs on.

    Args:
        graph: a model file, or its content.
        provider, threads, placed: see `OrtRunner`.

    Raises:
        InfexportError: ONNX Runtime cannot load it, or gives another provider than asked for.
    """
    choices = candidates(provider, import_onnxruntime().get_available_providers())
    session: Any = None
    for choice in choices:
        try:
            session = _start(graph, choice, threads, placed or choice != "cpu")
        except InfexportError:
            if choice == choices[-1]:
                raise
            continue
        if session.get_providers()[:1] == [PROVIDERS[choice]]:
            return session, choice
    # ONNX Runtime falls back to the CPU with no more than a log line
    got = session.get_providers()
    raise InfexportError(
        f"asked for {PROVIDERS[provider]}, ONNX Runtime gave {got[0] if got else 'nothing'}",
        f"the session's providers: {', '.join(got) or 'none'}",
        "the driver, CUDA 13 or cuDNN 9 is missing or does not fit (infexport doctor), or use --provider cpu",
    )


def open_memory_session(model: bytes, weights: Path, provider: str = "cpu", threads: int | None = None) -> Any:
    """Open a session of a model in memory, whose external data lies in the folder `weights`.

    Args:
        model: an ONNX model.
        weights: the folder.
        provider: `cpu`, `cuda` or `tensorrt`.
        threads: see `OrtRunner`.

    Raises:
        InfexportError: ONNX Runtime cannot load it.
    """
    options = _options(threads)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    try:
        return import_onnxruntime().InferenceSession(model, options, providers=[with_options(provider)])
    except Exception as error:  # see `_start`
        raise InfexportError(f"ONNX Runtime cannot load a graph of {weights}", str(error)) from error


def with_options(provider: str) -> str | tuple[str, dict[str, str]]:
    """Return a provider, a key of PROVIDERS, in the form that a session takes."""
    # by default float32 products are rounded to TF32, 10 bits, on a GPU
    return (PROVIDERS[provider], {"use_tf32": "0"}) if provider == "cuda" else PROVIDERS[provider]


def _options(threads: int | None) -> Any:
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = 4  # errors are raised, and shown once, without control characters
    # it would keep a memory plan for every input shape, for good: 10 KB each where images are of any size
    options.enable_mem_pattern = False
    if not has_int8_products():
        # there the uint8 by int8 kernels of x86 saturate: take the exact ones, at half the speed
        options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _start(graph: Path | bytes, provider: str, threads: int | None, placed: bool) -> Any:
    onnxruntime = import_onnxruntime()
    options = _options(threads)
    if placed:  # 13 ms: 8% of the time that a graph takes to load, more than half of a stage's
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers: list[str | tuple[str, dict[str, str]]] | None = [with_options(provider)]
    if provider == "tensorrt-rtx":
        options.add_provider_for_devices(_rtx_devices(onnxruntime), {})
        providers = None  # the options have it
    try:
        return onnxruntime.InferenceSession(
            graph,
            sess_options=options,
            providers=providers,
            enable_fallback=0,  # its own fallback prints to stdout and may come in the middle of a run
        )
    except Exception as error:  # ONNX Runtime raises its own kinds, which share no base but Exception
        raise InfexportError(
            f"ONNX Runtime cannot load {graph if isinstance(graph, Path) else 'a graph'}",
            str(error),
            "convert the checkpoint again; infexport doctor shows what this machine can run",
        ) from error


def _rtx_devices(onnxruntime: ModuleType) -> list[Any]:
    """Return the GPUs of the TensorRT-RTX provider, loading the provider first if necessary.

    Raises:
        InfexportError: it cannot be loaded, or it finds no GPU.
    """
    require(RTX_PACKAGE, extra="tensorrt-rtx")
    name, library = PROVIDERS["tensorrt-rtx"], importlib.import_module(RTX_PACKAGE)

    def devices() -> list[Any]:
        return [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]

    hint = "an NVIDIA driver and GPU (infexport doctor), or use --provider cpu"
    if not devices():
        try:
            onnxruntime.register_execution_provider_library(name, library.get_library_path())
        except Exception as error:  # see `_start`
            raise InfexportError(f"ONNX Runtime cannot load {name}", str(error), hint) from error
    found = devices()
    if not found:
        raise InfexportError(f"{name} finds no GPU", hint=hint)
    return found[:1]  # it takes one


def read_placement(session: Any) -> Placement:
    """Return where ONNX Runtime has placed a session's nodes."""
    found: Placement = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, Counter()).update(
            f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in part.get_nodes()
        )
    return found


def _make_port(value: Any) -> Port:
    dtype = value.type.removeprefix("tensor(").removesuffix(")")
    return Port(value.name, {"float": "float32", "double": "float64"}.get(dtype, dtype), list(value.shape))


def remarks(precision: str, provider: str) -> list[str]:
    """Return remarks for the user on a bundle's precision on a provider."""
    if precision == "fp16" and provider == "cpu":
        return ["fp16 on the CPU is computed in float32: no faster than an fp32 bundle"]
    if precision == "int8" and provider in PROVIDERS and provider != "cpu":
        return [f"int8 graphs are for the CPU: on {provider} expect less speed than of fp32 or fp16"]
    if precision == "int8" and provider == "cpu" and not has_int8_products():
        return ["this processor has no int8 dot products (VNNI): int8 is right here, but slow"]
    return []


def import_onnxruntime() -> ModuleType:
    """Return ONNX Runtime's module.

    Raises:
        InfexportError: it is not installed, or cannot be imported.
    """
    require("onnxruntime", extra="cpu")
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise InfexportError(
            "onnxruntime cannot be imported", str(error), "install it again: pip install 'infexport[cpu]'"
        ) from error


def candidates(asked: str, available: list[str]) -> list[str]:
    """Return the providers to try, best first; several only for `auto`.

    Raises:
        InfexportError: this build of ONNX Runtime doesn't have the one that was asked for.
    """
    if asked == "auto":
        return [name for name in ("cuda", "cpu") if PROVIDERS[name] in available]
    if asked == "tensorrt-rtx":
        return [asked]  # none of the build's own: it is loaded with a session
    if PROVIDERS[asked] not in available:
        raise InfexportError(
            f"this ONNX Runtime has no {PROVIDERS[asked]}",
            f"it has {', '.join(available)}",
            "uninstall onnxruntime and pip install 'infexport[gpu]' (the two overwrite each other), or --provider cpu",
        )
    return [asked]
