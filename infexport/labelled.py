"""Images whose class is known: a folder per class, or a CSV file that names it."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from infexport.errors import InfexportError
from infexport.images import SUFFIXES, find_images
from infexport.inputs import check_ordinary

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

    def find(self, name: str) -> list[int]:
        """Indices a name may mean: of the labels that are it, else of the number that it is. One, if all is well."""
        found = [index for index, label in enumerate(self.labels or ()) if label == name]
        if not found and name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < self.count:
            found = [int(name)]
        return found


@dataclass(frozen=True)
class Labelled:
    """An image, and the index of its class."""

    file: Path
    label: int


def read_labelled(path: Path, classes: Classes) -> list[Labelled]:
    """The images of a folder with a folder per class, or of a CSV file with columns `file` and `label`.

    A class is named by its label, or by its index where no label is that. Files of a CSV are relative to its folder and
    need not exist.

    Raises:
        InfexportError: there are no images, or what they are is not said or is no class.
    """
    if path.is_dir():
        return _of_folders(path, classes)
    if path.suffix.lower() != ".csv":
        raise InfexportError(
            f"no labelled images: {path}",
            "expected a folder with a folder of images per class, or a .csv file with columns file and label"
            + ("" if path.exists() else "; there is nothing of this name"),
        )
    return _of_csv(path, classes)


def _of_folders(path: Path, classes: Classes) -> list[Labelled]:
    visible = sorted(item for item in path.iterdir() if not item.name.startswith("."))
    folders = [item for item in visible if item.is_dir()]
    hint = "name every folder by its class's label or index, or give a .csv file with columns file and label"
    if not folders:
        raise InfexportError(f"no class folders in {path}", f"expected some of {_some(_names(classes))}", hint)
    strays = [item.name for item in visible if item.suffix.lower() in SUFFIXES and item not in folders]
    if strays:
        raise InfexportError(
            f"images that are in no class folder: {path}", _some(strays), "move them to a class's folder, or away"
        )
    labels = _indices(((folder.name, folder.name) for folder in folders), classes, f"folders in {path}", hint)
    return [
        Labelled(file, label) for folder, label in zip(folders, labels, strict=True) for file in find_images([folder])
    ]


def _of_csv(path: Path, classes: Classes) -> list[Labelled]:
    try:
        check_ordinary(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, restval="")
            header = list(reader.fieldnames or ())
            rows = [(reader.line_num, row.get("file", ""), row.get("label", "")) for row in reader]
    except OSError as error:
        raise InfexportError(f"cannot open {path}", error.strerror or str(error)) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InfexportError(f"not a CSV file that can be read: {path}", str(error), "save it as UTF-8") from error
    if missing := [name for name in COLUMNS if name not in header]:
        raise InfexportError(
            f"no column {' and no column '.join(missing)}: {path}",
            f"its first line has {', '.join(header) or 'nothing'}; expected names of columns: file and label",
        )
    if not rows:
        raise InfexportError(f"no images in {path}", "it has no lines but the first", "give it a line per image")
    if empty := [f"line {line}" for line, name, label in rows if not name or not label]:
        raise InfexportError(f"lines without a file or a label: {path}", _some(empty))
    counts = Counter(file for _, file, _ in rows)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise InfexportError(f"files that have more than one line: {path}", _some(twice), "keep one of each")
    named = ((f"{label} (line {line})", label) for line, _, label in rows)
    labels = _indices(named, classes, f"labels in {path}", "write a class's label or index in the column label")
    return [Labelled(path.parent / file, index) for (_, file, _), index in zip(rows, labels, strict=True)]


def _indices(named: Iterable[tuple[str, str]], classes: Classes, where: str, hint: str) -> list[int]:
    """Of the second of each; the first is how an error calls it."""
    found = [(told, classes.find(name)) for told, name in named]
    if wrong := [told for told, indices in found if not indices]:
        raise InfexportError(
            f"{where} that are no class of the bundle", f"{_some(wrong)}\nits classes: {_some(_names(classes))}", hint
        )
    if vague := [f"{told}: {' or '.join(map(str, indices))}" for told, indices in found if len(indices) > 1]:
        raise InfexportError(f"{where} that name more than one class", _some(vague), "name the class by its index")
    return [indices[0] for _, indices in found]


def _names(classes: Classes) -> list[str]:
    return [classes.name(index) for index in range(classes.count)]


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
