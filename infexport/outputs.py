"""Files that a command is to write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from infexport.atomic import partial_folder, sweep, sync_entry
from infexport.errors import InfexportError


def check_writable(path: Path, kind: str, suffixes: Collection[str], hint: str) -> None:
    """Find out before the long work, not after it, that a file cannot be written.

    Its folder is made, and rid of what killed processes left in it.

    Args:
        path: the file.
        kind: what it is, for people.
        suffixes: it may end in.
        hint: where it cannot be written to.

    Raises:
        InfexportError: an unknown suffix, or a place that cannot be written to.
    """
    if path.suffix not in suffixes:
        raise InfexportError(
            f"unknown kind of {kind}: {path}",
            f"received {path.suffix or 'no suffix'}, expected {', '.join(suffixes)}",
        )
    if path.is_dir():
        raise InfexportError(f"the {kind} is a folder: {path}", hint="name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        sweep(path.parent)
    except OSError as error:
        raise InfexportError(f"cannot write the {kind}: {path}", str(error), hint) from error


@contextmanager
def written(path: Path, kind: str, hint: str) -> Iterator[BinaryIO]:
    """A file to write to, which appears when it is whole.

    Args:
        path, kind, hint: as of `check_writable`.

    Raises:
        InfexportError: it cannot be written.
    """
    try:
        with partial_folder(path.parent) as folder:
            partial = folder / f"{kind}{path.suffix}"  # made here, it has the mode everyone's files have
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        sync_entry(path.parent)
    except OSError as error:
        raise InfexportError(f"cannot write the {kind}: {path}", str(error), hint) from error
