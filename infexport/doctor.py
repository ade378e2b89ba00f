"""What this machine can do, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

from infexport.extras import importable, installed
from infexport.targets import local_gpu


@dataclass(frozen=True)
class Check:
    """One thing a user may want to do: whether this machine can, what was found, and how to get what is missing."""

    name: str
    ok: bool
    found: str
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _versions(*names: str) -> str:
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    return ", ".join(found)


def _machine() -> Check:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check(
        "machine",
        True,
        f"Python {platform.python_version()}, {platform.machine()}, {cores} cores, {memory:.0f} GiB",
    )


def _convert() -> Check:
    modules = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors")
    return Check(
        "convert",
        all(map(installed, modules)),
        _versions("torch", "onnx", "onnx-ir", "onnxscript", "safetensors"),
        "pip install 'infexport[export]'",
    )


def _runtime() -> list[Check]:
    if not installed("onnxruntime"):
        missing = "onnxruntime is not installed"
        return [
            Check("run on CPU", False, missing, "pip install 'infexport[cpu]'"),
            Check("run on GPU", False, missing, "pip install 'infexport[gpu]'"),
        ]
    try:
        import onnxruntime
    except ImportError as error:
        broken = f"onnxruntime cannot be imported: {error}"
        return [
            Check("run on CPU", False, broken, "pip install --force-reinstall 'infexport[cpu]'"),
            Check("run on GPU", False, broken, "pip install --force-reinstall 'infexport[gpu]'"),
        ]

    providers = onnxruntime.get_available_providers()
    version = f"onnxruntime {onnxruntime.__version__}"
    try:
        importlib.metadata.version("onnxruntime")
        importlib.metadata.version("onnxruntime-gpu")
        both = "; onnxruntime and onnxruntime-gpu are both installed and overwrite each other: uninstall one"
    except importlib.metadata.PackageNotFoundError:
        both = ""
    cuda = "CUDAExecutionProvider" in providers
    gpu = local_gpu()
    return [
        Check("run on CPU", "CPUExecutionProvider" in providers, version + both, "pip install 'infexport[cpu]'"),
        Check(
            "run on GPU",
            cuda and gpu is not None,
            f"{gpu or 'no NVIDIA GPU'}; {'CUDA provider' if cuda else 'no CUDA provider in this onnxruntime'}",
            "an NVIDIA driver, CUDA 13 and cuDNN 9; pip uninstall onnxruntime; pip install 'infexport[gpu]'",
        ),
    ]


def _engines() -> list[Check]:
    from infexport.backends import TensorRT, TensorRTRTX

    gpu = local_gpu()
    return [
        Check(
            "build engines",
            installed(TensorRTRTX.BINDINGS) and installed(TensorRTRTX.LIBRARIES),
            _versions("tensorrt-rtx-cu13-bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu13") + " (no GPU needed)",
            "pip install 'infexport[tensorrt-rtx]' (NVIDIA's licence)",
        ),
        Check(
            "build on the GPU",
            installed("tensorrt") and gpu is not None,
            f"{_versions(TensorRT.name)}; {gpu or 'no NVIDIA GPU'}",
            "an NVIDIA driver; pip install 'infexport[tensorrt]'",
        ),
        Check(
            "run engines",
            installed("polygraphy") and gpu is not None,
            f"{_versions('polygraphy')}; {gpu or 'no NVIDIA GPU'}",
            "an NVIDIA driver; pip install 'infexport[tensorrt]' or 'infexport[tensorrt-rtx]'",
        ),
    ]


def _images() -> list[Check]:
    return [
        Check(
            "stream images",
            importable("pyvips"),
            _versions("pyvips", "pyvips-binary"),
            "pip install 'infexport[stream]'",
        ),
        Check(
            "stream slides",
            importable("openslide"),
            _versions("openslide-python", "openslide-bin"),
            "pip install 'infexport[slides]'",
        ),
    ]


def _elsewhere() -> list[Check]:
    modules = ("ray", "fsspec", "pyarrow")
    return [
        Check("workers, URLs", all(map(installed, modules)), _versions(*modules), "pip install 'infexport[scale]'"),
        Check("package", installed("tritonclient"), _versions("tritonclient"), "pip install 'infexport[triton]'"),
    ]


def examine() -> list[Check]:
    """Every check, in the order of the road: machine, convert, run, images, engines, beyond this process."""
    return [_machine(), _convert(), *_runtime(), *_images(), *_engines(), *_elsewhere()]
