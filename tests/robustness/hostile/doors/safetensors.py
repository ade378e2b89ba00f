"""Checkpoints in safetensors: the length of the header, the header, the data."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from hostile.cases import Case
from hostile.doors.reading import golden, read
from hostile.mutate import INTERESTING, TEXTS, length_prefixed, mutate_bytes, mutate_json

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "f32", "", "X9")
NUMBERS = (0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x00000001, 0x80000000, 0x6E6B2800)
"""NaN, infinities, the largest, the smallest, minus zero and 1.8e28, as bits of float32."""


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def make(case: Case) -> Callable[[], int | None]:
    data, _, config = golden(case)
    path = case.given / case.chance.choice(("model.safetensors",) * 8 + ("m\x1b[2J.safetensors", "m\n.safetensors"))
    path.write_bytes(damaged(case, data))
    options: dict[str, Any] = {} if case.chance.random() < 0.05 else {"config_file": config}
    return lambda: read(case, path, **options)


def damaged(case: Case, data: bytes) -> bytes:
    """A checkpoint that is hostile, or broken."""
    chance = case.chance
    header, values = parts(data)
    kind = chance.randrange(7)
    if kind == 0:
        return mutate_bytes(chance, data, data, head=len(data) - len(values))
    if kind == 1:
        return length_prefixed(mutate_json(chance, header)) + values
    if kind == 2:
        return length_prefixed(json.dumps(header).encode(), chance.choice(INTERESTING)) + values
    if kind == 3:
        for name in chance.sample(sorted(header.keys() - {"__metadata__"}), chance.choice((1, 1, 2, 5))):
            _change(case, header[name], len(values))
        return length_prefixed(json.dumps(header).encode()) + values
    if kind == 4:
        config = mutate_json(chance, {"num_heads": 4, "labels": ["a", "b"], "rho": 0.9, "norm_eps": 1e-5})
        header["__metadata__"] = {"config": config.decode("utf-8", "replace"), chance.choice(TEXTS[:-1]): "x"}
        text = json.dumps(header)
        return length_prefixed(text.encode("utf-8", "surrogatepass")) + values
    if kind == 5:
        changed = bytearray(values)
        for _ in range(chance.choice((1, 10, 1000))):
            at = chance.randrange(len(values) // 4) * 4
            changed[at : at + 4] = struct.pack("<I", chance.choice(NUMBERS))
        return length_prefixed(json.dumps(header).encode()) + bytes(changed)
    names = chance.sample(sorted(header.keys() - {"__metadata__"}), 2)
    if chance.random() < 0.5:
        header[chance.choice((*TEXTS[:12], names[1], names[0] + "\x1b[2J"))] = header.pop(names[0])
    else:
        header[names[0]], header[names[1]] = header[names[1]], header[names[0]]
    return length_prefixed(json.dumps(header).encode("utf-8", "surrogatepass")) + values


def _change(case: Case, entry: dict[str, Any], size: int) -> None:
    """A tensor's dtype, shape or place."""
    chance = case.chance
    kind = chance.randrange(4)
    if kind == 0:
        entry["dtype"] = chance.choice(DTYPES)
    elif kind == 1:
        shape = entry["shape"]
        extents = ([10**12], [10**6] * 2, [2**32, 2**32], [-1], [0], [], [1] * 100, [1, *shape], shape[::-1])
        entry["shape"] = chance.choice(extents)
    elif kind == 2:
        ends = (0, -1, size, size + 4, 10**12, 2**63, 2**64 - 1, chance.randrange(size))
        entry["data_offsets"] = [chance.choice(ends), chance.choice(ends)]
    else:  # all of it is consistent: many dimensions, or none of the data
        start = entry["data_offsets"][0]
        entry |= {"shape": [0, 10**12], "data_offsets": [start, start]}
