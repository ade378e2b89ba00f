"""Packages that only some commands need."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass

from infexport.errors import InfexportError


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def importable(module: str) -> bool:
    """Tell whether a module can be imported: an installed one may need a library that the system lacks."""
    if not installed(module):
        return False
    try:
        importlib.import_module(module)
    except Exception:  # a binding's import runs the dynamic loader, which raises what it likes
        return False
    return True


def require(*modules: str, extra: str) -> None:
    """Raise an error that names the extra to install, unless every module can be imported.

    Raises:
        InfexportError: one of the modules is missing.
    """
    missing = [module for module in modules if not installed(module)]
    if missing:
        raise InfexportError(
            f"this needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            hint=f"pip install 'infexport[{extra}]'",
        )


MODULES: dict[str, str | None] = {
    "click": "click",
    "numpy": "numpy",
    "pillow": "PIL",
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "nvidia-ml-py": "pynvml",
    "torch": "torch",
    "onnx": "onnx",
    "onnx-ir": "onnx_ir",
    "onnxscript": "onnxscript",
    "safetensors": "safetensors",
    "matplotlib": "matplotlib.figure",
    "jinja2": "jinja2",
    "pyvips": "pyvips",
    "pyvips-binary": None,  # the library, which pyvips loads
    "openslide-python": "openslide",
    "openslide-bin": None,
    "ray": "ray",
    "pyarrow": "pyarrow.parquet",
    "tritonclient": "tritonclient.grpc",
    "polygraphy": "polygraphy",
    # these are loaded by their backends alone, in an order of their own
    "tensorrt": None,
    "tensorrt-rtx-cu13-bindings": None,
    "onnxruntime-ep-nv-tensorrt-rtx-cu13": None,
}
"""Package → the module that shows that it can be used, None where it is not imported by itself."""


@dataclass(frozen=True)
class Requirement:
    """A package that is asked for.

    Attributes:
        name: of the package, in small letters.
        text: as pip takes it, such as `ray[data]>=2.50`.
        specifiers: pairs of operator and version.
        extra: that asks for it; empty for what everyone needs.
        condition: what else must hold, empty for nothing.
    """

    name: str
    text: str
    specifiers: tuple[tuple[str, str], ...]
    extra: str = ""
    condition: str = ""

    def accepts(self, version: str) -> bool:
        return all(_holds(version, operator, bound) for operator, bound in self.specifiers)


def parse(line: str) -> Requirement:
    """A line of a package's metadata.

    Raises:
        ValueError: it is none, or has an operator that is not known here.
    """
    found = re.fullmatch(r"\s*([A-Za-z0-9][\w.-]*)\s*(\[[^\]]*\])?\s*\(?([^;()]*)\)?\s*(?:;(.*))?", line)
    if found is None:
        raise ValueError(f"no requirement: {line}")
    name, extras, bounds, marker = found.groups("")
    specifiers = []
    for bound in filter(None, map(str.strip, bounds.split(","))):
        pair = re.fullmatch(r"(>=|<=|==|!=|~=|<|>)\s*(\d[\w.!+-]*)", bound)
        if pair is None:
            raise ValueError(f"no version: {bound}, in {line}")
        specifiers.append((pair[1], pair[2]))
    extra = re.search(r"""extra\s*==\s*['"]([\w.-]+)['"]""", marker)
    condition = re.sub(r"""(\s*and\s*)?extra\s*==\s*['"][\w.-]+['"]""", "", marker).strip()
    text = name + extras + ",".join(map("".join, specifiers))
    return Requirement(name.lower().replace("_", "-"), text, tuple(specifiers), extra[1] if extra else "", condition)


def wanted() -> list[Requirement]:
    """Return the requirements in infexport's metadata, without those for its development; empty where it has none."""
    try:
        lines = importlib.metadata.requires("infexport") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = (parse(line) for line in lines)
    # editables: of an installation that is edited in place
    return [one for one in found if one.extra != "dev" and one.name != "editables"]


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _holds(version: str, operator: str, bound: str) -> bool:
    ours, theirs = _key(version), _key(bound)
    if operator == "~=":
        parts = _release(bound)
        return ours >= theirs and _release(version)[: len(parts) - 1] == parts[:-1]
    return {
        ">=": ours >= theirs,
        "<=": ours <= theirs,
        "==": ours == theirs,
        "!=": ours != theirs,
        "<": ours < theirs,
        ">": ours > theirs,
    }[operator]


def _key(version: str) -> tuple[tuple[int, ...], bool]:
    """Return a key that sorts versions; the pre-releases of one release compare equal."""
    release = _release(version)
    while release and not release[-1]:
        release = release[:-1]
    rest = re.sub(r"^v?(\d+!)?\d+(\.\d+)*", "", version.partition("+")[0])
    return release, re.match(r"[-_.]?(a|b|c|rc|alpha|beta|pre|preview|dev)\d*", rest) is None


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*)", version)
    return tuple(map(int, found[1].split("."))) if found else ()
