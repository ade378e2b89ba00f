"""Checks of output files, and atomic writes."""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from infexport.bundle.manifest import check_outside_bundles
from infexport.errors import InfexportError
from infexport.system.atomic_files import partial_folder, sweep, sync_entry


def check_writable(path: Path, kind: str, suffixes: Collection[str], hint: str) -> None:
    """Check before the long work that a file can be written.

    Creates its folder, and removes what killed processes left there.

    Args:
        path: the file.
        kind: name of the file's purpose in messages, such as "output".
        suffixes: allowed suffixes, in lower case.
        hint: advice if it cannot be written.

    Raises:
        InfexportError: the suffix is unknown, or the path is inside a bundle, is a folder, pipe or device, or cannot be
            written to.
    """
    if path.suffix.lower() not in suffixes:
        raise InfexportError(
            f"unknown kind of {kind}: {path}",
            f"received {path.suffix or 'no suffix'}, expected {', '.join(suffixes)}",
        )
    with _errors(path, kind, hint):
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise InfexportError(f"the {kind} is a folder: {path}", hint="name a file")
        if not stat.S_ISREG(mode):  # an atomic write would replace it by a file
            raise InfexportError(f"the {kind} is not a regular file: {path}", "it is a pipe or a device", hint)
        check_outside_bundles(path, kind)
        _make_ready(Path(os.path.realpath(path)).parent)


def check_folder(path: Path, kind: str, hint: str) -> None:
    """Create a folder, and check before the long work that files can be written to it.

    Args:
        path: the folder.
        kind, hint: see `check_writable`.

    Raises:
        InfexportError: it is inside a bundle, or cannot be written to.
    """
    with _errors(path, kind, hint):
        check_outside_bundles(path, kind, is_folder=True)
        _make_ready(path)


def _make_ready(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    sweep(folder)


@contextmanager
def _errors(path: Path, kind: str, hint: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InfexportError(f"cannot write the {kind}: {path}", str(error), hint) from error


def check_apart(outputs: Mapping[Path, str], inputs: Iterable[Path | str], hint: str) -> None:
    """Check before the work that no output would replace an input.

    Args:
        outputs: file → name of its purpose in messages.
        inputs: files or URLs that are read; only `file://` and `local://` URLs can name an output.
        hint: advice in the error.

    Raises:
        InfexportError: a file is both, under any name or link.
    """
    written_to = {os.path.realpath(path): path for path in outputs}
    inodes = {inode: path for path in outputs if (inode := _inode(path)) is not None}
    for item in inputs:
        path = local_path(item)
        if path is None:
            continue
        output = written_to.get(os.path.realpath(path)) or inodes.get(_inode(path) or (0, 0))
        if output is not None:
            raise InfexportError(
                f"the {outputs[output]} would replace an input: {path}", f"it is written to {output}", hint
            )


def local_path(item: Path | str) -> Path | None:
    """Return the file on this machine that a path or URL names; None for any other URL."""
    if isinstance(item, Path):
        return item
    scheme, separator, rest = item.partition("://")
    if not separator:
        return Path(item)
    return Path(rest) if scheme in ("file", "local") else None


def _inode(path: Path) -> tuple[int, int] | None:
    """Return device and inode number, which all names of a file share; None if there is no file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


@contextmanager
def drawing_errors(path: Path, kind: str) -> Iterator[None]:
    """Convert any exception of a plotting library into an InfexportError: results must survive a failed plot.

    The library's warnings are dropped, such as those about a character that the font lacks, which is drawn as a box.

    Args:
        path: the picture.
        kind: name of the picture in messages.

    Raises:
        InfexportError: it cannot be drawn.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InfexportError:
        raise
    except Exception as error:
        details = f"{type(error).__name__}: {error}"
        raise InfexportError(f"cannot draw the {kind}: {path}", details, "all other results are complete") from error


@contextmanager
def written(path: Path, kind: str, hint: str) -> Iterator[BinaryIO]:
    """Open a file for an atomic write: it appears once it is complete.

    A link is followed and its target written. A file that is replaced keeps its mode.

    Args:
        path, kind, hint: see `check_writable`.

    Raises:
        InfexportError: it cannot be written.
    """
    with _errors(path, kind, hint):
        target = Path(os.path.realpath(path))
        with partial_folder(target.parent) as folder:
            partial = folder / f"{kind}{path.suffix}"  # created by open(), it has the mode of the user's umask
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.is_file():
                partial.chmod(stat.S_IMODE(target.stat().st_mode))
            partial.replace(target)
        sync_entry(target.parent)
