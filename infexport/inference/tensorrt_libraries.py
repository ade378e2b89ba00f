"""TensorRT and TensorRT-RTX: two libraries with one API, loaded and aimed at a GPU. Building with them is one code."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from infexport.errors import InfexportError
from infexport.system.atomic_files import write_file
from infexport.system.dependencies import installed, require
from infexport.system.gpus import Gpu, Target
from infexport.system.host import cache_folder


class Backend(Protocol):
    """One of the libraries.

    Attributes:
        name: as `--backend` has it.
        caveat: what a user of its engines must know.
    """

    name: str
    caveat: str

    def load(self) -> ModuleType:
        """Its Python module; with Polygraphy set to use it from here on. A process uses one backend.

        Raises:
            InfexportError: it is not installed, or cannot be loaded.
        """
        ...

    def version(self) -> str | None:
        """Return the installed module's version; None where it is not installed."""
        ...

    def refusal(self, target: Target, gpu: Gpu | None) -> str:
        """Return why it cannot build for a target on a machine with this GPU; empty where it can."""
        ...

    def aim(self, trt: ModuleType, config: Any, target: Target) -> None:
        """Set the target in a builder's config."""
        ...

    def context(self, engine: Any, key: str, stack: ExitStack) -> Any:
        """Return the execution context of a loaded engine; `key` identifies its content, `stack` closes with it."""
        ...


class TensorRT:
    """NVIDIA's library for data centres, 10.x or 11.x. It builds by timing kernels on the very GPU."""

    name = "tensorrt"
    caveat = ""
    OLDEST = 10

    def load(self) -> ModuleType:
        require("tensorrt", extra="tensorrt")
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "0"
        spec = importlib.util.find_spec("nvidia")  # CUDA's libraries, where pip brought them
        _find_libraries(
            lib for root in (spec and spec.submodule_search_locations) or () for lib in Path(root).glob("*/lib")
        )
        with _loading(self.name):
            trt = importlib.import_module("tensorrt")
        if int(trt.__version__.partition(".")[0]) < self.OLDEST:
            raise InfexportError(
                f"TensorRT {trt.__version__} is too old", "expected 10 or 11", "pip install --upgrade tensorrt"
            )
        return trt

    def version(self) -> str | None:
        return _version("tensorrt")

    def refusal(self, target: Target, gpu: Gpu | None) -> str:
        if not installed("tensorrt"):
            return "it is not installed"
        if gpu is None:
            return "it builds on the GPU, and there is no NVIDIA GPU here"
        if gpu.capability != target.capability:
            return f"it builds for the GPU it runs on, compute capability {gpu.capability}, not {target.capability}"
        return ""

    def aim(self, trt: ModuleType, config: Any, target: Target) -> None:
        """Nothing to tell: it is this machine's GPU."""

    def context(self, engine: Any, key: str, stack: ExitStack) -> Any:
        return engine.create_execution_context()


class TensorRTRTX:
    """NVIDIA's library for GPUs of any machine. It builds with no GPU; kernels are compiled where the engine is run.

    Its bindings are one package, the libraries they load travel inside ONNX Runtime's TensorRT-RTX provider. NVIDIA's
    proprietary licence.
    """

    name = "tensorrt-rtx"
    caveat = (
        "built without a GPU and not run on the target; NVIDIA's documentation has TensorRT-RTX engines run on compute "
        "capability 8.0, its support matrix lists consumer GPUs alone"
    )
    BINDINGS = "tensorrt_rtx_bindings"
    LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
    # in the order of who needs whom
    PATTERNS = ("libcudart.so.*", "libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")
    CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")

    def load(self) -> ModuleType:
        require(self.BINDINGS, self.LIBRARIES, extra="tensorrt-rtx")
        spec = importlib.util.find_spec(self.LIBRARIES)
        assert spec is not None
        folder = Path(str(spec.origin)).parent
        for pattern in self.PATTERNS:
            found = sorted(folder.glob(pattern))
            if not found:
                raise InfexportError(
                    f"no {pattern} in {folder}", hint="pip install --force-reinstall 'infexport[tensorrt-rtx]'"
                )
            # the bindings find the libraries by being after them in the process
            with _loading(self.name):
                ctypes.CDLL(str(found[-1]), mode=ctypes.RTLD_GLOBAL)
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
        _find_libraries([folder])
        with _loading(self.name):
            module = importlib.import_module(self.BINDINGS)
        sys.modules.setdefault("tensorrt_rtx", module)  # the name Polygraphy has for it
        return module

    def version(self) -> str | None:
        return _version("tensorrt-rtx-cu13-bindings")

    def refusal(self, target: Target, gpu: Gpu | None) -> str:
        if not (installed(self.BINDINGS) and installed(self.LIBRARIES)):
            return "it is not installed"
        if target.capability not in self.CAPABILITIES:
            return f"it builds for compute capabilities {', '.join(self.CAPABILITIES)}, not {target.capability}"
        return ""

    def aim(self, trt: ModuleType, config: Any, target: Target) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{target.capability.replace('.', '')}"), 0)

    def context(self, engine: Any, key: str, stack: ExitStack) -> Any:
        # kernels are compiled when an engine is first run: for long, so they are kept
        config = engine.create_runtime_config()
        kernels, file = config.create_runtime_cache(), cache_folder() / f"kernels-{self.name}-{key[:16]}.cache"
        if file.is_file():
            kernels.deserialize(file.read_bytes())  # of another GPU or version it is refused, and stays empty
        config.set_runtime_cache(kernels)
        stack.callback(write_cache, file, kernels)
        return engine.create_execution_context(config)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Raise any error of the dynamic loader as an `InfexportError`."""
    try:
        yield
    except Exception as error:
        raise InfexportError(
            f"{name} cannot be loaded", f"{type(error).__name__}: {error}", "infexport doctor shows what is installed"
        ) from error


def _find_libraries(folders: Iterable[Path]) -> None:
    """Add folders to LD_LIBRARY_PATH, in which Polygraphy looks for CUDA's runtime library."""
    known = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    added = [str(folder) for folder in folders if str(folder) not in known]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [*added, *known]))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def library_log(trt: ModuleType) -> Any:
    """A library's logger, of which it keeps one in a process: `lines` are pairs of severity and message."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name != "VERBOSE":
                self.lines.append((severity.name, message))

        def take(self) -> list[tuple[str, str]]:
            """The lines since the last time."""
            lines, self.lines = self.lines, []
            return lines

    return Log()


def errors_in(lines: Iterable[tuple[str, str]]) -> list[str]:
    """Return the errors among a log's lines, each once."""
    return list(dict.fromkeys(message for severity, message in lines if severity.endswith("ERROR")))


def write_cache(file: Path, content: Any) -> None:
    """Save a cache for the next process; where it cannot be saved, that makes its own."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        # another process may be writing the same cache
        write_file(file, memoryview(content.serialize()), file.with_suffix(f".{os.getpid()}"))


BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (TensorRT(), TensorRTRTX())}
"""Backends by name, those of data centres first: `auto` takes the first that can build."""


def choose(asked: str, target: Target, gpu: Gpu | None) -> tuple[Backend, str]:
    """Return the backend to build with, and the reason.

    Args:
        asked: one of BACKENDS, or `auto`.
        target: what to build for.
        gpu: of this machine.

    Raises:
        InfexportError: the one asked for cannot, or none can; says why of each.
    """
    names = list(BACKENDS) if asked == "auto" else [asked]
    refusals = {name: BACKENDS[name].refusal(target, gpu) for name in names}
    able = [name for name in names if not refusals[name]]
    if not able:
        raise InfexportError(
            f"no engine for {target.name} (compute capability {target.capability}) can be built here",
            "\n".join(f"{name}: {reason}" for name, reason in refusals.items()),
            "build on a machine with that GPU: pip install 'infexport[tensorrt]'"
            if target.capability not in TensorRTRTX.CAPABILITIES
            else "--backend tensorrt-rtx (pip install 'infexport[tensorrt-rtx]') needs no GPU",
        )
    better = names[: names.index(able[0])]
    reasons = [f"{name} can't: {refusals[name]}" for name in better]
    return BACKENDS[able[0]], "; ".join(reasons) or ("asked for" if asked != "auto" else "it has the GPU at hand")
