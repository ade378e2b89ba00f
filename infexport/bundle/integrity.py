"""JSON that tells whether it is still what was written, to the last byte, and names its content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

DIGEST = "digest"
SEAL = "seal"
_BLANK = "0" * 64


def sealed(values: dict[str, Any]) -> bytes:
    """Return JSON that ends with two hashes: `digest` of what it says, and `seal` of every byte.

    The digest leaves out the folder in which the checkpoint was, so the same conversion has the same digest anywhere.
    The seal is the SHA-256 of the JSON with zeros for the digits of the seal.
    """
    content = {name: value for name, value in values.items() if name not in (DIGEST, SEAL)}
    content[DIGEST] = hashlib.sha256(_json(_portable(content))).hexdigest()
    blank = _json(content | {SEAL: _BLANK})
    head, _, tail = blank.rpartition(_BLANK.encode())
    return head + hashlib.sha256(blank).hexdigest().encode() + tail


def is_sealed(content: bytes, values: dict[str, Any]) -> bool:
    """Return whether `content`, which was read as `values`, is to the last byte what `sealed` wrote."""
    try:
        return content == sealed(values)
    except ValueError:  # no finite numbers: `sealed` never wrote it
        return False


def _json(values: dict[str, Any]) -> bytes:
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "replace")


def _portable(values: dict[str, Any]) -> dict[str, Any]:
    checkpoint = values.get("checkpoint")
    if not isinstance(checkpoint, dict):
        return values
    return values | {"checkpoint": {name: value for name, value in checkpoint.items() if name != "path"}}


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
