"""TensorRT-RTX's Python module, its libraries loaded from where pip put them. NVIDIA's proprietary licence."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from infexport.errors import InfexportError
from infexport.extras import require

BINDINGS = "tensorrt_rtx_bindings"
LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
# in the order of who needs whom
PATTERNS = ("libcudart.so.*", "libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")


def load() -> ModuleType:
    """Import the bindings. Needs no GPU.

    Raises:
        InfexportError: the extra is not installed, or its libraries are missing.
    """
    require(BINDINGS, LIBRARIES, extra="tensorrt-rtx")
    spec = importlib.util.find_spec(LIBRARIES)
    assert spec is not None
    folder = Path(str(spec.origin)).parent
    for pattern in PATTERNS:
        found = sorted(folder.glob(pattern))
        if not found:
            raise InfexportError(
                f"no {pattern} in {folder}", hint="pip install --force-reinstall 'infexport[tensorrt-rtx]'"
            )
        # the bindings find the libraries by being after them in the process
        ctypes.CDLL(str(found[-1]), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module(BINDINGS)
