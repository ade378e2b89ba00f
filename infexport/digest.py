"""JSON that tells whether it is still what was written, to the last byte."""

from __future__ import annotations

import hashlib
import json
from typing import Any

DIGEST = "digest"
_BLANK = "0" * 64


def sealed(values: dict[str, Any]) -> bytes:
    """JSON that has, last, the SHA-256 of itself: of its bytes with zeros for the digits of this digest."""
    blank = json.dumps(values | {DIGEST: _BLANK}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    content = blank.encode("utf-8", "replace")
    head, _, tail = content.rpartition(_BLANK.encode())
    return head + hashlib.sha256(content).hexdigest().encode() + tail


def is_sealed(content: bytes, digest: Any) -> bool:
    """Whether what `sealed` wrote, and its digest as read from there, are still what they were, to the last byte."""
    if not isinstance(digest, str) or len(digest) != len(_BLANK):
        return False
    head, found, tail = content.rpartition(digest.encode("utf-8", "replace"))
    return bool(found) and hashlib.sha256(head + _BLANK.encode() + tail).hexdigest() == digest
