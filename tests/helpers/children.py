"""Processes that the tests have started."""

from __future__ import annotations

import os
from pathlib import Path


def descendants() -> dict[int, str]:
    """Processes that this one started, and those they started: number → command line."""
    found: dict[int, str] = {}
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after = (folder / "stat").read_text().rpartition(")")[2].split()
            found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended meanwhile
        parents[int(folder.name)] = int(after[1])

    def ours(process: int) -> bool:
        while process in parents:
            process = parents[process]
            if process == os.getpid():
                return True
        return False

    return {process: command for process, command in found.items() if ours(process)}
