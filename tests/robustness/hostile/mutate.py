"""Mutations of bytes and of JSON."""

from __future__ import annotations

import copy
import json
import random
import struct
from contextlib import suppress
from typing import Any

INTERESTING = (0, 1, -1, 127, 255, 65535, 2**31 - 1, -(2**31), 2**32, 10**12, 2**63 - 1, -(2**63), 2**64 - 1)
CONTROLS = "\x1b[2J\x1b]0;owned\x07\r\x08\x9b31m\u202e\u2066"
TEXTS = (
    "",
    " ",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "a/../../b",
    "~",
    "$(touch canary)",
    "`touch canary`; touch canary",
    "%s%n{0}{x!r}",
    "-rf",
    "a.tif[page=1]",
    "file:///etc/passwd",
    "line\nbreak",
    f"bell{CONTROLS}",
    "nul\0byte",
    "\ud800",
    "ı İ ß ﬁ 🦀",
    "١٢",
    "x" * 100_000,
)


def interesting(chance: random.Random, width: int) -> bytes:
    """An interesting number in so many bytes."""
    value = chance.choice((*INTERESTING, chance.getrandbits(8 * width))) % (1 << 8 * width)
    return value.to_bytes(width, chance.choice(("little", "big")))


def mutate_bytes(chance: random.Random, data: bytes, other: bytes = b"", head: int = 0) -> bytes:
    """Damaged once or a few times.

    Args:
        chance: decides all of it.
        data: what is damaged.
        other: what parts of may be put in.
        head: the first so many bytes, where most of the damage is done; 0 for anywhere.
    """
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8, 30))):
        end = min(head, len(found)) if head and chance.random() < 0.8 else len(found)
        at = chance.randrange(end) if end else 0
        length = min(chance.choice((1, 2, 4, 16, 256, 4096)), max(len(found) - at, 1))
        kind = chance.randrange(9)
        if kind == 0 and found:
            found[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and found:
            found[at] = chance.randrange(256)
        elif kind == 2:
            width = chance.choice((1, 2, 4, 8))
            found[at : at + width] = interesting(chance, width)
        elif kind == 3:
            del found[at : at + length]
        elif kind == 4:
            found[at:at] = chance.randbytes(length)
        elif kind == 5:
            found[at:at] = found[at : at + length]
        elif kind == 6:
            found[at : at + length] = chance.choice((b"\0", b"\xff")) * length
        elif kind == 7 and other:
            start = chance.randrange(len(other))
            found[at : at + length] = other[start : start + length]
        elif kind == 8 and chance.random() < 0.3:
            del found[at:]
    return bytes(found)


def hostile_value(chance: random.Random) -> Any:
    """Something that JSON can say and a reader does not expect."""
    kind = chance.randrange(8)
    if kind == 0:
        return chance.choice((None, True, False, [], {}, [[]], [None], {"": None}))
    if kind == 1:
        return chance.choice((*INTERESTING, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308))
    if kind == 2:
        return _raw(chance.choice(("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "1E400", "0x10")))
    if kind == 3:
        depth = chance.choice((100, 900, 5000, 100_000))
        return _raw(chance.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth)))
    if kind == 4:
        return chance.choice(([0] * 10_000, {str(i): i for i in range(1000)}, [[1, 2, 3]] * 3, ["x"] * 10))
    return chance.choice(TEXTS)


def mutate_json(chance: random.Random, value: Any) -> bytes:
    """A document that is nearly `value`; now and then no JSON at all."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        value = _mutate(chance, value)
    text = json.dumps(value, indent=chance.choice((None, 2)), ensure_ascii=chance.random() < 0.8)
    text = _unraw(text)
    data = text.encode("utf-8", "surrogatepass")
    if chance.random() < 0.1:
        data = chance.choice((b"\xef\xbb\xbf" + data, text.encode("utf-16", "surrogatepass"), data[: len(data) // 2]))
    return mutate_bytes(chance, data) if chance.random() < 0.15 else data


def _mutate(chance: random.Random, root: Any) -> Any:
    places = list(_places(root))
    if not places or chance.random() < 0.02:
        return hostile_value(chance)
    inside, key = chance.choice(places)
    kind = chance.randrange(7)
    if kind == 0:
        del inside[key]
    elif kind == 1:
        inside[key] = hostile_value(chance)
    elif kind == 2 and isinstance(inside, dict):
        inside[f"{TWICE}{key}"] = hostile_value(chance)
    elif kind == 3 and isinstance(inside, dict):
        inside[chance.choice(TEXTS)] = inside.pop(key)
    elif kind == 4:
        inside[key] = _near(chance, inside[key])
    elif kind == 5:
        other, name = chance.choice(places)
        if name in other if isinstance(other, dict) else name < len(other):
            inside[key] = copy.deepcopy(other[name])
    else:
        inside[key] = chance.choice(([inside[key]], {"": inside[key]}, str(inside[key])))
    return root


def _near(chance: random.Random, value: Any) -> Any:
    """The same kind of thing, and another."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice((value + 1, value - 1, -value, value * 2, value * 1000, 1, float(value)))
    if isinstance(value, float):
        return chance.choice((-value, value * 1e30, value * 1e-30, 0.0, int(value)))
    if isinstance(value, str):
        return chance.choice((value[:-1], value + "x", value.upper(), value * 100, f"../{value}", value + CONTROLS))
    if isinstance(value, list):
        return chance.choice((value[1:], value * 2, value[::-1], value[:1]))
    return value


def _places(value: Any) -> Any:
    """Every container, and a key in it."""
    if isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(item)


RAW, TWICE = "@@raw:", "@@twice:"


def _raw(text: str) -> str:
    return f"{RAW}{text.encode().hex()}@@"


def _unraw(text: str) -> str:
    parts = text.split(f'"{RAW}')
    found = [parts[0]]
    for part in parts[1:]:
        coded, _, rest = part.partition('@@"')
        with suppress(ValueError):  # what is within a text that was mutated since is left as it is
            part = bytes.fromhex(coded).decode() + rest
        found.append(part)
    return "".join(found).replace(TWICE, "")


def length_prefixed(text: bytes, length: int | None = None) -> bytes:
    """As safetensors has its header: 8 bytes of length, then the text."""
    return struct.pack("<Q", (len(text) if length is None else length) % 2**64) + text
