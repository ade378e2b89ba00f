"""Order of the inputs in a report, and their names."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from infexport.evaluation.parity.result import Case


def worst_first(cases: Sequence[Case]) -> list[Case]:
    """Return the failed cases, then the others, each by its error."""
    return sorted(cases, key=lambda case: (bool(case), -case_error(case)))


def case_error(case: Case) -> float:
    """Relative; infinite where it is not a number."""
    return case.bundle.relative if math.isfinite(case.bundle.relative) else math.inf


def short_names(cases: Sequence[Case]) -> dict[str, str]:
    """A case's name → a shorter one: of files, without the folder that all of them are in."""
    files = [case.file for case in cases if case.file is not None]
    folder = os.path.commonpath([file.parent for file in files]) if files else ""
    return {case.name: case.name if case.file is None else _within(case.file, folder) for case in cases}


def _within(file: Path, folder: str) -> str:
    return str(file.relative_to(folder)) if folder else str(file)
