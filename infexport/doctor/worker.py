"""Try what may crash, hang or not be there: `python -m infexport.doctor.worker`, a JSON request on stdin.

A process of its own (see `system.workers`). Nothing but the standard library and our own code is imported before a
trial asks for it.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable
from typing import Any

from infexport.errors import InfexportError
from infexport.system.workers import serve


def work(request: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """Make trials.

    Args:
        request: `trials`, pairs of a key of TRIALS and its argument.
        tell: takes `trying`, the trial's number, before each; after it `tried`, with `found` or `failed`.
    """
    for number, (kind, argument) in enumerate(request["trials"]):
        tell({"trying": number})  # if this is the last that is heard, it was its end
        try:
            found = TRIALS[kind](argument)
        except BaseException as error:  # a module may raise what it likes, SystemExit too
            tell({"tried": number, "failed": _told(error)})
        else:
            tell({"tried": number, "found": found})


def _told(error: BaseException) -> str:
    if isinstance(error, InfexportError):
        return ": ".join(filter(None, [error.summary, error.details]))
    try:
        return f"{type(error).__name__}: {error}".rstrip(": ")
    except Exception:  # one that cannot even say what it is
        return type(error).__name__


def _import(module: str) -> str:
    importlib.import_module(module)
    return ""


def _offered(_: str) -> list[str]:
    """ONNX Runtime's version and its providers."""
    from infexport.inference.runners.onnxruntime import import_onnxruntime

    runtime = import_onnxruntime()
    return [runtime.__version__, *runtime.get_available_providers()]


def _provider(name: str) -> str:
    """Open a session as infexport does, and run it."""
    import numpy as np

    from infexport.doctor.product import product
    from infexport.inference.runners.onnxruntime import open_session

    session, _ = open_session(product(4), name, 1)
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    (y,) = session.run(None, {"x": x})
    if not np.allclose(y, x @ x):
        raise InfexportError(f"a product of matrices is wrong on {name}", f"received {y.tolist()}")
    return str(session.get_providers()[0])


def _builder(name: str) -> str:
    """Load a backend and make a builder and a network with it."""
    from infexport.inference.tensorrt_libraries import BACKENDS, errors_in, library_log

    library = BACKENDS[name].load()
    log = library_log(library)
    try:
        network = library.Builder(log).create_network(0)
    except Exception as error:  # which says less than the library's log
        raise InfexportError("it makes no builder", "; ".join(errors_in(log.take())) or _told(error)) from error
    if network is None:
        raise InfexportError("it makes no network", "; ".join(errors_in(log.take())))
    return str(library.__version__)


def _driver(_: str) -> dict[str, Any]:
    """The CUDA that the driver can do, and how many GPUs it gives this process."""
    library = ctypes.CDLL("libcuda.so.1")
    version, count = ctypes.c_int(), ctypes.c_int()
    for name, *arguments in (
        ("cuDriverGetVersion", ctypes.byref(version)),
        ("cuInit", 0),
        ("cuDeviceGetCount", ctypes.byref(count)),
    ):
        code = getattr(library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            library.cuGetErrorString(code, ctypes.byref(text))
            reason = (text.value or b"").decode("utf-8", "replace")
            return {"cuda": _cuda(version.value), "error": f"{name}: {reason or 'unknown error'} ({code})"}
    return {"cuda": _cuda(version.value), "count": count.value}


def _cuda(version: int) -> list[int]:
    return [version // 1000, version % 1000 // 10]


def _pillow(_: str) -> dict[str, bool]:
    """Formats, and whether this Pillow has what decodes them."""
    from PIL import features

    names = {
        "PNG": "zlib",
        "JPEG": "jpg",
        "TIFF": "libtiff",
        "WebP": "webp",
        "JPEG 2000": "jpg_2000",
        "AVIF": "avif",
        "colour profiles": "littlecms2",
    }
    return {name: bool(features.check(feature)) for name, feature in names.items()}


def _vips(_: str) -> dict[str, Any]:
    """libvips' version, and whether it has what reads a format that is streamed."""
    import pyvips

    names = {"TIFF": "tiffload", "PNG": "pngload", "JPEG": "jpegload", "WebP": "webpload"}
    found = {name: bool(pyvips.type_find("VipsOperation", loader)) for name, loader in names.items()}
    return {"version": ".".join(str(pyvips.version(part)) for part in range(3)), "formats": found}


def _openslide(_: str) -> str:
    import openslide

    return str(openslide.__library_version__)


TRIALS: dict[str, Callable[[str], Any]] = {
    "import": _import,
    "offered": _offered,
    "provider": _provider,
    "builder": _builder,
    "driver": _driver,
    "pillow": _pillow,
    "vips": _vips,
    "openslide": _openslide,
}


if __name__ == "__main__":
    serve(work)
    os._exit(0)  # what was tried may not know how to end
