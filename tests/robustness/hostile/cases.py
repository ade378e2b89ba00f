"""One case: brought to its door, watched, and judged."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from click.testing import CliRunner

from hostile.seeds import Seeds
from hostile.watch import PROGRAMS, Hang, Memory, Place, Violation, limited, watched
from infexport.cli import cli
from infexport.errors import InfexportError

T = TypeVar("T")
SECONDS, BYTES = 30.0, 2**30
PIXELS = 2**22
"""Of an image, at most: what INFEXPORT_MAX_PIXELS is set to."""
# what a terminal obeys: C0 but for new lines and tabs, C1, and what turns the direction of writing
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
STYLED = re.compile("\x1b\\[3[136]m\x1b\\[1m(warning|error|hint): \x1b\\[0m")


@dataclass(frozen=True)
class Name:
    """Of a case: all that decides it."""

    seed: int
    door: str
    index: int

    def __str__(self) -> str:
        return f"{self.door}:{self.index}"


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        end: `succeeded`, `refused` or `violated`.
        kind, text: of the violation.
        seconds, grown: what it took, and bytes of memory.
    """

    end: str
    kind: str = ""
    text: str = ""
    seconds: float = 0.0
    grown: int = 0


class Case:
    """What a door works with.

    Attributes:
        chance: decides all of it.
        given: folder for what the tool is given.
        made: folder that the tool may write in.
        seeds: whole files, to be damaged.
        programs: that the tool may start.
    """

    def __init__(self, name: Name, place: Place, seeds: Seeds, loud: bool = False) -> None:
        self.name, self.place, self.seeds, self._loud = name, place, seeds, loud
        self.chance = random.Random(f"{name.seed}/{name.door}/{name.index}")
        self.given, self.made = place.given, place.made
        self.programs: tuple[str, ...] = PROGRAMS

    def cli(self, *arguments: Any) -> int:
        """The command's exit code; what it prints is judged.

        Raises:
            Violation: a traceback, a message that is none, or that a terminal would obey.
        """
        texts = [os.fsdecode(part) if isinstance(part, Path) else str(part) for part in arguments]
        # with colour, click leaves in what a terminal obeys
        result = CliRunner().invoke(cli, texts, color=True)
        code, out, err = result.exit_code, result.stdout_bytes.decode("utf-8", "replace"), result.stderr
        if self._loud:
            print(f"infexport {' '.join(map(repr, texts))}\nexit code {code}\n{out}\n{err}")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        told = f"infexport {' '.join(texts)}"[:400]
        if code not in (0, 1, 2):
            raise Violation("exit code", f"{code}: {told}")
        if "Traceback (most recent" in err or "Traceback (most recent" in out:
            raise Violation("traceback", f"printed: {told}")
        err = STYLED.sub(r"\1: ", err)
        if code == 2:
            ours = re.findall("^error: (.*)$", err, re.MULTILINE)
            usage = re.findall("^Error: (.*)$", err, re.MULTILINE)
            if len(ours + usage) != 1 or not (ours + usage)[0].strip():
                raise Violation("message", f"{len(ours + usage)} errors: {told}\n{err[:400]!r}")
        as_json = "--json" in texts and code < 2 and "--help" not in texts and "-h" not in texts
        for where, text in (("stderr", err), ("stdout", "" if as_json else out)):
            if found := OBEYED.search(text):
                raise Violation("terminal", f"{where}: {text[max(0, found.start() - 60) : found.end() + 60]!r}")
        if as_json:
            _parsed("stdout", lambda: json.loads(out, parse_constant=_no_constant))
        for path in (self.made / text for text in texts if text.startswith(str(self.made))):
            if os.path.isfile(path) and code < 2:  # noqa: PTH113  a name may be too long to ask for
                _parsed(path.name, lambda path=path: _READERS.get(path.suffix, lambda path: None)(path))
        return code

    def reads(self, function: Callable[[], T]) -> T:
        """What a reader gives; whatever but its own error is a violation."""
        found = function()
        if self._loud:
            print(f"{found!r:.500}")
        return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _parsed(name: str, read: Callable[[], object]) -> None:
    try:
        read()
    except (ValueError, csv.Error) as error:
        raise Violation("output", f"{name} cannot be parsed: {error}") from error


def _read_npz(path: Path) -> None:
    import numpy as np

    with np.load(path) as arrays:
        for name in arrays.files:
            _ = arrays[name]


_READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".csv": lambda path: list(csv.reader(io.StringIO(path.read_bytes().decode(), newline=""))),
    ".npz": _read_npz,
}


def run_case(
    name: Name,
    folder: Path,
    seeds: Seeds,
    door: Callable[[Case], Callable[[], int | None]],
    seconds: float = SECONDS,
    most: int = BYTES,
    loud: bool = False,
) -> Outcome:
    """One case, in this process, in a new folder, which is left for who wants to look.

    Args:
        name: of the case.
        folder: made for it.
        seeds: whole files.
        door: makes the input, and gives what brings it to the tool: an exit code, or None where all was well.
        seconds, most: what it may take of time, and of memory in bytes.
        loud: print what the tool prints.
    """
    place = Place(folder)
    case = Case(name, place, seeds, loud)
    found: list[Violation] = []
    started, end = time.monotonic(), "succeeded"
    with place.entered():
        os.environ["INFEXPORT_MAX_PIXELS"] = str(PIXELS)
        try:
            act = door(case)
        except Exception as error:  # ours: the tool has not been asked yet
            return Outcome("violated", "fuzzer", _short(error))
        memory = Memory()
        with watched(place, case.programs) as watch:
            started = time.monotonic()
            try:
                with limited(seconds):
                    end = "refused" if act() else "succeeded"
            except InfexportError:
                end = "refused"
            except Violation as violation:
                found.append(violation)
            except Hang:
                found.append(Violation("hang", f"more than {seconds:g} s"))
            except Exception as error:
                found.append(Violation("traceback", _short(error)))
                if loud:
                    traceback.print_exc()
            took, grown = time.monotonic() - started, memory.grown
        found += watch.seen
    if grown > most:
        found.append(Violation("memory", f"{grown / 2**20:.0f} MiB more"))
    if found:
        return Outcome("violated", found[0].kind, "; ".join(each.text for each in found[:4])[:2000], took, grown)
    return Outcome(end, seconds=took, grown=grown)


def _short(error: Exception) -> str:
    """The error, and where in our own files it came through last."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(ours[-3:]))
    return f"{type(error).__name__}: {str(error)[:300]} ({where})"


def delete(folder: Path) -> None:
    """A case's folder, whatever is in it."""
    with contextlib.suppress(OSError):
        shutil.rmtree(folder)
