"""Standard streams of a command: always there, and never the reason why its work fails."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from typing import IO, Any


class Descriptor(io.FileIO):
    """A descriptor to write to. The first error is kept, not raised, and what follows is dropped.

    Attributes:
        error: of the first write that failed, or None.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        while self.error is None:
            try:
                written = super().write(data)
            except OSError as error:
                self.error = error
            else:
                if written is not None:
                    return written
                select.select([], [self], [])  # somebody has set it not to wait
        return size


class Text(io.TextIOWrapper):
    """Text in an encoding; characters that it lacks are written as their numbers.

    Attributes:
        descriptor: below it.
        has_all: whether the encoding has all characters.
    """

    def __init__(self, number: int, old: IO[str] | None) -> None:
        self.descriptor = Descriptor(number)
        self._charset = getattr(old, "encoding", None) or "utf-8"
        ascii_only = codecs.lookup(self._charset).name == "ascii"
        super().__init__(
            io.BufferedWriter(self.descriptor),
            # click would write UTF-8 to a stream that says it is ASCII, which is a part of UTF-8
            encoding="utf-8" if ascii_only else self._charset,
            errors="backslashreplace",
            line_buffering=getattr(old, "line_buffering", True),
            write_through=getattr(old, "write_through", False),
        )
        self._ascii_only = ascii_only
        self.has_all = not ascii_only and codecs.lookup(self._charset).name.startswith("utf")

    def write(self, text: str) -> int:
        if self._ascii_only:
            super().write(text.encode("ascii", "backslashreplace").decode("ascii"))
            return len(text)
        return super().write(text)


def open_streams() -> None:
    """Put streams that cannot fail in the place of stdout and stderr; those that are closed lead nowhere.

    Without this, the next file that is opened would take the number of one that is closed, and its text.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = Text(1, sys.stdout), Text(2, sys.stderr)


def stdout_error() -> OSError | None:
    """The reason why stdout does not have all that was written to it; None where it has."""
    if not isinstance(sys.stdout, Text):
        return None
    sys.stdout.flush()
    return sys.stdout.descriptor.error
