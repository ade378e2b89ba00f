"""Which engines of a bundle this machine can run, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infexport.bundle import Bundle
from infexport.bundle.engine_record import Engine, EngineRecord, EngineState
from infexport.bundle.manifest import MODEL
from infexport.errors import InfexportError
from infexport.inference.tensorrt_libraries import BACKENDS
from infexport.system.gpus import Gpu, local_gpu

Kind = Literal["whole", "stream"]


@dataclass(frozen=True)
class EngineSet:
    """Engines of one target and precision, which run the whole graph or stream.

    Attributes:
        name: `<target>-<precision>`.
        kind: what they run.
        engines: graph → its engine.
    """

    name: str
    kind: Kind
    engines: Mapping[str, Engine]

    @property
    def first(self) -> EngineRecord:
        """The record of one of the engines, which were built together."""
        return next(iter(self.engines.values())).recorded

    @property
    def precision(self) -> str:
        return self.first.precision

    @property
    def backend(self) -> str:
        return self.first.backend

    @property
    def chunk(self) -> int | None:
        """Tokens at a time, at most, where they stream."""
        return self.first.chunk


def find_engine_sets(bundle: Bundle, kind: Kind) -> list[EngineSet]:
    """All sets of a kind that are complete and as their sidecars say, built from this very bundle."""
    needed = [MODEL] if kind == "whole" else [stage.graph for stage in bundle.manifest.stages or ()]
    found: dict[str, dict[str, Engine]] = {}
    for engine in bundle.engines:
        if engine.state == "current":
            graphs = [graph for graph in engine.recorded.graph if graph.endswith(".onnx")]
            found.setdefault(engine.recorded.set_name, {}).update({graphs[0]: engine})
    sets = [
        EngineSet(name, kind, {graph: engines[graph] for graph in needed})
        for name, engines in found.items()
        if needed and all(graph in engines for graph in needed)
    ]
    # those of two builds may not fit together; only hands can have put them side by side
    return [each for each in sets if len({_build_key(engine.recorded) for engine in each.engines.values()}) == 1]


def _build_key(engine: EngineRecord) -> tuple[str, str, int | None]:
    """Return what is the same for all engines of a build."""
    return engine.library, engine.compute_capability, engine.chunk


def choose(bundle: Bundle, kind: Kind, name: str | None = None, gpu: Gpu | None = None) -> EngineSet:
    """The engines to run with.

    Args:
        bundle: opened.
        kind: what is to be run.
        name: of the set, `<target>-<precision>`; None for the one that fits.
        gpu: of this machine; None asks for it.

    Raises:
        InfexportError: none fits this machine, with the reason of each and what to build; or several do.
    """
    gpu = gpu or local_gpu()
    if gpu is None:
        raise InfexportError(
            "engines need an NVIDIA GPU and its driver",
            "nvidia-smi names no GPU here",
            "run the bundle in ONNX Runtime instead: --provider cpu" + (", without --engine" if name else ""),
        )
    sets = [each for each in find_engine_sets(bundle, kind) if name in (None, each.name)]
    fitting = [each for each in sets if not refusal(each, gpu)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InfexportError(
            f"several engines fit {gpu.name}",
            ", ".join(each.name for each in fitting),
            f"choose one: --engine {fitting[0].name}",
        )
    reasons = [f"{each.name}: {refusal(each, gpu)}" for each in sets]
    for engine in bundle.engines:
        if engine.state != "current":
            reasons.append(f"{engine.file}: {STATES[engine.state]}")
    precision = name.rpartition("-")[2] if name else "fp16"
    what = "engine" if kind == "whole" else "set of engines to stream through"
    raise InfexportError(
        f"this bundle has no {what} {f'{name} ' if name else ''}for {gpu.name}",
        "\n".join(reasons) or "it has none at all",
        build_command(bundle.path, precision, kind),
    )


def build_command(bundle: Path, precision: str, kind: Kind) -> str:
    """The command that builds engines for this machine's GPU."""
    images = " --calibrate IMAGES" if precision == "int8" else ""
    stream = " --execution stream" if kind == "stream" else ""
    return f"infexport build-engine {bundle} --target local --precision {precision}{images}{stream}"


STATES: dict[EngineState, str] = {
    "stale": "built from another graph than the bundle's",
    "modified": "the engine is not what its sidecar says",
    "missing": "the engine is missing",
    "unreadable": "the sidecar is not as infexport wrote it",
}


def refusal(engines: EngineSet, gpu: Gpu) -> str:
    """Why a set cannot run here, on a GPU; empty where it can."""
    engine = engines.first
    if engine.compute_capability != gpu.capability:
        return f"built for compute capability {engine.compute_capability}, this GPU has {gpu.capability}"
    if engine.backend not in BACKENDS:
        return f"built with {engine.backend}, which this infexport does not know"
    version = BACKENDS[engine.backend].version()
    if version != engine.backend_version:
        return f"built with {engine.library}, installed is {version or 'none'}"
    return ""
