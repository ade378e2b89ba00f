"""Bundle → engines for a GPU, each with a sidecar that says what it is."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infexport.bundle import ENGINES, Bundle
from infexport.bundle.engine_record import EngineRecord
from infexport.bundle.integrity import sealed, sha256
from infexport.bundle.manifest import MODEL, Calibration
from infexport.conversion.tensorrt.profiles import Profile, Shapes, check_stages, check_whole, stage_shapes
from infexport.errors import InfexportError
from infexport.inference.tensorrt_libraries import Backend
from infexport.system.atomic_files import alone, partial_folder, put, recover, sweep
from infexport.system.dependencies import require
from infexport.system.gpus import Gpu, Target
from infexport.system.host import cache_folder
from infexport.system.progress import (
    PhaseProgress,
    ProgressListener,
    Status,
)
from infexport.system.workers import Ended, ask, worker_command

CHUNK = 8192
"""Tokens at a time where a GPU streams: enough to fill it."""

WORKER = worker_command("infexport.conversion.tensorrt.build_worker")


@dataclass(frozen=True)
class Plan:
    """Plan of a build: the GPU, the library, the precision and the shapes.

    Attributes:
        target: the GPU.
        backend: builds it.
        precision: of the layers that meet every token: `fp32`, `tf32`, its products rounded to 10 bits, `fp16`, `bf16`
            or `int8`.
        gpu: of this machine.
        execution: `whole`, an engine of the whole graph, or `stream`, one for each stage.
        profile: of the whole graph.
        chunk: tokens at a time, of the stages.
        calibrate: images that fix the ranges of activations, for int8.
        memory: bytes that the largest images may take on the GPU; None for the target's.
    """

    target: Target
    backend: Backend
    precision: str
    execution: Literal["whole", "stream"]
    profile: Profile
    gpu: Gpu | None
    chunk: int = CHUNK
    calibrate: tuple[Path, ...] = ()
    memory: int | None = None


@dataclass(frozen=True)
class _Part:
    """Engine to be built: its graph, its shapes and its name."""

    graph: str
    shapes: Shapes
    engine: str


def build_engines(bundle: Bundle, plan: Plan, listener: ProgressListener) -> list[tuple[Path, EngineRecord]]:
    """Build engines into the bundle's folder; none appears unless all can be built.

    Returns:
        Every engine's file and its record, which is written beside it as `<file>.json`.

    Raises:
        InfexportError: not an fp32 bundle, shapes that no engine can have, an extra that is missing, or the library
            refuses or crashes.
    """
    parts = _parts(bundle, plan)
    folder = (bundle.path / ENGINES).resolve()  # it may be a link to a disk with more room
    try:
        recover(folder)
        sweep(folder.parent)
        if folder.is_dir() and not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        with partial_folder(folder.parent) as scratch:
            engines = scratch / ENGINES
            engines.mkdir()
            version, built = _build(bundle, plan, parts, scratch, listener)
            made = []
            for part, found in zip(parts, built, strict=True):
                engine = engines / part.engine
                record = _record(bundle, plan, part, engine, version, found)
                engine.with_name(engine.name + ".json").write_bytes(sealed(record.to_dict()))
                made.append((bundle.path / ENGINES / part.engine, record))
            with alone(folder.parent):  # another build may be putting its own
                _keep(folder, engines)
                put(engines, folder)
    except OSError as error:
        raise InfexportError(
            f"cannot write the engine: {folder}",
            str(error),
            "the bundle must be writable, with room for the engine",
        ) from error
    return made


def _keep(old: Path, new: Path) -> None:
    """Link the files of the old folder that the new one lacks, so that the new one can replace it at once."""

    def link(source: str, target: str) -> None:
        if not os.path.lexists(target):
            try:
                os.link(source, target)
            except OSError:  # this file system has no links
                shutil.copy2(source, target)

    if old.is_dir():
        mode = new.stat().st_mode
        shutil.copytree(old, new, copy_function=link, dirs_exist_ok=True)
        new.chmod(mode)


def _parts(bundle: Bundle, plan: Plan) -> list[_Part]:
    manifest = bundle.manifest
    if manifest.precision != "fp32":
        raise InfexportError(
            f"engines are built from fp32 bundles, this one is {manifest.precision}",
            hint="convert the checkpoint with --precision fp32; build-engine has a --precision of its own",
        )
    if (plan.precision == "int8") != bool(plan.calibrate):
        raise InfexportError(
            f"--precision {plan.precision} {'without' if plan.precision == 'int8' else 'with'} --calibrate",
            "an int8 engine has ranges of activations that images fix; the others have none",
            "give --precision int8 --calibrate IMAGES, a few hundred of the kind it will see, or neither of the two",
        )
    if plan.precision not in ("fp32", "tf32"):
        require("onnx", "onnx_ir", extra="export")
    name = f"{plan.target.name}-{plan.precision}"
    if plan.execution == "whole":
        check_whole(manifest, plan.profile, plan.target, bundle.weights, plan.memory)
        return [_Part(MODEL, plan.profile.shapes(manifest.input), f"{name}.engine")]
    if manifest.stages is None:
        raise InfexportError(
            "this bundle has no stages to build engines for",
            "it was converted with --no-fold, or by an earlier infexport",
            "convert the checkpoint again, without --no-fold",
        )
    check_stages(manifest, plan.chunk, plan.target, bundle.weights, plan.memory)
    stages = {stage.graph: stage for stage in manifest.stages}
    return [
        _Part(graph, stage_shapes(manifest, stage, plan.chunk), f"{name}.{Path(graph).stem}.engine")
        for graph, stage in stages.items()
    ]


def _files(bundle: Bundle, graph: str) -> list[str]:
    """Return the files that an engine is built from: its graph, and the weights that all graphs share."""
    return [graph] + [name for name in (f"{MODEL}.data",) if name in bundle.manifest.files]


def _record(
    bundle: Bundle, plan: Plan, part: _Part, engine: Path, version: str, built: Mapping[str, Any]
) -> EngineRecord:
    """Return the sidecar of an engine that was built.

    Args:
        bundle, plan, part: as of `_build`.
        engine: the file.
        version: of the library.
        built: `seconds`, `layers` and `log`, as the worker tells them.
    """
    return EngineRecord(
        target=plan.target.name,
        compute_capability=plan.target.capability,
        precision=plan.precision,
        calibration=Calibration(len(plan.calibrate)) if plan.calibrate else None,
        chunk=plan.chunk if plan.execution == "stream" else None,
        backend=plan.backend.name,
        versions={"infexport": importlib.metadata.version("infexport")},
        gpu=plan.gpu,
        caveat=plan.backend.caveat,
        checkpoint=bundle.manifest.checkpoint.files,
        backend_version=version,
        graph={name: bundle.manifest.files[name] for name in _files(bundle, part.graph)},
        profile=part.shapes,
        sha256=sha256(engine),
        bytes=engine.stat().st_size,
        **built,
    )


def _build(
    bundle: Bundle, plan: Plan, parts: list[_Part], scratch: Path, listener: ProgressListener
) -> tuple[str, list[dict[str, Any]]]:
    """Build in a subprocess; return the library version and details of each engine."""
    built: list[dict[str, Any]] = []
    handlers: dict[str, Callable[[Any], None]] = {
        "status": lambda message: listener.on_event(Status(message)),
        "phase": lambda phase: listener.on_event(PhaseProgress(*phase)),
        "built": lambda found: built.append({key: found[key] for key in ("seconds", "layers", "log")}),
    }

    def heard(message: dict[str, Any]) -> None:
        for kind, value in message.items():
            if kind in handlers:
                handlers[kind](value)

    request = {
        "backend": plan.backend.name,
        "target": dataclasses.asdict(plan.target),
        "tf32": plan.precision == "tf32",
        "memory": plan.memory,
        "caches": str(cache_folder()),
        "gpu": plan.gpu and plan.gpu.name.replace(" ", "-"),
        "lowering": {
            "bundle": str(bundle.path.absolute()),
            "precision": plan.precision,
            "images": [str(file.absolute()) for file in plan.calibrate],
            "scratch": str(scratch.absolute()),
        },
        "options": "smaller --sizes or --batch" if plan.execution == "whole" else "a smaller --chunk",
        "builds": [
            {
                "name": part.graph,
                "graph": str((bundle.path / part.graph).absolute()),
                "engine": str((scratch / ENGINES / part.engine).absolute()),
                "profile": part.shapes,
            }
            for part in parts
        ],
    }
    try:
        answer = ask(WORKER, request, heard)
    except Ended as error:  # it says nothing of what it was about
        summary = f"{plan.backend.name} ended while building: {error.summary}"
        raise InfexportError(summary, error.details, "infexport doctor shows what is installed") from error
    return answer["version"], built
