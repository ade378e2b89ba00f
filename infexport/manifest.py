"""`infexport.json`: what a bundle says of itself, and whether it can be believed."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infexport.errors import InfexportError

FILE = "infexport.json"
MODEL = "model.onnx"
CENTRALITY_MODEL = "centrality.onnx"
"""The whole graph with the output `centrality`; its weights are those of MODEL."""
LABELS = "labels.json"
PRECISIONS = ("fp32", "fp16", "int8")
FORMAT = 1
"""Version of the manifest. A reader refuses what is newer than itself."""


@dataclass(frozen=True)
class Stage:
    """One graph of a streamed run (`infvit.sweeps`).

    Attributes:
        graph: the file.
        over: what it is called for, as of `infvit.sweeps.Sweep`.
        inputs, outputs: names, as the graph has them.
        optional: run only where the centrality of tokens is asked for.
    """

    graph: str
    over: str
    inputs: list[str]
    outputs: list[str]
    optional: bool = False


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        config: the fields of `infvit.InfViTConfig`.
        layout: the checkpoint's layout.
        finetuned: False where a softmax ViT's projections were taken and never trained with this attention.
        rho: the discount that was filled in; None where the checkpoint has its own, learned.
        preprocessing: `mean`, `std` and the evaluation transform (`resize_mode`, `resize_size`, `crop_size`,
            `interpolation`).
        assumed: what neither the checkpoint nor the user said, and the value taken.
        input: `uint8` (RGB `image [B, H, W, 3]`) or `float32` (normalised `pixels [B, 3, H, W]`).
        precision: of the layers that meet every token: `fp32`, `fp16` or `int8`.
        folded: the graph has the exact rewrites of `infvit.fold`.
        parameters: number of weights.
        neumann: for `pure_infsa`: terms, and bounds of what they leave out where there are several.
        checkpoint: `path`, and `files`: name → SHA-256 of every file of weights.
        versions: of the tools that made it.
        files: name → SHA-256 of every file of the bundle but the manifest and the engines.
        calibration: for `int8` with fixed ranges of activations: the number of `images` that fixed them; None where
            ranges are found at run time.
        stages: the graphs of a streamed run, in order; None where the graph is not folded.
    """

    config: dict[str, Any]
    layout: str
    finetuned: bool
    rho: float | None
    preprocessing: dict[str, Any]
    assumed: dict[str, Any]
    input: str
    precision: str
    folded: bool
    parameters: int
    neumann: dict[str, Any] | None
    checkpoint: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, str]
    format: int = FORMAT
    calibration: dict[str, Any] | None = None
    stages: list[Stage] | None = None

    @property
    def graph(self) -> dict[str, str]:
        """The part of `files` an engine is built from."""
        return {name: digest for name, digest in self.files.items() if name.startswith(MODEL)}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a bundle.

    Raises:
        InfexportError: unreadable, not JSON, or not an object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InfexportError(
            f"unreadable: {file}", str(error), "make it again: it is not as infexport wrote it"
        ) from error
    if not isinstance(values, dict):
        raise InfexportError(f"unreadable: {file}", f"received a {type(values).__name__}, expected a JSON object")
    return values


def read_manifest(file: Path) -> Manifest:
    """Read a manifest and check everything the tool relies on.

    Raises:
        InfexportError: unreadable, newer than this tool, or not as the tool wrote it; names the field.
    """
    values = read_json(file)
    found = values.get("format")
    if type(found) is int and found > FORMAT:
        raise InfexportError(
            f"the bundle is newer than this infexport: {file.parent}",
            f"received manifest format {found}, expected at most {FORMAT}",
            "upgrade infexport, or convert the checkpoint with this version",
        )
    known = {f.name for f in dataclasses.fields(Manifest)}
    # a field with a default came later than format 1 did: a bundle without it is an older one
    needed = {f.name for f in dataclasses.fields(Manifest) if f.default is dataclasses.MISSING}
    wrong = sorted((needed - values.keys()) | (values.keys() - known))
    wrong = wrong or [name for name, good in _CHECKS.items() if name in values and not good(values[name])]
    # what is not among the files is never hashed, and must not be run
    if not wrong and any(stage["graph"] not in values["files"] for stage in values.get("stages") or ()):
        wrong = ["stages"]
    if wrong:
        raise InfexportError(
            f"the manifest is not as infexport wrote it: {file}",
            f"missing, unknown or not understood: {', '.join(wrong)}",
            "convert the checkpoint again",
        )
    if values.get("stages") is not None:
        values["stages"] = [Stage(**stage) for stage in values["stages"]]
    return Manifest(**values)


def write_manifest(file: Path, manifest: Manifest) -> None:
    text = json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8", errors="replace")


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _numbers(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 3 and all(type(x) in (int, float) and math.isfinite(x) for x in value)
    )


def _stage(value: Any) -> bool:
    def names(field: str) -> bool:
        return isinstance(value[field], list) and all(isinstance(name, str) for name in value[field])

    known = {field.name for field in dataclasses.fields(Stage)}
    if not isinstance(value, dict) or value.keys() | {"optional"} != known:
        return False
    texts = isinstance(value["graph"], str) and isinstance(value["over"], str)
    return texts and names("inputs") and names("outputs") and isinstance(value.get("optional", False), bool)


_INTEGERS = ("image_size", "patch_size", "depth", "embed_dim", "num_heads", "mlp_dim", "num_classes", "neumann_terms")
_CHECKS = {
    "config": lambda v: isinstance(v, dict) and "variant" in v and all(_positive(v.get(name)) for name in _INTEGERS),
    "preprocessing": lambda v: (
        isinstance(v, dict)
        and _numbers(v.get("mean"))
        and _numbers(v.get("std"))
        and min(v["std"]) > 0
        and _positive(v.get("resize_size"))
        and _positive(v.get("crop_size"))
        and {"resize_mode", "interpolation"} <= v.keys()
    ),
    "checkpoint": lambda v: isinstance(v, dict) and isinstance(v.get("path"), str) and _texts(v.get("files")),
    "files": lambda v: _texts(v) and MODEL in v,
    "versions": _texts,
    "assumed": lambda v: isinstance(v, dict),
    "neumann": lambda v: v is None or (isinstance(v, dict) and "terms" in v and (v["terms"] == 1 or len(v) == 3)),
    "precision": lambda v: v in PRECISIONS,
    "calibration": lambda v: v is None or (isinstance(v, dict) and _positive(v.get("images"))),
    "input": lambda v: v in ("uint8", "float32"),
    "stages": lambda v: v is None or (isinstance(v, list) and all(map(_stage, v))),
    "parameters": _positive,
    "rho": lambda v: v is None or isinstance(v, float),
    "format": _positive,
}
"""Field → whether its value is one the tool can work with."""
