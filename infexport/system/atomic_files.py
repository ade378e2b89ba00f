"""Files and folders that appear whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from infexport.errors import InfexportError

PREFIX = ".infexport-partial-"
"""Prefix of folders in which something is made, next to its final place; a process keeps its own locked."""
PATIENCE = 60.0
"""Seconds that a process waits for another one which puts something in the same place; it takes milliseconds."""
_EXCHANGE = {"linux": ("renameat2", -100), "darwin": ("renameatx_np", -2)}
"""Platform → the system's call that exchanges two paths, and its number for the current folder."""


@contextmanager
def create_folder(path: Path, check_free: Callable[[], None]) -> Iterator[Path]:
    """A temporary folder that becomes `path` once the block is done; on an error nothing is left of it.

    Args:
        path: where it shall be.
        check_free: raises where what is there must not be replaced.

    Raises:
        InfexportError: the place is a link that leads nowhere.
    """
    if path.is_symlink() and not path.exists():
        raise InfexportError(
            f"the output is a link that leads nowhere: {path}", hint="delete it, or name another place"
        )
    recover(path)
    check_free()
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    with partial_folder(path.parent) as partial:
        yield partial
        os.umask(mask := os.umask(0))
        partial.chmod(0o777 & ~mask)
        put(partial, path, check_free)  # again: another process may have made it meanwhile


@contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """A folder to make something in; what is left in it is deleted in the end."""
    folder, lock = _make(parent)
    try:
        yield folder
    finally:
        _delete(folder)
        if lock is not None:
            os.close(lock)


def sweep(parent: Path) -> None:
    """Delete what killed processes left in a folder."""
    for item in parent.glob(f"{PREFIX}*"):
        if item.is_symlink():
            item.unlink(missing_ok=True)
        elif (lock := _lock(item)) is not None:
            _delete(item)
            os.close(lock)


def _delete(folder: Path) -> None:
    """A folder, or a link to one that was exchanged for it: not what that leads to."""
    if folder.is_symlink():
        folder.unlink()
        return
    for place, _, _ in os.walk(folder):  # what may not be written to cannot be emptied
        with suppress(OSError):
            os.chmod(place, 0o700)  # noqa: PTH101  a text
    shutil.rmtree(folder, ignore_errors=True)


def _make(parent: Path) -> tuple[Path, int | None]:
    """A new folder and its lock; None where this file system has no locks, on which nothing is swept either."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = _lock(folder, PATIENCE)
        if folder.exists():
            return folder, lock
        # another process found it before it was locked, and took it for a dead one's
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, patience: float = 0.0) -> int | None:
    """The lock of a folder; None where a living process has it for longer, it is no folder, or there are no locks."""
    try:
        import fcntl  # not everywhere
    except ImportError:
        return None
    end = time.monotonic() + patience
    try:
        # anything may have this name: a link leads elsewhere, a pipe is waited for
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.01)
                continue
        except OSError:
            pass
        os.close(descriptor)
        return None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is between here and the end of such a block of the same folder.

    Where another one stays there for longer than PATIENCE, or there are no locks, this one goes on.
    """
    lock = _lock(folder.resolve(), PATIENCE)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def put(new: Path, path: Path, allowed: Callable[[], object] = lambda: None) -> None:
    """Put a folder in the place of another, or of nothing: at any moment either is there, whole.

    What was replaced, a folder or a link to one, is where the new one was. On file systems that cannot exchange two
    folders, such as NFS, there is a moment at which `path` does not exist; what was there is then at
    `backup_path(path)`, and `recover` puts it back.

    Args:
        new: the folder, on the same disk.
        path: its place.
        allowed: called where something is there already; raises where it is not to be replaced.

    Raises:
        OSError: it cannot be put there; then all is as it was.
    """
    sync(new)
    try:
        new.rename(path)  # an empty folder is replaced, one that is not refuses
    except OSError:
        if not path.is_dir():
            raise
        allowed()
        if not _exchange(new, path):
            _replace(new, path)
    sync_entry(path.parent)


def _replace(new: Path, path: Path) -> None:
    recover(path)
    backup = backup_path(path)
    path.rename(backup)
    try:
        new.rename(path)
    except OSError:
        backup.rename(path)
        raise
    _delete(backup)


def backup_path(path: Path) -> Path:
    """Return where `put` keeps the folder that it replaces, on file systems that cannot exchange."""
    return path.with_name(f".{path.name}.infexport-replaced")


def recover(path: Path) -> None:
    """Finish or undo what a `put` that was killed had begun, on file systems that cannot exchange."""
    backup = backup_path(path)
    if os.path.lexists(path):
        _delete(backup)
    elif backup.is_dir():
        backup.rename(path)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two paths in one step; False where the system or the file system cannot."""
    name, here = _EXCHANGE.get(sys.platform, ("", 0))
    call = getattr(ctypes.CDLL(None), name, None) if name else None
    return call is not None and call(here, os.fsencode(a), here, os.fsencode(b), ctypes.c_uint(2)) == 0


def write_file(path: Path, content: bytes | memoryview, partial: Path) -> None:
    """Write a file that has its old content or all of the new, whatever ends the process.

    Args:
        path: the file.
        content: all of its new content.
        partial: name under which it is written, in the same folder; an earlier file of that name is deleted.

    Raises:
        OSError: it cannot be written; the old content is untouched.
    """
    partial.unlink(missing_ok=True)
    with partial.open("xb") as made:
        made.write(content)
    partial.replace(path)


def sync(folder: Path) -> None:
    """Flush a folder to disk, so that a power cut cannot leave half of it."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync_entry(Path(place) / name)
        sync_entry(Path(place))


def sync_entry(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    with suppress(OSError):  # a file system that cannot, or Windows' folders
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
