"""Small files that anybody may have made."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from infexport.errors import InfexportError

DEPTH = 64
"""Levels of what is within another in JSON."""
LIMIT = 2**24
"""Bytes; the largest that is met in earnest, labels of 22,000 classes, has a tenth of it."""


def read_small(file: Path) -> bytes:
    """All of a file, which must be one that ends.

    Raises:
        InfexportError: a pipe, a device, or more than LIMIT bytes.
        OSError: it may not be read, or is not there.
    """
    if (size := check_ordinary(file)) > LIMIT:
        raise InfexportError(f"too large a file: {file}", f"received {size:,} bytes, expected at most {LIMIT:,}")
    return file.read_bytes()


def check_ordinary(file: Path) -> int:
    """Bytes of a file, which must be one that ends: a pipe or a device may be read for ever.

    Raises:
        InfexportError: a pipe or a device.
        OSError: a folder, or it is not there.
    """
    status = file.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if not stat.S_ISREG(status.st_mode):
        raise InfexportError(f"no ordinary file: {file}", "received a pipe or a device", "save its content to a file")
    return status.st_size


def listed(folder: Path) -> list[Path]:
    """Return all that is in a folder, sorted; nothing where it is not there. `Path.glob` hides what may not be seen.

    Raises:
        InfexportError: it cannot be looked into.
    """
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        reason, hint = error.strerror or str(error), "make it a folder that you may read, or delete it"
        raise InfexportError(f"cannot look into {folder}", reason, hint) from error


def parse_json(content: bytes | str) -> Any:
    """A JSON value.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    inside = [value]
    for _ in range(DEPTH):
        inside = [item for outer in inside for item in _items(outer)]
    if inside:  # whoever goes through it would run out of stack
        raise ValueError(f"nested too deeply: expected at most {DEPTH} levels")
    return value


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def is_plain_name(name: object) -> bool:
    """Tell whether a text is a plain file name that cannot lead out of its folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        return False
    try:
        return len(name.encode()) < 256
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
