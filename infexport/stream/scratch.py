"""A folder in which a run can be killed and gone on with."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from infexport.errors import InfexportError
from infexport.inputs import json_of, read_small
from infexport.stream.driver import Position
from infexport.stream.stores import scratch_errors

RUN, STATE, LOCK = "run.json", "state.npz", "lock"
BOOT = Path("/proc/sys/kernel/random/boot_id")
PREFIX = "infexport-"


@dataclass(frozen=True)
class Identity:
    """What a run is of: it goes on only where all of this is the same.

    Attributes:
        image: the file, or its pixels.
        facts: what else decides the answer, as JSON has it.
    """

    image: Path | NDArray[Any]
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the folder: the same for an image at the same place."""
        return PREFIX + self._digest[:16]

    @cached_property
    def _digest(self) -> str:
        """Of the file's name, or of the pixels."""
        if isinstance(self.image, Path):
            return hashlib.sha256(os.fsencode(self.image.absolute())).hexdigest()
        return hashlib.sha256(np.ascontiguousarray(self.image).data).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        stamp: dict[str, Any] = {"image": self._digest}
        if isinstance(self.image, Path):
            status = self.image.stat()
            stamp |= {"image size": status.st_size, "image time": status.st_mtime_ns}
        # tokens that were written live in the system's cache: a killed process loses none, a power cut may
        boot = BOOT.read_text().strip() if BOOT.is_file() else ""
        facts: dict[str, Any] = json.loads(json.dumps(self.facts))
        return stamp | facts | {"system start": boot}


class Scratch:
    """The folder of one run; entered, nobody else can be in it.

    Left without an error it is deleted, and left by an error too, which the same command would meet again. Killed or
    interrupted it stays, and the same run goes on from `position`.

    Args:
        root: in which the folder is made.
        identity: of the run.
        status: told that a run goes on, or why it starts anew.

    Raises:
        InfexportError: another process is in it, or it cannot be written to.
    """

    def __init__(self, root: Path, identity: Identity, status: Callable[[str], None]) -> None:
        self.folder = root / identity.name
        self.position: Position | None = None
        self._identity, self._status = identity, status
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        with scratch_errors(self.folder):
            self._lock = _locked(self.folder)
            if self._lock is None:
                raise InfexportError(
                    "this image is being run already",
                    f"another process is in {self.folder}",
                    "wait for it, or give another --scratch",
                )
            try:
                self._go_on_or_start()
            except OSError:
                self._leave()
                raise
        return self

    def _go_on_or_start(self) -> None:
        now, before = self._identity.to_dict(), _read(self.folder / RUN)
        if before == now:
            self.position = _read_position(self.folder / STATE)
        if self.position is not None:
            self._status("going on where an earlier run was interrupted")
            return
        if before is not None and before != now:
            changed = [name for name in now.keys() | before.keys() if now.get(name) != before.get(name)]
            self._status(f"starting anew: changed since the run that was interrupted: {', '.join(sorted(changed))}")
        _empty(self.folder)
        _replace(self.folder / RUN, json.dumps(now).encode())

    def record(self, position: Position) -> None:
        """Make `position` what an interrupted run goes on from."""
        arrays: dict[str, Any] = {f"sums/{name}": value for name, value in position.sums.items()}
        arrays |= {f"added/{name}": value for name, value in position.added.items()}
        arrays |= {f"squares/{name}": value for name, value in position.squares.items()}
        with scratch_errors(self.folder / STATE):
            content = io.BytesIO()
            np.savez(content, at=np.array([position.stage, position.done]), **arrays)
            _replace(self.folder / STATE, hashlib.sha256(content.getbuffer()).digest() + content.getvalue())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Exception):
            self._leave()
            return
        self._status(f"interrupted: the same command goes on; what it needs is in {self.folder}")
        assert self._lock is not None, "entered"
        self._lock.close()

    def _leave(self) -> None:
        _delete(self.folder)
        assert self._lock is not None, "entered"
        self._lock.close()


def _locked(folder: Path) -> IO[str] | None:
    """The lock of a folder, which is made; None where another process has it."""
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
        except OSError:
            lock.close()
            return None
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
        file.unlink(missing_ok=True)


def _delete(folder: Path) -> None:
    with suppress(OSError):
        _empty(folder)
        (folder / LOCK).unlink()
        folder.rmdir()


def _replace(file: Path, content: bytes) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as made:
        made.write(content)
    partial.replace(file)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        values = json_of(read_small(file))
    except (OSError, ValueError, InfexportError):
        return None
    return values if isinstance(values, dict) else None


def _read_position(file: Path) -> Position | None:
    try:
        content = file.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            return None  # a disk's fault, or not ours: numbers that fit nothing must not be gone on with
        with np.load(io.BytesIO(content[32:])) as arrays:
            stage, done = (int(x) for x in arrays["at"])
            parts: dict[str, dict[str, Any]] = {"sums": {}, "added": {}, "squares": {}}
            for name in arrays.files:
                kind, _, rest = name.partition("/")
                if rest:
                    parts[kind][rest] = arrays[name]
    except (OSError, ValueError, KeyError, BadZipFile):
        return None  # killed before the first record, or it is no record
    return Position(stage, done, parts["sums"], parts["added"], parts["squares"])


def clean(root: Path) -> int:
    """Delete what interrupted runs left in `root`, but for what a process is in: bytes that are free now."""
    freed = 0
    for folder in root.glob(f"{PREFIX}*"):
        lock = None
        with suppress(InfexportError):  # it may be somebody else's
            lock = _locked(folder) if (folder / LOCK).is_file() else None
        if lock is not None:
            freed += sum(file.stat().st_blocks * 512 for file in folder.iterdir())
            _delete(folder)
            lock.close()
    return freed
