"""Check of a PyTorch file before it is loaded.

This is a second safeguard. `torch.load(weights_only=True)` runs no code of a file either, but it accepts contents that
checkpoints do not need, and small files that expand to large objects.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import IO

import torch

LIMIT = 10_000_000
"""Objects in one object, each counted at every use. A state dict of a thousand tensors has 20,000."""
_LEGACY = 5
"""Pickles at the start of a file that is no archive: magic number, protocol, system, objects, keys of the storages."""
_CODE = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
"""Opcodes of other protocols than torch.save's that name or make objects; torch.load knows none of them."""
_NAMES = re.compile(
    r"collections\.OrderedDict|torch\.Size|torch\.device|torch\.nn\.parameter\.Parameter"
    r"|torch\._(utils|tensor)\._rebuild_(?!wrapper)\w+|torch\.(cuda\.)?\w+Storage|torch\.serialization\._get_layout"
    r"|collections\.Counter|(__builtin__|builtins)\.(set|complex)"  # in what is kept of an optimiser's schedule
)
"""Names that rebuild tensors and containers; none is a constructor that allocates as much as a number asks for."""
_TYPES = ("torch.Tensor", "torch.storage.TypedStorage", "torch.storage.UntypedStorage")
"""Types that may be passed on but not called: called, they allocate as many numbers as requested."""
_ZIP = b"PK\x03\x04"
"""First bytes by which alone torch.load recognises an archive."""


class Refused(Exception):
    """A name that a file may not use."""


def check(path: Path) -> None:
    """Check the archive and pickles of a `.pt`, `.pth` or `.bin` file without creating their objects.

    Raises:
        Refused: it names something else than what tensors and containers need; its text is that name.
        ValueError: it is damaged, or unpacks to more than it is.
    """
    with path.open("rb") as file:
        archived = file.read(len(_ZIP)) == _ZIP
        file.seek(0)
        if not archived:
            for _ in range(_LEGACY):
                _check_pickle(file)
            return
        with zipfile.ZipFile(file) as archive:
            _check_archive(archive, file)
        # what torch itself finds: it is read by other rules than Python's
        file.seek(0)
        reader = torch._C.PyTorchFileReader(file)
        _check_pickle(io.BytesIO(reader.get_record("data.pkl")))


def _check_archive(archive: zipfile.ZipFile, file: IO[bytes]) -> None:
    """Check that an archive is laid out as torch.save writes it.

    Nothing is compressed, so nothing grows when unpacked. No name occurs twice, and nothing comes before or after the
    archive, so there is only one way to read it.
    """
    entries = archive.infolist()
    if any("/code/" in entry.filename for entry in entries):
        raise ValueError("it is a TorchScript archive, which is a program; expected what torch.save writes")
    names = {entry.filename.lower() for entry in entries}  # as torch compares them
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or len(names) < len(entries):
        raise ValueError("its archive is compressed or has a name twice, which torch.save's never is or has")
    size = os.fstat(file.fileno()).st_size
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its archive unpacks to more bytes than it has")
    if archive.comment or _count_directories(file, size) != {archive.start_dir}:
        raise ValueError("its archive's directory is not where it says, or something lies before or behind it")


def _count_directories(file: IO[bytes], size: int) -> set[int]:
    """Return the starts of the directory stated in an archive's last records (APPNOTE.TXT 4.3.14 to 4.3.16)."""
    file.seek(max(0, size - 42))
    last = file.read(42)
    found = {int(struct.unpack_from("<I", last, len(last) - 6)[0])} - {0xFFFFFFFF}
    if last.startswith(b"PK\x06\x07"):  # of a large archive, or of one of any size that torch has written
        file.seek(struct.unpack_from("<Q", last, 8)[0])
        found.add(int(struct.unpack_from("<Q", file.read(56), 48)[0]))
    return found


class _Uncalled(int):
    """The size of what must not be called."""


def _check_pickle(file: IO[bytes]) -> None:
    """Run a pickle's opcodes on the sizes of the objects that they would create."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in _CODE:
            raise ValueError(f"its pickle is of another protocol than torch.save's: it has {name}")
        if name == "GLOBAL" and (what := str(argument).replace(" ", ".")) in _TYPES:
            stack.append(_Uncalled(1))
        elif name == "GLOBAL":
            _check_global(what)
            stack.append(1)
        elif name == "MARK":
            marks.append(len(stack))
        elif "PUT" in name:
            memo[int(argument or 0)] = stack[-1]
        elif "GET" in name:
            stack.append(memo[int(argument or 0)])
        else:
            # all that came after a mark, and so many objects
            before = opcode.stack_before
            marked = pickletools.markobject in before
            at = (marks.pop() if marked else len(stack)) - len(before) + 2 * marked
            taken = sum(stack[at:])
            if at < 0 or taken > LIMIT:
                raise ValueError("its pickle takes what is not there, or makes more objects than it has")
            # what is called comes before its arguments; what torch is to call, first of them
            if isinstance(next(iter(stack[at:]), None), _Uncalled):
                raise Refused(" or ".join(_TYPES))
            del stack[at:]
            stack += [1 + taken] * len(opcode.stack_after)


def _check_global(name: str) -> None:
    if _NAMES.fullmatch(name):
        return
    module, _, constant = name.rpartition(".")
    if module != "torch" or not isinstance(vars(torch).get(constant), torch.dtype | torch.qscheme):
        raise Refused(name)
