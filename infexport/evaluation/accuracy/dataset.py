"""Images whose class is known: a folder per class, or a CSV file that names it."""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infexport.errors import InfexportError
from infexport.images.decode import SUFFIXES, find_images
from infexport.system.untrusted_files import check_ordinary

COLUMNS = ("file", "label")
SHOWN = 20
"""Names in an error; of ImageNet's classes nobody reads a thousand."""


@dataclass(frozen=True)
class Classes:
    """The classes of a network.

    Attributes:
        count: how many.
        labels: their names, or None where none were given.
    """

    count: int
    labels: Sequence[str] | None

    def name(self, index: int) -> str:
        return self.labels[index] if self.labels else str(index)

    def by_label(self, name: str) -> list[int]:
        """Return the indices of all classes with this label."""
        return [index for index, label in enumerate(self.labels or ()) if label == name]

    def by_index(self, name: str) -> list[int]:
        """Return the index that a name spells; nothing where it is no number or there is no such class."""
        number = name.isascii() and name.isdecimal() and len(name) < 10
        return [int(name)] if number and int(name) < self.count else []


@dataclass(frozen=True)
class Labelled:
    """An image, and the index of its class."""

    file: Path
    label: int


def read_labelled(path: Path, classes: Classes) -> list[Labelled]:
    """The images of a folder with a folder per class, or of a CSV file with columns `file` and `label`.

    All classes are named in one way: by their labels or, where some name is no label, by their indices. Files of a CSV
    are relative to its folder and need not exist.

    Raises:
        InfexportError: there are no images, or what they are is not said or is no class.
    """
    with _errors(path):
        is_folder = path.is_dir()
    if is_folder:
        return _of_folders(path, classes)
    if path.suffix.lower() != ".csv":
        raise InfexportError(
            f"no labelled images: {path}",
            "expected a folder with a folder of images per class, or a .csv file with columns file and label"
            + ("" if path.exists() else "; there is nothing of this name"),
        )
    return _of_csv(path, classes)


def _of_folders(path: Path, classes: Classes) -> list[Labelled]:
    folders, strays = _visible(path)
    hint = "name every folder by its class's label or index, or give a .csv file with columns file and label"
    if not folders:
        raise InfexportError(f"no class folders in {path}", f"expected some of {_some(_names(classes))}", hint)
    if strays:
        raise InfexportError(
            f"images that are in no class folder: {path}", _some(strays), "move them to a class's folder, or away"
        )
    names = [folder.name for folder in folders]
    labels = _indices(names, names, classes, f"folders in {path}", hint)
    for what, keys in (("that are one class", labels), ("that are one folder", [*map(os.path.realpath, folders)])):
        if shared := _shared(names, keys):
            raise InfexportError(f"folders {what}: {path}", _some(shared), "keep one folder of every class")
    return [
        Labelled(file, label) for folder, label in zip(folders, labels, strict=True) for file in find_images([folder])
    ]


def _visible(path: Path) -> tuple[list[Path], list[str]]:
    """The visible folders in a folder, and the names of what is called an image and is none of them.

    Raises:
        InfexportError: it cannot be looked into, or something in it is a link that leads nowhere, to a folder perhaps.
    """
    folders, strays = [], []
    with _errors(path):
        for item in sorted(path.iterdir()):
            if item.name.startswith("."):
                continue
            if item.suffix.lower() in SUFFIXES and not item.is_dir():
                strays.append(item.name)
            elif stat.S_ISDIR(item.stat().st_mode):
                folders.append(item)
    return folders, strays


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn what the system says of a file or folder into our error."""
    try:
        yield
    except OSError as error:
        at = os.fsdecode(error.filename) if error.filename else ""
        inside = f": {at}" if at not in ("", str(path)) else ""
        hint = "check that it is there and that you may read it; a link must lead somewhere"
        raise InfexportError(f"cannot open {path}", f"{error.strerror or error}{inside}", hint) from error


def _of_csv(path: Path, classes: Classes) -> list[Labelled]:
    try:
        with _errors(path):
            check_ordinary(path)
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, skipinitialspace=True, restval="")
                header = list(reader.fieldnames or ())
                rows = [(reader.line_num, row.get("file", ""), row.get("label", ""), None in row) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InfexportError(f"not a CSV file that can be read: {path}", str(error), "save it as UTF-8") from error
    if missing := [name for name in COLUMNS if name not in header]:
        raise InfexportError(
            f"no column {' and no column '.join(missing)}: {path}",
            f"its first line has {', '.join(header) or 'nothing'}; expected names of columns: file and label",
        )
    if twice := [name for name in COLUMNS if header.count(name) > 1]:
        raise InfexportError(
            f"more than one column {' and more than one column '.join(twice)}: {path}",
            f"its first line has {', '.join(header)}",
            "keep one of each, or give the others another name",
        )
    if not rows:
        raise InfexportError(f"no images in {path}", "it has no lines but the first", "give it a line per image")
    if empty := [f"line {line}" for line, name, label, _ in rows if not name or not label]:
        raise InfexportError(f"lines without a file or a label: {path}", _some(empty))
    if longer := [f"line {line}" for line, _, _, more in rows if more]:
        hint = "quote a value that has a comma in it"
        raise InfexportError(f"lines with more values than there are columns: {path}", _some(longer), hint)
    if odd := [f"line {line}" for line, name, _, _ in rows if "\0" in name]:
        raise InfexportError(f"files whose name has a NUL character: {path}", _some(odd))
    told = [f"{name} (line {line})" for line, name, _, _ in rows]
    # one file may be written in several ways, such as a.png and ./a.png
    if several := _shared(told, [os.path.realpath(path.parent / name) for _, name, _, _ in rows]):
        raise InfexportError(f"files that have more than one line: {path}", _some(several), "keep one of each")
    hint = "write a class's label or index in the column label"
    told, labels = [f"{label} (line {line})" for line, _, label, _ in rows], [label for _, _, label, _ in rows]
    found = _indices(told, labels, classes, f"labels in {path}", hint)
    return [Labelled(path.parent / name, index) for (_, name, _, _), index in zip(rows, found, strict=True)]


def _indices(told: Sequence[str], names: Sequence[str], classes: Classes, where: str, hint: str) -> list[int]:
    """Class indices of names, all read as labels or all as indices; `told` is how an error calls each."""
    by_label, by_index = ({name: read(name) for name in set(names)} for read in (classes.by_label, classes.by_index))
    labels, numbers = ([found[name] for name in names] for found in (by_label, by_index))
    if all(labels):
        if vague := [
            f"{each}: {' or '.join(map(str, found))}" for each, found in zip(told, labels, strict=True) if found[1:]
        ]:
            hint = "name every class by its index"
            raise InfexportError(f"{where} that name more than one class", _some(vague), hint)
        return [found[0] for found in labels]
    both = list(zip(told, labels, numbers, strict=True))
    if wrong := [each for each, label, number in both if not label and not number]:
        raise InfexportError(
            f"{where} that are no class of the bundle", f"{_some(wrong)}\nits classes: {_some(_names(classes))}", hint
        )
    # with indices beside it, a label is no index, unless it says the same
    if mixed := [each for each, label, number in both if label and label != number]:
        indices = [f"{each} is class {number[0]}" for each, label, number in both if not label]
        read = [f"{each} is class {' or '.join(map(str, label))}" for each, label, _ in both if label and each in mixed]
        raise InfexportError(
            f"{where} that are labels beside others that are indices",
            f"as labels: {_some(read)}\nas indices: {_some(indices)}",
            "name all classes by their labels, or all by their indices",
        )
    return [number[0] for number in numbers]


def _shared(told: Sequence[str], keys: Sequence[int | str]) -> list[str]:
    """Names whose key others have, too: `3 and 03`."""
    groups: dict[int | str, list[str]] = {}
    for each, key in zip(told, keys, strict=True):
        groups.setdefault(key, []).append(each)
    return [" and ".join(group) for group in groups.values() if len(group) > 1]


def _names(classes: Classes) -> list[str]:
    return [classes.name(index) for index in range(classes.count)]


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
