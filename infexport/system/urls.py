"""URLs, chained as fsspec has them (`zip://a.png::https://host/a.zip`), without what in them may be secret."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from urllib.parse import quote, unquote, unquote_plus

HIDDEN = "…"
"""Text that replaces a secret."""
SHORT = 4
"""Characters: shorter secrets are hidden only where they stand alone, else no word would be left."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+")
_URL = re.compile(_SCHEME.pattern + r"[^\s'\"<>]+")
_NO_PORT = re.compile(r"[^\[]*:(?!\d*$)")


@dataclass(frozen=True)
class Segment:
    """A URL of a chain, or what stands for one: a path, or the name of a protocol.

    Attributes:
        scheme: with its colon and slashes, or empty.
        userinfo: a name, a password; secret.
        host: and its port.
        path: from its first slash on.
        rest: query and fragment, with their marks; secret.
    """

    scheme: str
    userinfo: str
    host: str
    path: str
    rest: str

    @property
    def shown(self) -> str:
        return self.scheme + self.host + self.path


def segments(url: str) -> list[Segment]:
    """The URLs of a chain. What may belong to a password or a query is taken for that."""
    texts: list[str] = []
    for text in url.split("::"):
        if texts and not _SCHEME.match(text) and _goes_on(texts[-1], text):
            texts[-1] += f"::{text}"
        else:
            texts.append(text)
    return [_segment(text) for text in texts]


def shown(url: str) -> str:
    """A URL for people: without passwords, and without queries and fragments, which may be signatures."""
    return "::".join(segment.shown for segment in segments(url))


def name_of_url(url: str) -> str:
    """Name of the file that a URL leads to, for people: a chain's first URL has it. Without one, the host's."""
    first = segments(url)[0]
    return PurePosixPath(first.host + first.path).name or shown(url)


def scrubbed(text: str, *urls: str) -> str:
    """A text without what is secret in these URLs, however it is quoted, and without what may be in any other."""
    secrets = {secret for url in urls for secret in _secrets(url)}
    for secret in sorted(secrets, key=len, reverse=True):
        # no way of quoting changes letters: most are not there
        if max(re.split("[^A-Za-z0-9]+", secret), key=len) in text:
            text = re.sub(_pattern(secret), HIDDEN, text)
    return _URL.sub(lambda found: shown(found[0]), text)


def urls_in(arguments: Iterable[str]) -> list[str]:
    """URLs among what somebody has typed, as values of options, too, and with slashes missing."""
    return [text[found.start() :] for text in arguments if (found := _SCHEME.search(text))]


def _goes_on(before: str, text: str) -> bool:
    """Tell whether a pair of colons is no end of a URL: it is in a query, or in a password."""
    authority = _authority(before)
    return before != before.split("?")[0].split("#")[0] or ("@" in text and _NO_PORT.match(authority) is not None)


def _authority(text: str) -> str:
    scheme = _SCHEME.match(text)
    return re.split(r"[/?#]", text[scheme.end() :], maxsplit=1)[0] if scheme else ""


def _segment(text: str) -> Segment:
    found = _SCHEME.match(text)
    scheme = found[0] if found else ""
    inside = text[len(scheme) :]
    authority = _authority(text)
    userinfo = authority.rpartition("@")[0]
    # slashes and marks in a password, which should have been quoted
    if "@" in inside and _NO_PORT.match(authority.rpartition("@")[2]):
        userinfo = inside.rpartition("@")[0]
    inside = inside[len(userinfo) + 1 :] if userinfo else inside
    parts = re.match(r"([^/?#]*)([^?#]*)(.*)", inside, re.DOTALL)
    assert parts is not None
    host, path = (parts[1], parts[2]) if scheme else ("", parts[1] + parts[2])
    return Segment(scheme, userinfo, host, path, parts[3])


@lru_cache(4096)
def _secrets(url: str) -> frozenset[str]:
    """Secrets of a URL: whole, in parts, and with their quoting undone."""
    found: set[str] = set()
    for segment in segments(url):
        name, _, password = segment.userinfo.partition(":")
        values = [segment.userinfo, name, password, segment.rest[1:]]
        for part in re.split(r"[?#&;]", segment.rest):
            values += [part, part.partition("=")[2]]
        if segment.userinfo:  # as HTTP sends it
            values.append(base64.b64encode(unquote(segment.userinfo).encode("utf-8", "replace")).decode())
        for value in filter(None, values):
            for undone in (unquote, unquote_plus):
                level, last = value, ""
                while level and level != last:
                    found.add(level)
                    level, last = undone(level), level
    return frozenset(found)


def _pattern(secret: str) -> str:
    """A secret as URLs, Python and JSON may write it."""

    def written(character: str) -> str:
        ways = {
            character,
            quote(character, safe="", errors="replace"),
            "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "replace")),
            repr(character)[1:-1],
            character.encode("unicode_escape").decode(),
        }
        if character == " ":
            ways.add("+")
        choices = (re.escape(way) if "%" not in way[:1] or way == "%" else f"(?i:{re.escape(way)})" for way in ways)
        return f"(?:{'|'.join(sorted(choices, key=len, reverse=True))})"

    pattern = "".join(map(written, secret))
    return pattern if len(secret) >= SHORT else rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])"
