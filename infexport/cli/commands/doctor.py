"""`infexport doctor`."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING

import click

from infexport.cli.console import Output

if TYPE_CHECKING:
    from infexport.doctor.check import Check

COLOURS = {"yes": "green", "no": "yellow", "broken": "red"}
WIDEST = 120


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, for a bug report.")
def doctor(as_json: bool) -> None:
    """Show what works on this machine and what is missing.

    Everything is tested: providers run a graph, builders are created, packages are imported. A missing item comes with
    the command that installs it.

    Always exits with 0: a missing feature is not an error.
    """
    from infexport.doctor import examine, report

    out = Output(as_json)
    if as_json:
        out.document(report())
        return
    checks = examine()
    names = max(len(check.name) for check in checks)
    width = min(WIDEST, shutil.get_terminal_size((100, 24)).columns)
    group = ""
    for check in checks:
        if check.group != group:
            if group:
                out.data("")
            out.data(check.group, bold=True)
            group = check.group
        first, *lines = _lines(check, names, width)
        out.data(first, word=check.state, fg=COLOURS[check.state])
        for line in lines:
            out.data(line, **({"fg": "cyan"} if line.lstrip().startswith("$ ") else {}))
    out.data("")
    out.data(_summary(checks))


def _lines(check: Check, names: int, width: int) -> list[str]:
    """Return the lines of a check; commands are never wrapped, so that they can be copied."""
    head = f"  {check.state.ljust(6)}  {check.name.ljust(names)}  "
    indent = " " * len(head)
    lines = _wrapped(check.found, indent, width)
    lines[0] = head + lines[0][len(head) :]
    if check.ok:
        return lines
    if check.advice:
        lines += _wrapped(check.advice, indent, width)
    if check.remedy:
        lines.append(f"{indent}$ {check.remedy}")
    return lines


def _wrapped(text: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        max(width, len(indent) + 30),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [indent]


def _summary(checks: list[Check]) -> str:
    count = {state: sum(check.state == state for check in checks) for state in COLOURS}
    text = f"{count['yes']} of {len(checks)} work, {count['no']} are not here, {count['broken']} are broken"
    return f"{text}; for a report of a bug: infexport doctor --json"
