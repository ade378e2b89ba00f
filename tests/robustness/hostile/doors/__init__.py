"""The doors: each makes an input, and gives what brings it to the tool."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from hostile.cases import Case

Door = Callable[[Case], Callable[[], int | None]]
NAMES = (
    "safetensors",
    "pth",
    "folder",
    "config",
    "labels",
    "manifest",
    "graph",
    "sidecar",
    "images",
    "scratch",
    "options",
    "python",
    "outputs",
)


def door(name: str) -> Door:
    found: Door = importlib.import_module(f"hostile.doors.{name}").make
    return found
