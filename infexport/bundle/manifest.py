"""`infexport.json`: what a bundle says of itself, and whether it can be believed."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infexport.bundle.integrity import is_sealed, sealed
from infexport.errors import InfexportError
from infexport.images.transform import Preprocessing
from infexport.system.untrusted_files import is_plain_name, parse_json, read_small
from infvit.config import InfViTConfig
from infvit.stage_scope import StageScope

FILE = "infexport.json"
MODEL = "model.onnx"
CENTRALITY_MODEL = "centrality.onnx"
"""The whole graph with the output `centrality`; its weights are those of MODEL."""
LABELS = "labels.json"
PRECISIONS = ("fp32", "fp16", "int8")
FORMAT = 3
"""Version of the manifest; in 3 its digest does not depend on where the checkpoint was. A reader refuses any other."""


@dataclass(frozen=True)
class Stage:
    """One graph of a streamed run (`infvit.stages`).

    Attributes:
        graph: the file.
        over: the tokens that it is called for.
        inputs, outputs: names, as the graph has them.
        optional: run only where the centrality of tokens is asked for.
    """

    graph: str
    over: StageScope
    inputs: list[str]
    outputs: list[str]
    optional: bool = False


@dataclass(frozen=True)
class CheckpointRecord:
    """The checkpoint that a bundle was converted from.

    Attributes:
        path: the file or folder.
        files: name → SHA-256 of every file of weights.
    """

    path: str
    files: dict[str, str]


@dataclass(frozen=True)
class Calibration:
    """Images that fixed the ranges of activations: their number."""

    images: int


@dataclass(frozen=True)
class NeumannSeries:
    """The Neumann series of a `pure_infsa` bundle.

    Attributes:
        terms: T, as computed.
        a_priori_bound: relative to the values, for any image; None for one term, which truncates nothing.
        a_posteriori_bound: as measured on noise; None for one term.
    """

    terms: int
    a_priori_bound: float | None = None
    a_posteriori_bound: float | None = None


@dataclass(frozen=True)
class Manifest:
    """Description of a bundle, stored in it.

    Attributes:
        config: the network's shape.
        layout: the checkpoint's layout.
        finetuned: False where a softmax ViT's projections were taken and never trained with this attention.
        rho: the discount that was filled in; None where the checkpoint has its own, learned.
        preprocessing: normalisation and evaluation transform.
        assumed: what neither the checkpoint nor the user said, and the value taken.
        overridden: sentences, each of a value that was used and of another one that a config of the checkpoint states.
        unread: words of these configs that nothing reads, with their sources.
        input: `uint8` (RGB `image [B, H, W, 3]`) or `float32` (normalised `pixels [B, 3, H, W]`).
        precision: of the layers that meet every token: `fp32`, `fp16` or `int8`.
        folded: the graph has the exact rewrites of `infvit.fold`.
        parameters: number of weights.
        neumann: for `pure_infsa`; None for the other variants.
        checkpoint: where the weights came from.
        versions: of the tools that made it.
        files: name → SHA-256 of every file of the bundle but the manifest and the engines.
        calibration: for `int8` with fixed ranges of activations; None where ranges are found at run time.
        stages: the graphs of a streamed run, in order; None where the graph is not folded.
        digest: SHA-256 of what the manifest says but for the checkpoint's `path`, and so of all that it has the hashes
            of: the same file, options and versions have the same digest anywhere. Filled in where it is written.
        seal: SHA-256 of every byte of the manifest (`sealed`); filled in where it is written.
    """

    config: InfViTConfig
    layout: str
    finetuned: bool
    rho: float | None
    preprocessing: Preprocessing
    assumed: dict[str, Any]
    overridden: list[str]
    unread: list[str]
    input: str
    precision: str
    folded: bool
    parameters: int
    neumann: NeumannSeries | None
    checkpoint: CheckpointRecord
    versions: dict[str, str]
    files: dict[str, str]
    format: int = FORMAT
    calibration: Calibration | None = None
    stages: list[Stage] | None = None
    digest: str = ""
    seal: str = ""

    @property
    def graph(self) -> dict[str, str]:
        """The part of `files` an engine is built from."""
        return {name: digest for name, digest in self.files.items() if name.startswith(MODEL)}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        values = dataclasses.asdict(self)
        if self.neumann is not None:
            values["neumann"] = {name: value for name, value in values["neumann"].items() if value is not None}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """Return the manifest of fields that `_CHECKS` accepts.

        Raises:
            ValueError: a record that contradicts itself or has unknown fields; names it.
        """
        records = {
            "config": InfViTConfig,
            "preprocessing": Preprocessing,
            "checkpoint": CheckpointRecord,
            "neumann": NeumannSeries,
            "calibration": Calibration,
        }
        made: dict[str, Any] = {}
        for name, kind in records.items():
            try:
                made[name] = None if values[name] is None else kind(**values[name])
            except (ValueError, TypeError) as error:
                raise ValueError(f"{name}: {error}") from error
        if values["stages"] is not None:
            made["stages"] = [Stage(**stage | {"over": StageScope(stage["over"])}) for stage in values["stages"]]
        return cls(**dict(values) | made)


def read_sealed(file: Path) -> tuple[dict[str, Any], bool]:
    """A JSON object from a file of a bundle, and whether it is as it was written.

    Raises:
        InfexportError: unreadable, not JSON, or not an object.
    """
    try:
        content = read_small(file)
        values = parse_json(content)
    except (ValueError, OSError) as error:
        raise InfexportError(
            f"unreadable: {file}", str(error), "make it again: it is not as infexport wrote it"
        ) from error
    if not isinstance(values, dict):
        raise InfexportError(f"unreadable: {file}", f"received a {type(values).__name__}, expected a JSON object")
    return values, is_sealed(content, values)


def read_manifest(file: Path) -> Manifest:
    """Read a manifest; see `load_manifest`."""
    return load_manifest(file)[0]


def load_manifest(file: Path) -> tuple[Manifest, bool]:
    """Read a manifest and check everything the tool relies on; and whether it is as it was written.

    Raises:
        InfexportError: unreadable, of another format than this tool's, or not as the tool wrote it; names the field.
    """
    values, intact = read_sealed(file)
    found = values.get("format")
    if type(found) is int and found != FORMAT:
        newer = found > FORMAT
        raise InfexportError(
            f"the bundle is {'newer' if newer else 'older'} than this infexport: {file.parent}",
            f"received format {found} of {FILE}, expected {FORMAT}",
            ("upgrade infexport, or " if newer else "") + "convert the checkpoint with this version",
        )
    wrong = sorted(values.keys() ^ {field.name for field in dataclasses.fields(Manifest)})
    wrong = wrong or [name for name, good in _CHECKS.items() if not good(values[name])]
    # what is not among the files is never hashed, and must not be run
    if not wrong and any(stage["graph"] not in values["files"] for stage in values.get("stages") or ()):
        wrong = ["stages"]
    if not wrong:
        try:
            return Manifest.from_dict(values), intact
        except ValueError as error:
            wrong = [str(error)]
    raise InfexportError(
        f"the manifest is not as infexport wrote it: {file}",
        f"missing, unknown or not understood: {', '.join(wrong)}",
        "convert the checkpoint again",
    )


def write_manifest(file: Path, manifest: Manifest) -> None:
    """Write it with its digest."""
    file.write_bytes(sealed(manifest.to_dict()))


def _sentences(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _hashes(value: Any) -> bool:
    """Check hashes of files in one folder: a name with `..` could name any file of this machine."""
    return _texts(value) and all(map(is_plain_name, value))


def _path(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value and value == value.encode("utf-8", "replace").decode()


def _positive(value: Any) -> bool:
    return type(value) is int and 0 < value <= 2**31 - 1


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


_GIVEN: dict[StageScope, set[str]] = {
    StageScope.ONCE: set(),
    StageScope.IMAGE: {"image", "row", "column", "grid_height", "grid_width"},
    StageScope.TOKENS: {"query"},
    StageScope.PAIRS: set(),
    StageScope.CLASS_TOKEN: set(),
}
"""Scope of a stage → its inputs that no other stage makes."""


def _stages(value: Any) -> bool:
    """Tell whether each stage can run after those before it, with and without the optional ones."""
    if not isinstance(value, list) or not all(map(_stage, value)):
        return False
    return all(
        _in_order([stage for stage in value if all_of_them or not stage.get("optional")]) for all_of_them in (0, 1)
    )


def _in_order(stages: list[dict[str, Any]]) -> bool:
    made: set[str] = set()
    for stage in stages:
        over, inputs, outputs = stage["over"], stage["inputs"], stage["outputs"]
        good = over in _GIVEN and set(inputs) <= made | _GIVEN[over]
        good = good and (over != StageScope.IMAGE or "tokens" in outputs)
        good = good and (over != StageScope.PAIRS or inputs[:1] in (["q"], ["k"]))
        if not good or ("query" in inputs and not {"q", "query"} & made):
            return False
        made |= set(outputs)
    # the class token, then the patches, and neither again
    overs = [stage["over"] for stage in stages]
    first = [StageScope.ONCE, StageScope.IMAGE]
    once = overs[:2] == first and not {*first} & {*overs[2:]}
    return once and {"logits", "features"} <= {*stages[-1]["outputs"]}


_INTEGERS = ("image_size", "patch_size", "depth", "embed_dim", "num_heads", "mlp_dim", "num_classes", "neumann_terms")


def _neumann(value: Any) -> bool:
    bounds = ("a_priori_bound", "a_posteriori_bound")
    if not isinstance(value, dict) or not _positive(value.get("terms")):
        return False
    return value["terms"] == 1 or all(isinstance(value.get(name), float) for name in bounds)


_FLAGS = ("attention_dense", "pooler", "qkv_bias", "rho_per_head")
_CHECKS = {
    "config": lambda v: (
        isinstance(v, dict)
        and isinstance(v.get("variant"), str)
        and isinstance(v.get("norm_eps"), float | int)
        and all(_positive(v.get(name)) for name in _INTEGERS)
        and all(isinstance(v.get(name), bool) for name in _FLAGS)
    ),
    "preprocessing": lambda v: (
        isinstance(v, dict)
        and _numbers(v.get("mean"))
        and _numbers(v.get("std"))
        and min(v["std"]) > 0
        and _positive(v.get("resize_size"))
        and _positive(v.get("crop_size"))
        and {"resize_mode", "interpolation"} <= v.keys()
    ),
    "checkpoint": lambda v: isinstance(v, dict) and _path(v.get("path")) and _hashes(v.get("files")),
    "files": lambda v: _hashes(v) and MODEL in v and FILE not in v,
    "versions": _texts,
    "assumed": lambda v: isinstance(v, dict),
    "overridden": _sentences,
    "unread": _sentences,
    "neumann": lambda v: v is None or _neumann(v),
    "precision": lambda v: v in PRECISIONS,
    "calibration": lambda v: v is None or (isinstance(v, dict) and _positive(v.get("images"))),
    "input": lambda v: v in ("uint8", "float32"),
    "stages": lambda v: v is None or _stages(v),
    "parameters": lambda v: type(v) is int and 0 < v < 2**53,
    "rho": lambda v: v is None or isinstance(v, float),
    "format": _positive,
    "digest": lambda v: isinstance(v, str),
    "seal": lambda v: isinstance(v, str),
}
"""Field → whether its value is one the tool can work with."""


def check_outside_bundles(path: Path, kind: str, is_folder: bool = False) -> None:
    """Refuse to write into a bundle: what is added to it would be lost with it, what is replaced would ruin it.

    Args:
        path: where something is to be written.
        kind: what it is, for people.
        is_folder: it is a folder that something is put into, and may be no bundle itself.

    Raises:
        InfexportError: a folder that it is in, by whatever links, is a bundle.
        OSError: that cannot be found out.
    """
    place = Path(os.path.realpath(path))
    for folder in (*([place] if is_folder else []), *place.parents):
        if (folder / FILE).is_file() and (folder / MODEL).is_file():
            raise InfexportError(
                f"the {kind} is inside a bundle: {path}", f"the bundle: {folder}", "name another place"
            )
