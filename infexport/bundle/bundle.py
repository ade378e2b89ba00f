"""The bundle: a folder that holds a model ready to run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from infexport.bundle.engine_record import Engine, EngineRecord
from infexport.bundle.integrity import sha256
from infexport.bundle.manifest import (
    FILE,
    LABELS,
    MODEL,
    Manifest,
    check_outside_bundles,
    load_manifest,
    read_manifest,
    read_sealed,
    write_manifest,
)
from infexport.errors import InfexportError
from infexport.system.atomic_files import PREFIX, create_folder, recover
from infexport.system.untrusted_files import listed, parse_json, read_small

T = TypeVar("T")
ENGINES = "engines"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: the folder.
        manifest: what it says of itself.
        changed: files that are missing or not what the manifest recorded, and the manifest where it is not what its
            digest says; empty for a bundle as it was made.
    """

    path: Path
    manifest: Manifest
    changed: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        return not self.changed

    @property
    def model(self) -> Path:
        return self.path / MODEL

    @property
    def weights(self) -> int:
        """Bytes of the weights, which all graphs share."""
        data = self.model.with_name(f"{MODEL}.data")
        return data.stat().st_size if data.is_file() else 0

    @cached_property
    def labels(self) -> list[str] | None:
        """Name of every class, or None where none were given.

        Raises:
            InfexportError: the file is no list of them.
        """
        if LABELS not in self.manifest.files:
            return None
        file, classes = self.path / LABELS, self.manifest.config.num_classes
        try:
            labels = parse_json(read_small(file))
            json.dumps(labels, ensure_ascii=False).encode()  # no halves of surrogate pairs
        except (ValueError, OSError) as error:
            raise InfexportError(f"unreadable: {file}", str(error), "convert the checkpoint again") from error
        if not isinstance(labels, list) or len(labels) != classes or not all(isinstance(x, str) for x in labels):
            raise InfexportError(
                f"labels that are not the bundle's: {file}",
                f"expected a list of {classes} names, one for every class",
                "convert the checkpoint again",
            )
        return labels

    @cached_property
    def changed_checkpoint(self) -> dict[str, Path]:
        """Name → file, of the recorded checkpoint's that are gone or not what was converted; hashed once.

        Raises:
            OSError: one that may not be read.
        """
        record = self.manifest.checkpoint
        path = Path(record.path)
        folder = path if path.is_dir() else path.parent
        files = {name: folder / name for name in record.files}
        return {name: file for name, file in files.items() if not _holds(file, record.files[name])}

    @property
    def sidecars(self) -> list[Path]:
        """The file that describes an engine, of every engine.

        Raises:
            InfexportError: the folder of engines cannot be looked into.
        """
        return [file for file in listed(self.path / ENGINES) if file.name.endswith(".engine.json")]

    @cached_property
    def engines(self) -> list[Engine]:
        """Every engine that has a sidecar; hashed once for an opened bundle.

        Raises:
            InfexportError: see `sidecars`.
        """
        return [self._engine(sidecar) for sidecar in self.sidecars]

    def _engine(self, sidecar: Path) -> Engine:
        engine = sidecar.with_suffix("")
        try:
            fields, intact = read_sealed(sidecar)
            record = EngineRecord.from_dict(fields) if intact else None
        except (InfexportError, ValueError):
            record = None
        if record is None:
            return Engine(engine.name, "unreadable", None)
        if not engine.is_file():
            return Engine(engine.name, "missing", record)
        if sha256(engine) != record.sha256:
            return Engine(engine.name, "modified", record)
        is_current = record.graph.items() <= self.manifest.files.items()
        return Engine(engine.name, "current" if is_current else "stale", record)

    def to_dict(self) -> dict[str, Any]:
        """Return the bundle for JSON: its manifest, path, changed files and engines."""
        state = {"bundle": str(self.path), "verified": self.verified, "changed": list(self.changed)}
        return state | {"engines": [engine.to_dict() for engine in self.engines]} | self.manifest.to_dict()


def _holds(file: Path, digest: str) -> bool:
    try:
        return file.is_file() and sha256(file) == digest
    except FileNotFoundError:  # since
        return False


def open_bundle(path: Path, verify: bool = True, digest: str | None = None) -> Bundle:
    """Open a bundle and check the hash of every file in it.

    Args:
        path: the folder.
        verify: False takes a modified bundle; `Bundle.changed` then says what was.
        digest: the only one that is taken, where it is known from elsewhere.

    Raises:
        InfexportError: no bundle, one of another format than this tool's, files that were modified, or another bundle.
    """
    return _steadily(path, lambda: _opened(path, verify, digest))


def _opened(path: Path, verify: bool, digest: str | None) -> Bundle:
    if not (path / FILE).is_file():
        raise InfexportError(
            f"not a bundle: {path}",
            f"received {'a folder without' if path.is_dir() else 'no folder with'} {FILE}",
            "make one with: infexport convert checkpoint CHECKPOINT --output BUNDLE",
        )
    manifest, intact = load_manifest(path / FILE)
    changed = (
        *([] if intact else [FILE]),
        *(name for name, recorded in manifest.files.items() if not _holds(path / name, recorded)),
    )
    if changed and verify:
        raise InfexportError(
            f"the bundle was modified: {path}",
            f"not what {'its digest' if changed == (FILE,) else 'the manifest'} recorded: {', '.join(changed)}",
            "convert the checkpoint again, or judge it as it is: infexport validate parity --no-verify",
        )
    if digest is not None and manifest.digest != digest.lower():
        raise InfexportError(
            f"another bundle than was asked for: {path}",
            f"received digest {manifest.digest}, expected {digest}",
            "fetch it again, or ask who made it",
        )
    bundle = Bundle(path, manifest, changed)
    if not changed:
        _ = bundle.labels  # what is wrong with them is said before the long work, not after it
    return bundle


def _steadily(path: Path, look: Callable[[], T]) -> T:
    """Look at a folder; where that fails, again if another one was put in its place: something was seen of each."""
    while True:
        before = _stamp(path)
        try:
            return look()
        except (InfexportError, FileNotFoundError):
            if _stamp(path) == before:
                raise


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return a folder's stamp; its inode number alone may be reused by the next folder."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def create_bundle(path: Path, force: bool = False) -> AbstractContextManager[Path]:
    """A temporary folder that becomes `path` once the block is done; on an error nothing is left of it.

    Args:
        path: where the bundle shall be.
        force: replace a bundle that is there already.

    Raises:
        InfexportError: something is there already, or the place is in a bundle or cannot be written to.
    """
    check_outside_bundles(path, "output")
    recover(path / ENGINES)
    return create_folder(path, lambda: _steadily(path, lambda: _check_free(path, force)))


def _check_free(path: Path, force: bool) -> None:
    """Refuse what would be lost: anything but an empty folder or, with `force`, a bundle with nothing else in it."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / FILE).is_file():
        raise InfexportError(
            f"the output exists and is no bundle: {path}", hint="choose another --output; it will not be replaced"
        )
    if not force:
        raise InfexportError(f"the output exists: {path}", hint="choose another --output, or replace it with --force")
    try:
        foreign = _foreign(path)
    except InfexportError as error:
        hint = "choose another --output, or delete the folder yourself"
        raise InfexportError(f"the output holds a bundle that cannot be read: {path}", error.details, hint) from error
    if foreign:
        raise InfexportError(
            f"the output holds files that are not the bundle's: {path}",
            f"they would be lost: {', '.join(foreign)}",
            "move them away, or choose another --output",
        )


def _foreign(path: Path) -> list[str]:
    """Return the names in a bundle's folder that are not part of the bundle."""
    own = {FILE, ENGINES, *read_manifest(path / FILE).files}
    foreign = [item.name for item in listed(path) if item.name not in own and not item.match(f"{PREFIX}*")]
    engines = listed(path / ENGINES)
    return foreign + [item.name for item in engines if not item.name.endswith((".engine", ".engine.json"))]


def seal(folder: Path, manifest: Manifest) -> None:
    """Hash every file of `folder` and write the manifest, last."""
    files = {file.relative_to(folder).as_posix(): sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    write_manifest(folder / FILE, dataclasses.replace(manifest, files=files))
