"""Checkpoints that torch saved: zip archives of a pickle and tensors, and what came before them."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from hostile.cases import Case
from hostile.doors.reading import golden, read
from hostile.mutate import TEXTS, mutate_bytes
from hostile.watch import CANARY

Archive = list[tuple[str, bytes]]


class Payload:
    """Code that runs when this is unpickled by a reader that runs code."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def payload(case: Case) -> Payload:
    canary = str(case.place.root / CANARY)
    return case.chance.choice(
        (
            Payload(os.system, f"touch {canary}"),
            Payload(builtins.open, canary, "w"),
            Payload(builtins.exec, f"open({canary!r}, 'w')"),
            Payload(builtins.eval, f"open({canary!r}, 'w')"),
            Payload(__import__, "os"),
            Payload(Path.touch, Path(canary)),
            Payload(torch.load, canary),
            Payload(torch.hub.load, "a/b", "c"),
            Payload(torch.zeros, 10**7),
            Payload(bytearray, 2**33),
        )
    )


def make(case: Case) -> Callable[[], int | None]:
    chance = case.chance
    data, config, file = golden(case)
    tensors: Any = OrderedDict(load(data))
    options: dict[str, Any] = {"config_file": file}
    kind = chance.randrange(8)
    if kind == 0:
        content = saved(_planted(case, tensors))
    elif kind == 1:
        content = saved(_strange(case, tensors, config))
    elif kind == 2:
        content = saved(tensors, legacy=True)
        content = mutate_bytes(chance, content, content, head=3000)
    elif kind in (3, 4):
        content = zipped(_edited(case, entries(saved(_wrapped(case, tensors, config)))))
    elif kind == 5:
        content = mutate_bytes(chance, saved(tensors), head=chance.choice((0, 4000)))
    elif kind == 6:
        content = _odd_archive(case, tensors)
    else:
        content = saved(_wrapped(case, tensors, config))
        content = content[: chance.randrange(len(content))] if chance.random() < 0.5 else content
    path = case.given / f"model{chance.choice(('.pt', '.pth', '.bin'))}"
    path.write_bytes(content)
    return lambda: read(case, path, **options)


def saved(content: Any, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def entries(content: bytes) -> Archive:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def zipped(archive: Archive, deflated: Callable[[str], bool] = lambda name: False) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in archive:
            made.writestr(name, content, zipfile.ZIP_DEFLATED if deflated(name) else zipfile.ZIP_STORED)
    return file.getvalue()


def _planted(case: Case, tensors: Any) -> Any:
    chance, hostile = case.chance, payload(case)
    name = chance.choice(list(tensors))
    kind = chance.randrange(6)
    if kind == 0:
        tensors[name] = hostile
    elif kind == 1:
        return {"model": tensors, "config": {"num_heads": hostile}}
    elif kind == 2:
        return {"model": tensors, "optimizer": [hostile]}
    elif kind == 3:
        tensors._metadata = {"": hostile}
    elif kind == 4:
        return hostile
    else:
        return {(hostile,) if chance.random() < 0.5 else "model": tensors, "args": hostile}
    return tensors


def _strange(case: Case, tensors: Any, config: dict[str, Any]) -> Any:
    """Tensors and settings that are none of an ordinary checkpoint."""
    chance = case.chance
    name = chance.choice(list(tensors))
    like = tensors[name]
    shared: Any = ["x"]
    for _ in range(chance.choice((5, 60))):
        shared = [shared, shared]
    cyclic: dict[str, Any] = {}
    cyclic["self"] = cyclic
    deep: Any = 1
    for _ in range(150):
        deep = [deep]
    if chance.random() < 0.4:
        value = chance.choice((shared, cyclic, deep, torch.ones(3), {1: 2, None: 3}, b"\xff", 1j, *TEXTS))
        return {"model": tensors, "config": chance.choice((config | {"labels": value}, value))}
    views = (
        torch.zeros(1).expand(10**6, 10**6),
        torch.zeros(1).expand(10**10, like.shape[-1] if like.dim() else 1),
        torch.zeros(()).expand(like.shape),
        torch.zeros(4).as_strided((2, 2), (0, 0)),
    )
    others = (
        like.to_sparse(),
        like.to(torch.complex64),
        like > 0,
        like.to("meta"),
        torch.quantize_per_tensor(like, 0.1, 0, torch.qint8),
        torch.nn.Parameter(like),
        torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        like.to(torch.float8_e4m3fn),
        like * float("nan"),
        like * 1e38,
        like.double() * 1e300,
        like[..., :0] if like.dim() else like,
        like.storage() if hasattr(like, "storage") else like,
        3,
        None,
    )
    tensors[name] = chance.choice(views if chance.random() < 0.5 else others)
    return tensors


def _wrapped(case: Case, tensors: Any, config: dict[str, Any]) -> Any:
    key = case.chance.choice(("model", "state_dict", "model_state", None))
    return tensors if key is None else {key: tensors, "config": config, "epoch": 3}


def _edited(case: Case, archive: Archive) -> Archive:
    """The pickle, or names and contents of entries, changed."""
    chance = case.chance
    names = [name for name, _ in archive]
    at = next(i for i, name in enumerate(names) if name.endswith("data.pkl"))
    content = archive[at][1]
    kind = chance.randrange(5)
    if kind == 0:
        content = mutate_bytes(chance, content, content)
    elif kind == 1:  # a number of the pickle: of a shape, a stride, an offset, a size
        places = [i for i, byte in enumerate(content[:-5]) if byte in (0x4B, 0x4D, 0x4A)]
        i = chance.choice(places)
        width = {0x4B: 1, 0x4D: 2, 0x4A: 4}[content[i]]
        number = chance.choice((0, -1, 10**12, 2**31 - 1, 2**62, 3))
        content = content[:i] + b"\x8a\x08" + struct.pack("<q", number) + content[i + 1 + width :]
    elif kind == 2:
        old = chance.choice((b"torch._utils\n_rebuild_tensor_v2\n", b"collections\nOrderedDict\n"))
        modules = (b"os\nsystem\n", b"builtins\neval\n", b"torch\nload\n", b"torch.hub\nload\n", b"posix\nsystem\n")
        content = content.replace(old, b"c"[:0] + chance.choice(modules))
    elif kind == 3:  # opcodes that take much memory for few bytes
        bomb = pickle.dumps("x" * 100)[:-1] + b"0"
        content = (
            content[:2] + chance.choice((b"(" * 10**5, b"]" * 10**5, bomb * 1000, b"\x8e" + b"\xff" * 8)) + content[2:]
        )
    archive[at] = names[at], content
    if kind == 4 or chance.random() < 0.1:
        i = chance.randrange(len(archive))
        name = chance.choice((f"../{names[i]}", f"/{names[i]}", names[0], "model/data/999", f"{names[i]}\0x"))
        archive[i] = (name, archive[i][1]) if chance.random() < 0.5 else (names[i], archive[i][1][:3])
    return archive


def _odd_archive(case: Case, tensors: Any) -> bytes:
    chance = case.chance
    archive = entries(saved(tensors))
    kind = chance.randrange(5)
    if kind == 0:
        return zipped(archive, deflated=lambda name: chance.random() < 0.5)
    if kind == 1:  # one entry that is 1.5 GiB of zeros when it is unpacked
        return _bomb(case, archive)
    if kind == 2:  # two names of the same bytes
        content = bytearray(zipped(archive))
        places = [i for i in range(len(content) - 46) if content[i : i + 4] == b"PK\x01\x02"]
        first, second = chance.sample(places, 2)
        content[second + 20 : second + 28] = content[first + 20 : first + 28]
        content[second + 42 : second + 46] = content[first + 42 : first + 46]
        return bytes(content)
    if kind == 3:
        content = bytearray(zipped(archive))
        i = content.rfind(b"PK\x01\x02")
        at = i + chance.choice((8, 10, 16, 20, 24, 28, 30, 32, 42))
        content[at : at + 4] = struct.pack("<I", chance.choice((0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFFF)))
        return bytes(content)
    return zipped([*archive, *(archive * 3), (archive[0][0].split("/")[0] + "/constants.pkl", archive[0][1])])


def _bomb(case: Case, archive: Archive) -> bytes:
    def packed() -> bytes:
        packer, block = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(2**20)
        return b"".join(packer.compress(block) for _ in range(1536)) + packer.flush()

    names = [name for name, _ in archive]
    which = case.chance.choice([name for name in names if "data" in name])
    deflated = case.seeds.once("bomb", packed)
    content = bytearray(zipped([(name, deflated if name == which else value) for name, value in archive]))
    for mark, method, size in ((b"PK\x03\x04", 8, 22), (b"PK\x01\x02", 10, 24)):
        at = content.find(mark)
        while at >= 0:
            name_at = at + (30 if mark == b"PK\x03\x04" else 46)
            if content[name_at : name_at + len(which)] == which.encode():
                content[at + method : at + method + 2] = struct.pack("<H", 8)
                content[at + size : at + size + 4] = struct.pack("<I", 1536 * 2**20)
            at = content.find(mark, at + 4)
    return bytes(content)
