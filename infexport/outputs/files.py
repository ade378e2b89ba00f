"""Files that a command is to write."""

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
    """Find out before the long work, not after it, that a file cannot be written.

    Its folder is made, and rid of what killed processes left in it.

    Args:
        path: the file.
        kind: what it is, for people.
        suffixes: it may end in.
        hint: where it cannot be written to.

    Raises:
        InfexportError: an unknown suffix, a place inside a bundle, of a folder, pipe or device, or one that cannot be
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
        if not stat.S_ISREG(mode):  # the file that is made would be put in its place
            raise InfexportError(f"the {kind} is no ordinary file: {path}", "a pipe or a device is there", hint)
        check_outside_bundles(path, kind)
        _make_ready(Path(os.path.realpath(path)).parent)


def check_folder(path: Path, kind: str, hint: str) -> None:
    """Find out before the long work that nothing can be written to a folder, which is made ready.

    Args:
        path: the folder.
        kind, hint: as of `check_writable`.

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
    """Find out before the work that an output would replace what is read.

    Args:
        outputs: file → what it is, for people.
        inputs: files that are read, or `file://` URLs; other URLs are elsewhere.
        hint: what to do.

    Raises:
        InfexportError: a file is both, by whatever name or link.
    """
    written_to = {os.path.realpath(path): path for path in outputs}
    numbers = {number: path for path in outputs if (number := _number(path)) is not None}
    for item in inputs:
        path = local_path(item)
        if path is None:
            continue
        output = written_to.get(os.path.realpath(path)) or numbers.get(_number(path) or (0, 0))
        if output is not None:
            raise InfexportError(
                f"the {outputs[output]} would replace what is read: {path}", f"it is written to {output}", hint
            )


def local_path(item: Path | str) -> Path | None:
    """The file on this machine that a path or a URL names; None for a URL of elsewhere."""
    if isinstance(item, Path):
        return item
    scheme, separator, rest = item.partition("://")
    if not separator:
        return Path(item)
    return Path(rest) if scheme in ("file", "local") else None


def _number(path: Path) -> tuple[int, int] | None:
    """The file's own number, which all of its names share; None where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


@contextmanager
def drawing_errors(path: Path, kind: str) -> Iterator[None]:
    """Have whatever a library that draws raises as our error: what was found is worth more than its picture.

    Its warnings are dropped: a sign that a font has not is drawn as a box.

    Args:
        path: the picture.
        kind: what it is, for people.

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
        raise InfexportError(f"cannot draw the {kind}: {path}", details, "all else is as it should be") from error


@contextmanager
def written(path: Path, kind: str, hint: str) -> Iterator[BinaryIO]:
    """A file to write to, which appears when it is whole.

    Where a link is, the file that it leads to is written; a file that is replaced keeps its mode.

    Args:
        path, kind, hint: as of `check_writable`.

    Raises:
        InfexportError: it cannot be written.
    """
    with _errors(path, kind, hint):
        place = Path(os.path.realpath(path))
        with partial_folder(place.parent) as folder:
            partial = folder / f"{kind}{path.suffix}"  # made here, it has the mode everyone's files have
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if place.is_file():
                partial.chmod(stat.S_IMODE(place.stat().st_mode))
            partial.replace(place)
        sync_entry(place.parent)
