"""A folder in which a run can be killed and gone on with."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from infexport.bundle.integrity import sha256
from infexport.errors import InfexportError, LastingError
from infexport.inference.streaming.driver import Position
from infexport.inference.streaming.token_store import replace_file, scratch_errors
from infexport.system.host import cpu_model
from infexport.system.progress import ProgressListener, Status
from infexport.system.untrusted_files import parse_json, read_small

RUN, STATE, LOCK = "run.json", "state.npz", "lock"
CPUINFO = Path("/proc/cpuinfo")
PREFIX = "infexport-"
NAME = re.compile(f"({PREFIX}[0-9a-f]{{32}})-[0-9]+")
"""Pattern of a run's folder: its fingerprint and a number. Other folders may begin alike."""
PARTS = ("sums", "added", "squares", "checksums")
"""Arrays of a position, by name."""


@dataclass(frozen=True)
class Identity:
    """Fingerprint of a run: an interrupted one is gone on with only where all of it is the same.

    Attributes:
        image: its pixels, or its files, of which the first is the one that was named; their content counts.
        facts: all else that decides the answer, as JSON has it.
        place: a name of the image, which is no part of the fingerprint: an earlier run of it is told by that.
    """

    image: NDArray[Any] | Sequence[Path]
    facts: dict[str, Any]
    place: str = ""

    @property
    def name(self) -> str:
        """Name of the folders of runs with this fingerprint."""
        return PREFIX + hashlib.sha256(json.dumps(self.all_facts, sort_keys=True).encode()).hexdigest()[:32]

    @cached_property
    def all_facts(self) -> dict[str, Any]:
        """The facts, the image's content and the processor among them.

        Raises:
            InfexportError: the image cannot be read.
        """
        facts: dict[str, Any] = json.loads(json.dumps(self.facts))
        return {"image": _content(self.image), "processor": _processor()} | facts

    def to_dict(self) -> dict[str, Any]:
        place = self.place and hashlib.sha256(os.fsencode(self.place)).hexdigest()
        return {"facts": self.all_facts, "place": place}


def _content(image: NDArray[Any] | Sequence[Path]) -> str:
    if isinstance(image, np.ndarray):
        shape = f"{image.dtype.str} {image.shape}".encode()
        return hashlib.sha256(shape + hashlib.sha256(np.ascontiguousarray(image).data).digest()).hexdigest()
    try:
        digests = [sha256(image[0]), *(f"{file.name} {sha256(file)}" for file in image[1:])]
    except OSError as error:
        reason = error.strerror or str(error)
        raise InfexportError(f"cannot read the image: {image[0]}", reason, "run the same command again") from error
    return hashlib.sha256("\n".join(digests).encode("utf-8", "surrogateescape")).hexdigest()


def _processor() -> str:
    """Digest of what the processor can do: libraries choose by it how they compute, to the last bit."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return cpu_model()
    kinds = {line for line in lines if line.partition(":")[0].strip() in ("model name", "flags", "Features")}
    return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()


class Scratch:
    """The folder of one run; entered, nobody else can be in it.

    Left without an error it is deleted, and left by a `LastingError`, too. Left by anything else it stays, once
    something was recorded: the same run then goes on from `position`.

    Args:
        root: in which the folder is made.
        identity: of the run.
        listener: told that a run goes on, or why it starts anew.

    Attributes:
        folder: of the run, once entered.
        position: that an interrupted run recorded; what else it left is still to be proven: then call `go_on`, else
            `start_anew`.

    Raises:
        InfexportError: it cannot be read or written.
    """

    def __init__(self, root: Path, identity: Identity, listener: ProgressListener) -> None:
        self.position: Position | None = None
        self._root, self._identity, self._listener = root, identity, listener
        self._recorded = False

    def __enter__(self) -> Self:
        with scratch_errors(self._root):
            self.folder, self._lock = _free_folder(self._root, self._identity.name)
        try:
            with scratch_errors(self.folder):
                self._look()
        except BaseException:
            with suppress(OSError):
                if not (self.folder / STATE).exists():
                    _delete(self.folder)
            self._lock.close()
            raise
        return self

    def _look(self) -> None:
        left = sorted(file.name for file in self.folder.iterdir() if file.name != LOCK)
        if not left:
            self._start(self._changed() or f"starting: no run of this image is kept in {self._root}")
        elif _read(self.folder / RUN) != self._identity.to_dict():
            self.start_anew(f"{RUN} is not what was written")
        elif STATE not in left:
            self.start_anew("it was interrupted before anything was recorded")
        else:
            self.position = _read_position(self.folder / STATE)
            if self.position is None:
                self.start_anew(f"{STATE} is not what was written")
            else:
                self._recorded = True
                self._listener.on_event(Status("an earlier run was interrupted: checking what it left"))

    def _changed(self) -> str:
        """Say how this run differs from another one of the image that has a folder here; of several, the most alike."""
        now, found = self._identity.to_dict(), list[tuple[list[str], Path]]()
        for folder in _folders(self._root):
            with suppress(OSError):
                other = _read(folder / RUN) or {}
                facts = other.get("facts")
                same_place = now["place"] and other.get("place") == now["place"]
                if isinstance(facts, dict) and (same_place or facts.get("image") == now["facts"]["image"]):
                    found.append(([name for name, value in now["facts"].items() if facts.get(name) != value], folder))
        if not found:
            return ""
        names, folder = min(found, key=lambda one: (len(one[0]), one[1].name))
        if not names:
            return f"starting: another process is in {folder}"
        return f"starting anew: the run that is kept in {folder} had another {' and '.join(names)}"

    def _start(self, message: str) -> None:
        self._listener.on_event(Status(message))
        with scratch_errors(self.folder):
            _empty(self.folder)
        replace_file(self.folder / RUN, json.dumps(self._identity.to_dict()).encode())

    def start_anew(self, reason: str) -> None:
        """Delete what an interrupted run left, and say why."""
        self.position, self._recorded = None, False
        self._start(f"starting anew, an earlier run cannot be gone on with: {reason}")

    def go_on(self) -> None:
        """Say that the run goes on from `position`."""
        self._listener.on_event(Status("going on where an earlier run was interrupted"))

    def record(self, position: Position) -> None:
        """Make `position` what an interrupted run goes on from."""
        arrays: dict[str, Any] = {
            f"{kind}/{name}": value for kind in PARTS for name, value in getattr(position, kind).items()
        }
        content = io.BytesIO()
        np.savez(content, at=np.array([position.stage, position.done]), **arrays)
        replace_file(self.folder / STATE, hashlib.sha256(content.getbuffer()).digest() + content.getvalue())
        self._recorded = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, LastingError) or not self._recorded:
            _delete(self.folder)
        else:
            self._listener.on_event(
                Status(
                    f"interrupted: the same command goes on; what it needs is in {self.folder} until --clean deletes it"
                )
            )
        self._lock.close()


def _folders(root: Path, name: str = "") -> list[Path]:
    """The folders of runs, or of those with one fingerprint; none where `root` is not there.

    Raises:
        OSError: it cannot be looked into.
    """
    try:
        found = [(NAME.fullmatch(path.name), path) for path in root.iterdir()]
    except FileNotFoundError:
        return []
    return [path for match, path in found if match and name in ("", match[1])]


def _free_folder(root: Path, name: str) -> tuple[Path, IO[str]]:
    """A folder of a fingerprint that no process is in, and its lock: one that was left before one that is made."""
    left = sorted(_folders(root, name), key=lambda folder: (not (folder / STATE).is_file(), folder.name))
    for folder in itertools.chain(left, (root / f"{name}-{number}" for number in itertools.count(1))):
        lock = _locked(folder)
        if lock is not None:
            return folder, lock
    raise AssertionError("numbers do not end")


def _locked(folder: Path) -> IO[str] | None:
    """The lock of a folder, which is made; None where another process has it.

    Raises:
        OSError: it cannot be made, or the disk has no locks.
    """
    import fcntl  # not everywhere

    while True:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        try:
            _check_own(folder)
            # a link in its place must not lead elsewhere
            lock = os.fdopen(os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "w")
        except FileNotFoundError:
            continue  # deleted meanwhile by who had finished in it
        except OSError:
            with suppress(OSError):
                folder.rmdir()
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except OSError:
            lock.close()
            raise
        if os.fstat(lock.fileno()).st_nlink:
            return lock
        lock.close()


def _check_own(folder: Path) -> None:
    """Its name can be guessed: where everyone may write, somebody else may have made it, with links to our files."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise InfexportError(
            f"a scratch folder that is not this user's: {folder}", hint="delete it, or give another --scratch"
        )


def _empty(folder: Path) -> None:
    """Delete what is in a folder, but for its lock: first what says that there is something to go on from."""
    for file in [folder / STATE, folder / RUN, *(file for file in folder.iterdir() if file.name != LOCK)]:
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)


def _delete(folder: Path) -> None:
    with suppress(OSError):
        _empty(folder)
        (folder / LOCK).unlink()
        folder.rmdir()


def _read(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or another kind of file.

    Raises:
        OSError: the disk fails, or the process has too many files: this does not tell what is in it.
    """
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            return None
        values = parse_json(read_small(file))
    except (FileNotFoundError, NotADirectoryError, ValueError, InfexportError):
        return None
    return values if isinstance(values, dict) else None


def _read_position(file: Path) -> Position | None:
    """Read what was recorded; None where the file is not what was written.

    Raises:
        OSError: see `_read`.
    """
    if not stat.S_ISREG(file.lstat().st_mode):
        return None
    content = file.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None  # a disk's fault, or not ours: numbers that fit nothing must not be gone on with
    try:
        with np.load(io.BytesIO(content[32:])) as arrays:
            stage, done = (int(x) for x in arrays["at"])
            parts: dict[str, dict[str, Any]] = {kind: {} for kind in PARTS}
            for name in arrays.files:
                kind, _, rest = name.partition("/")
                if rest:
                    parts[kind][rest] = arrays[name]
    except (ValueError, KeyError, BadZipFile):
        return None
    return Position(stage, done, **parts)


def clean(root: Path) -> int:
    """Delete what interrupted runs left in `root`, but for what a process is in: bytes that are free now.

    Raises:
        InfexportError: it cannot be looked into.
    """
    freed = 0
    with scratch_errors(root):
        for folder in _folders(root):
            lock = None
            with suppress(InfexportError):  # it may be somebody else's
                lock = _locked(folder)
            if lock is not None:
                freed += sum(file.lstat().st_blocks * 512 for file in folder.iterdir())
                _delete(folder)
                lock.close()
    return freed
