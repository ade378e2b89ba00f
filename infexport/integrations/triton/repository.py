"""Bundle → a model in a repository of Triton Inference Server."""

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
SERVED = Path(__file__).with_name("model.py")
"""What Triton's python backend runs."""


@dataclass(frozen=True)
class Packaged:
    """A model as it was made.

    Attributes:
        path: its folder.
        config: Triton's message, as read back.
        engine: that Triton itself runs.
    """

    path: Path
    config: Any
    engine: Engine | None = None


def default_name(bundle: Bundle) -> str:
    """A name for Triton: the folder's, of letters that do in a URL."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", bundle.path.resolve().name).strip("-.") or "model"


def package(bundle: Bundle, repository: Path, service: Service, force: bool = False) -> Packaged:
    """Make a model, which appears in the repository when it is whole.

    Args:
        bundle: opened, its hashes checked.
        repository: a folder of models, made where there is none.
        service: how it is to be served.
        force: replace a model of this name that is there already.

    Raises:
        InfexportError: a model of this name is there, no engine can be served, or the model does not agree with the
            graph.
    """
    require("tritonclient", "grpc", extra="triton")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", service.name):
        raise InfexportError(
            f"no name for a model: {service.name!r}",
            "expected letters, digits and _ . -, as it is part of a folder's name and of URLs",
        )
    if (repository / FILE).exists():
        raise InfexportError(f"the output is a bundle: {repository}", hint="name a folder of its own for the models")
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
        best = None if profile is None else next(iter(profile.values())).opt
        write_config(make_config(bundle, service, best), folder / CONFIG)
        config = check_config(folder / CONFIG, service.name, inputs, outputs, profile)
    return Packaged(path, config, engine)


def _check_free(path: Path, force: bool) -> None:
    """Refuse what would be lost: anything but an empty folder or, with `force`, a model as it is made here."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / CONFIG).is_file():
        raise InfexportError(f"the output exists and is no model: {path}", hint="choose another --name")
    if not force:
        raise InfexportError(f"the model exists: {path}", hint="choose another --name, or replace it with --force")
    foreign = [item for item in listed(path) if item.name not in (CONFIG, LABELS, VERSION)]
    known = (MODEL, "model.plan", SERVED.name, "bundle", "__pycache__")
    foreign += [item for item in listed(path / VERSION) if item.name not in known]
    if foreign:
        raise InfexportError(
            f"the model holds files that infexport did not make: {path}",
            f"they would be lost: {', '.join(sorted(str(item.relative_to(path)) for item in foreign))}",
            "move them away, or choose another --name",
        )


def _engines(bundle: Bundle, name: str | None, backend: str | None = None) -> EngineSet:
    """The engines to serve, of the whole graph and of a library where one is asked for.

    They are for the GPU of the server, which need not be this machine's.
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
        others += "\nTriton's TensorRT backend runs plans of TensorRT alone, none of TensorRT-RTX"
        hint += "; or serve what there is with --backend python --engine NAME"
    what = f"engine {name}" if name else "engine"
    raise InfexportError(
        f"this bundle has no {what} of the whole graph that can be served", others or "it has none at all", hint
    )


Filled = tuple[Bundle, Engine | None]
"""The bundle whose graph is served, and the engine where Triton itself runs one."""


def _fill_onnxruntime(bundle: Bundle, service: Service, version: Path) -> Filled:
    # a model of several files is a folder, whose model has this name again
    _copy(bundle, bundle.manifest.graph, version / MODEL)
    return Bundle(version / MODEL, bundle.manifest), None


def _fill_tensorrt(bundle: Bundle, service: Service, version: Path) -> Filled:
    (engine,) = _engines(bundle, service.engine, "tensorrt").engines.values()
    shutil.copyfile(bundle.path / ENGINES / engine.file, version / "model.plan")
    return bundle, engine


def _fill_python(bundle: Bundle, service: Service, version: Path) -> Filled:
    files = [FILE, *bundle.manifest.files]
    if service.engine is not None:
        engines = _engines(bundle, service.engine)
        # those that stream have the same name, and are served where there are any
        streaming = [each for each in find_engine_sets(bundle, "stream") if each.name == engines.name]
        for each in (engines, *streaming):
            for engine in each.engines.values():
                files += [f"{ENGINES}/{engine.file}", f"{ENGINES}/{engine.file}.json"]
    _copy(bundle, files, version / "bundle")
    shutil.copyfile(SERVED, version / SERVED.name)
    return open_bundle(version / "bundle"), None


_FILL = {"onnxruntime": _fill_onnxruntime, "tensorrt": _fill_tensorrt, "python": _fill_python}
"""Backend → what writes the files of a version."""


def _copy(bundle: Bundle, files: Iterable[str], to: Path) -> None:
    for name in files:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, to / name)


def _ports(served: Bundle, service: Service) -> tuple[list[Port], list[Port]]:
    """What Triton's clients give and get, as ONNX Runtime has it of the files that are served."""
    with OrtRunner(served, "cpu") as runner:
        inputs, outputs = runner.ports
    if service.backend == "python":
        inputs = [Port("image", "uint8", ["batch", "height", "width", 3])]
    return inputs, outputs
