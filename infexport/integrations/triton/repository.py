"""Package a bundle as a model in a repository of Triton Inference Server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infexport.bundle import ENGINES, Bundle, open_bundle
from infexport.bundle.engine_record import Engine
from infexport.bundle.manifest import FILE, MODEL, check_outside_bundles
from infexport.errors import InfexportError
from infexport.inference.engine_selection import EngineSet, find_engine_sets
from infexport.inference.runners.onnxruntime import OrtRunner, Port
from infexport.integrations.triton.config import CONFIG, LABELS, Service, check_config, make_config, write_config
from infexport.system.atomic_files import create_folder
from infexport.system.dependencies import require
from infexport.system.untrusted_files import listed

VERSION = "1"
MODEL_SCRIPT = Path(__file__).with_name("model.py")
"""Model script for Triton's python backend."""


@dataclass(frozen=True)
class Packaged:
    """A packaged model.

    Attributes:
        path: folder of the model.
        config: Triton's message, read back from `config.pbtxt`.
        engine: the engine that Triton's TensorRT backend runs; None for other backends.
    """

    path: Path
    config: Any
    engine: Engine | None = None


def default_name(bundle: Bundle) -> str:
    """Return the folder's name with only characters that are valid in a URL."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", bundle.path.resolve().name).strip("-.") or "model"


def package(bundle: Bundle, repository: Path, service: Service, force: bool = False) -> Packaged:
    """Create a model, which appears in the repository once it is complete.

    Args:
        bundle: the bundle, open, its hashes checked.
        repository: folder of models; created if missing.
        service: options of the model.
        force: replace an existing model of this name.

    Raises:
        InfexportError: a model of this name exists, no engine can be served, or the configuration disagrees with the
            graph.
    """
    require("tritonclient", "grpc", extra="triton")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", service.name):
        raise InfexportError(
            f"invalid name of a model: {service.name!r}",
            "expected letters, digits and _ . -, since it becomes part of a folder's name and of URLs",
        )
    if (repository / FILE).exists():
        raise InfexportError(f"the output is a bundle: {repository}", hint="choose a separate folder for the models")
    side = bundle.manifest.config.image_size
    if service.backend == "python" and service.max_pixels < side * side:
        raise InfexportError(
            "images of the trained size would be refused",
            f"received at most {service.max_pixels:,} pixels, expected at least {side * side:,}",
        )
    path = repository / service.name
    check_outside_bundles(path, "output")
    with create_folder(path, lambda: _check_free(path, force)) as folder:
        version = folder / VERSION
        version.mkdir()
        served, engine = _FILL[service.backend](bundle, service, version)
        inputs, outputs = _ports(served, service)
        if bundle.labels is not None:
            lines = [" ".join(label.split()) for label in bundle.labels]
            (folder / LABELS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        profile = None if engine is None else engine.recorded.profile
        opt = None if profile is None else next(iter(profile.values())).opt
        write_config(make_config(bundle, service, opt), folder / CONFIG)
        config = check_config(folder / CONFIG, service.name, inputs, outputs, profile)
    return Packaged(path, config, engine)


def _check_free(path: Path, force: bool) -> None:
    """Refuse to overwrite anything but an empty folder or, with `force`, a model that infexport made."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / CONFIG).is_file():
        raise InfexportError(f"the output exists and is not a model: {path}", hint="choose another --name")
    if not force:
        raise InfexportError(f"the model exists: {path}", hint="choose another --name, or replace it with --force")
    foreign = [item for item in listed(path) if item.name not in (CONFIG, LABELS, VERSION)]
    known = (MODEL, "model.plan", MODEL_SCRIPT.name, "bundle", "__pycache__")
    foreign += [item for item in listed(path / VERSION) if item.name not in known]
    if foreign:
        raise InfexportError(
            f"the model holds files that infexport did not make: {path}",
            f"they would be lost: {', '.join(sorted(str(item.relative_to(path)) for item in foreign))}",
            "move them away, or choose another --name",
        )


def _engines(bundle: Bundle, name: str | None, backend: str | None = None) -> EngineSet:
    """Return the set of engines to serve: of the whole graph, and of the given library if there is one.

    The engines are for the server's GPU, which need not be in this machine.
    """
    sets = find_engine_sets(bundle, "whole")
    found = [each for each in sets if name in (None, each.name) and backend in (None, each.backend)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InfexportError(
            "several engines can be served",
            ", ".join(each.name for each in found),
            f"choose one: --engine {found[0].name}",
        )
    others = "\n".join(f"{each.name}: built with {each.backend}" for each in sets)
    hint = f"on the server's GPU: infexport build-engine {bundle.path} --target local --backend tensorrt"
    if backend is not None and any(each.backend == "tensorrt-rtx" for each in sets):
        others += "\nTriton's TensorRT backend runs only engines of TensorRT, not of TensorRT-RTX"
        hint += "; or serve an existing one with --backend python --engine NAME"
    what = f"engine {name}" if name else "engine"
    raise InfexportError(
        f"this bundle has no {what} of the whole graph that can be served", others or "it has no engines", hint
    )


Served = tuple[Bundle, Engine | None]
"""The bundle whose graph is served, and the engine if Triton itself runs one."""


def _fill_onnxruntime(bundle: Bundle, service: Service, version: Path) -> Served:
    # a model of several files is a folder that contains a file of the same name
    _copy(bundle, bundle.manifest.graph, version / MODEL)
    return Bundle(version / MODEL, bundle.manifest), None


def _fill_tensorrt(bundle: Bundle, service: Service, version: Path) -> Served:
    (engine,) = _engines(bundle, service.engine, "tensorrt").engines.values()
    shutil.copyfile(bundle.path / ENGINES / engine.file, version / "model.plan")
    return bundle, engine


def _fill_python(bundle: Bundle, service: Service, version: Path) -> Served:
    files = [FILE, *bundle.manifest.files]
    if service.engine is not None:
        engines = _engines(bundle, service.engine)
        # engines of the stages have the same name, and are included if there are any
        streaming = [each for each in find_engine_sets(bundle, "stream") if each.name == engines.name]
        for each in (engines, *streaming):
            for engine in each.engines.values():
                files += [f"{ENGINES}/{engine.file}", f"{ENGINES}/{engine.file}.json"]
    _copy(bundle, files, version / "bundle")
    shutil.copyfile(MODEL_SCRIPT, version / MODEL_SCRIPT.name)
    return open_bundle(version / "bundle"), None


_FILL = {"onnxruntime": _fill_onnxruntime, "tensorrt": _fill_tensorrt, "python": _fill_python}
"""Backend → function that writes the files of a version."""


def _copy(bundle: Bundle, files: Iterable[str], to: Path) -> None:
    for name in files:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, to / name)


def _ports(served: Bundle, service: Service) -> tuple[list[Port], list[Port]]:
    """Return inputs and outputs of the served model, which ONNX Runtime reads from the served files."""
    with OrtRunner(served, "cpu") as runner:
        inputs, outputs = runner.ports
    if service.backend == "python":
        inputs = [Port("image", "uint8", ["batch", "height", "width", 3])]
    return inputs, outputs
