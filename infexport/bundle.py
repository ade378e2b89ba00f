"""The bundle, a folder that holds a model ready to run, and its manifest `infexport.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infexport.errors import InfexportError

MANIFEST = "infexport.json"
MODEL = "model.onnx"
LABELS = "labels.json"
ENGINES = "engines"
FORMAT = 1
"""Version of the manifest. A reader refuses what is newer than itself."""


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
        precision: of the graph's weights.
        parameters: number of weights.
        neumann: for `pure_infsa`: terms, and bounds of what they leave out where there are several.
        checkpoint: `path`, and `files`: name → SHA-256 of every file read.
        files: name → SHA-256 of every file of the bundle but the manifest and the engines.
        versions: of the tools that made it.
    """

    config: dict[str, Any]
    layout: str
    finetuned: bool
    rho: float | None
    preprocessing: dict[str, Any]
    assumed: dict[str, Any]
    input: str
    precision: str
    parameters: int
    neumann: dict[str, Any] | None
    checkpoint: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


def sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `verified` is False where the hashes were not, or did not have to be, right."""

    path: Path
    manifest: Manifest
    verified: bool

    @property
    def model(self) -> Path:
        return self.path / MODEL

    @property
    def labels(self) -> list[str] | None:
        """Name of every class, or None where none were given."""
        file = self.path / LABELS
        if LABELS not in self.manifest.files:
            return None
        labels: list[str] = json.loads(file.read_text(encoding="utf-8"))
        return labels

    def to_dict(self) -> dict[str, Any]:
        """For machines: the manifest, and where it lies, whether it is whole, and its engines."""
        state = {"bundle": str(self.path), "verified": self.verified, "engines": self.engines}
        return state | dataclasses.asdict(self.manifest)

    @property
    def engines(self) -> list[dict[str, Any]]:
        """The sidecar of every engine, with `file` added, and `current`: built from this very graph."""
        graph = {name: digest for name, digest in self.manifest.files.items() if name != LABELS}
        return [
            facts | {"file": file.stem, "current": facts.get("graph") == graph}
            for file in sorted((self.path / ENGINES).glob("*.json"))
            for facts in [_read_json(file)]
        ]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InfexportError(
            f"unreadable: {file}", str(error), "make it again: it is not as infexport wrote it"
        ) from error
    if not isinstance(values, dict):
        raise InfexportError(f"unreadable: {file}", f"received a {type(values).__name__}, expected a JSON object")
    return values


def changed_files(path: Path, manifest: Manifest) -> list[str]:
    """Files of the bundle that are missing or whose content is not what the manifest recorded."""
    return [
        name for name, digest in manifest.files.items() if not (path / name).is_file() or sha256(path / name) != digest
    ]


def open_bundle(path: Path, verify: bool = True) -> Bundle:
    """Open a bundle and check the hash of every file in it.

    Args:
        path: the folder.
        verify: False takes a modified bundle; `Bundle.verified` then says whether it was.

    Raises:
        InfexportError: no bundle, one that is newer than this tool, or files that were modified.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise InfexportError(
            f"not a bundle: {path}",
            f"received {'a folder without' if path.is_dir() else 'no folder with'} {MANIFEST}",
            "make one with: infexport convert checkpoint CHECKPOINT --output BUNDLE",
        )
    manifest = _read_manifest(file)
    changed = changed_files(path, manifest)
    if changed and verify:
        raise InfexportError(
            f"the bundle was modified: {path}",
            "not what the manifest recorded: " + ", ".join(changed),
            "convert the checkpoint again, or judge it as it is: infexport validate parity --no-verify",
        )
    return Bundle(path, manifest, verified=not changed)


def _read_manifest(file: Path) -> Manifest:
    values = _read_json(file)
    found = values.get("format")
    if not isinstance(found, int) or found > FORMAT:
        raise InfexportError(
            f"the bundle is newer than this infexport: {file.parent}",
            f"received manifest format {found}, expected at most {FORMAT}",
            "upgrade infexport, or convert the checkpoint with this version",
        )
    try:
        return Manifest(**values)
    except TypeError as error:
        raise InfexportError(f"incomplete manifest: {file}", str(error), "convert the checkpoint again") from error


@contextmanager
def create_bundle(path: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` once the block is done; on an error nothing is left of it.

    Args:
        path: where the bundle shall be.
        force: replace a bundle that is there already.

    Raises:
        InfexportError: something is there already, or the place cannot be written to.
    """
    if path.exists() and not (path / MANIFEST).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise InfexportError(
            f"the output exists and is no bundle: {path}",
            hint="choose another --output; it will not be replaced",
        )
    if (path / MANIFEST).is_file() and not force:
        raise InfexportError(f"the output exists: {path}", hint="choose another --output, or replace it with --force")
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
        yield partial
        partial.chmod(0o777 & ~_umask())
        _replace(partial, path)
    except OSError as error:
        raise InfexportError(
            f"cannot write the bundle: {path}",
            f"{error.strerror or error}: {error.filename or path}",
            "choose an --output that can be written to, with room enough",
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    path.rename(old / "old")
    try:
        new.rename(path)
    except OSError:
        (old / "old").rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Hash every file of `folder` and write the manifest, last."""
    files = {file.relative_to(folder).as_posix(): sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    values = dataclasses.asdict(dataclasses.replace(manifest, files=files))
    (folder / MANIFEST).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
