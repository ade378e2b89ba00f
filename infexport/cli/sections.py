"""Sections of the output of `inspect`: lines that begin with a keyword, and tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from infexport.bundle import ENGINES, Bundle
from infexport.bundle.engine_record import Engine, EngineRecord
from infexport.bundle.manifest import MODEL
from infexport.bundle.provenance import Provenance
from infexport.cli.console import Output
from infexport.evaluation.inspect import Graph, Part, Resolution
from infexport.inference.planner import ExecutionMode

CHECKPOINT = {
    "unchanged": "there and unchanged",
    "changed": "there, but changed since the conversion",
    "gone": "gone from its recorded path",
    "unreadable": "there, but this user may not read it",
}
MODE_NAMES: dict[ExecutionMode, str] = {"whole": "whole", "memory": "streamed", "disk": "with scratch"}


def provenance(out: Output, bundle: Bundle, found: Provenance) -> None:
    made = ", ".join(f"{name} {version}" for name, version in bundle.manifest.versions.items())
    out.data("")
    out.data(f"made with   {made}")
    out.data(f"provenance  the checkpoint is {CHECKPOINT[found.checkpoint]}")
    files = [(f"{each.file} (checkpoint)", each) for each in found.source]
    files += [(each.file, each) for each in found.files]
    out.table(["file", "state", "sha256"], [[name, _state(each.state), each.sha256 or "-"] for name, each in files])


def graph(out: Output, found: Graph) -> None:
    out.data("")
    for keyword, ports in (("input", found.inputs), ("output", found.outputs)):
        for port in ports or ():
            axes = ", ".join("?" if axis is None else str(axis) for axis in port.shape)
            out.data(f"{keyword:<12}{port.name}: {port.dtype} [{axes}]")
    if found.opsets is not None:
        versions = (f"{domain or 'ai.onnx'} {version}" for domain, version in found.opsets.items())
        out.data(f"operators   {', '.join(versions)}; model.onnx has nodes as written, without the bodies of infsa's")
    if found.runs_on is not None:
        out.data(f"runs on     {found.runs_on}; nodes as loaded, with these bodies in place")
    for line in found.unknown:
        out.data(f"unknown     {line}")
    columns: dict[str, Counter[str]] = {} if found.operators is None else {"model.onnx": found.operators}
    columns |= found.placement or {}
    if columns:
        names = sorted({name for counter in columns.values() for name in counter})
        rows = [[name, *(str(counter[name] or "-") for counter in columns.values())] for name in names]
        rows.append(["all", *(str(counter.total()) for counter in columns.values())])
        out.table(["operator", *columns], rows)


def parameters(out: Output, bundle: Bundle, parts: Sequence[Part]) -> None:
    total = bundle.manifest.parameters
    out.data("")
    out.data(f"parameters  as trained; as exported the weights are {_figure(bundle.weights / 1e6)} MB")
    rows = [
        [part.name, f"{part.each:,}", str(part.times), f"{part.all:,}", f"{part.all / total:.1%}"] for part in parts
    ]
    out.table(["part", "each", "times", "parameters", "share"], [*rows, ["all", "-", "-", f"{total:,}", "100.0%"]])


def resolutions(out: Output, bundle: Bundle, sized: Sequence[Resolution], limit: int) -> None:
    folded = "" if bundle.manifest.folded else "not "
    out.data("")
    out.data(f"arithmetic  GFLOP of an image: 2 per multiply-add of its matrix products, as exported, {folded}folded")
    out.data("memory      GB of the process at its peak on a CPU, as predicted: run whole, or streamed with tokens in")
    out.data("            memory or in a scratch file, whose size is the last of these columns")
    out.data(f"auto        what run-engine does in {_figure(limit / 1e9)} GB, 80% of what is free now")
    rows = [
        [
            f"{one.height}x{one.width}",
            f"{one.tokens:,}",
            _figure(2 * one.multiply_adds / 1e9),
            *(_figure(one.memory[mode] / 1e9) if mode in one.memory else "-" for mode in MODE_NAMES),
            "-" if one.scratch is None else _figure(one.scratch / 1e9),
            "nothing fits" if one.auto is None else MODE_NAMES[one.auto],
        ]
        for one in sized
    ]
    out.table(["size", "tokens", "GFLOP", *(f"{name} GB" for name in MODE_NAMES.values()), "scratch GB", "auto"], rows)


def engines(out: Output, bundle: Bundle) -> None:
    out.data("")
    if not bundle.engines:
        out.data(f"engines     none; {_how_to_build(bundle)}")
        return
    out.table(
        ["engine", "state", "MB", "target", "precision", "execution: at least / best / at most"],
        [_cells(bundle, engine) for engine in bundle.engines],
    )
    builds: dict[str, set[str]] = {}
    for engine in bundle.engines:
        if engine.record is not None:
            gpu = engine.record.gpu
            library = f"{engine.record.library}, {'without a GPU' if gpu is None else f'on {gpu.name}'}"
            builds.setdefault(library, set()).add(engine.record.set_name)
    for library, names in builds.items():
        out.data(f"built by    {library}: {', '.join(sorted(names))}")


def _cells(bundle: Bundle, engine: Engine) -> list[str]:
    file, record = bundle.path / ENGINES / engine.file, engine.record
    size = f"{file.stat().st_size / 1e6:.1f}" if file.is_file() else "-"
    cells = [engine.file, _state(engine.state), size]
    if record is None:
        return [*cells, "-", "-", "-"]
    return [*cells, f"{record.target} ({record.compute_capability})", record.precision, _takes(record)]


def _how_to_build(bundle: Bundle) -> str:
    if bundle.manifest.precision != "fp32":
        return f"they are built from fp32 bundles, and this one is {bundle.manifest.precision}"
    return f"build one, for an A100 say: infexport build-engine {bundle.path} --target a100"


def _takes(engine: EngineRecord) -> str:
    """Describe the inputs that an engine accepts, from its profile."""
    if MODEL not in engine.graph:
        return f"stream: {engine.chunk} tokens at a time"
    (shapes,) = engine.profile.values()
    rows, columns = (1, 2) if "image" in engine.profile else (2, 3)
    sizes = " / ".join(f"{shape[rows]}x{shape[columns]}" for shape in shapes)
    return f"whole: {sizes}, batch {' / '.join(str(shape[0]) for shape in shapes)}"


def _state(state: str) -> str:
    return state if state in ("ok", "current") else state.upper()


def _figure(value: float) -> str:
    """Format with three figures, at most three decimal places and no exponent."""
    digits = 3 if value < 1 else max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{digits}f}"
