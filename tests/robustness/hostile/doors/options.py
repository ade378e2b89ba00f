"""Every command and every option of it, with values that nobody means.

Sizes are tiny or absurd: what a large but honest size asks for is real work. `--ray` starts a cluster, and is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from hostile.cases import Case
from hostile.doors.images import NAMES
from hostile.mutate import CONTROLS, TEXTS
from hostile.seeds import GOLDEN, ZOO
from hostile.watch import PROGRAMS
from infexport.cli import cli

NUMBERS = (
    "0", "1", "-1", "2", "3", "1e3", "0.5", "nan", "inf", "-inf", "1e-300", "9" * 30, "٣", "", " 1", "0x10", "1_0",
)  # fmt: skip
SIZES = ("8", "32", "1", "0", "-8", "8x16", "32,,8", "9" * 12, "1000000000x8", "x", "8x", "8x8x8", "native", "trained")
SKIPPED = ("--ray", "--shard-image", "--workers", "--help")
SLOW = ("benchmark", "convert", "build-engine", "doctor")
"""Commands whose honest work takes seconds: they are given something wrong."""


def commands(command: Any = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All that can be called, with how."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))
    else:
        yield path, command


def make(case: Case) -> Callable[[], int | None]:
    chance = case.chance
    path, command = chance.choice(case.seeds.once("commands", lambda: list(commands())))
    case.programs = (*PROGRAMS, Path(sys.executable).name)
    words: list[str] = []
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            if parameter.opts[0] in SKIPPED or not (parameter.required or chance.random() < 2.5 / len(command.params)):
                continue
            words.append(chance.choice(parameter.opts))
            if parameter.is_flag:
                continue
            values = [_value(case, parameter) for _ in range(parameter.nargs)]
            words[-1:] = (
                [f"{words[-1]}={values[0]}"]
                if words[-1].startswith("--") and len(values) == 1 and chance.random() < 0.3
                else [words[-1], *values]
            )
        elif chance.random() < 0.95:
            count = 1 if parameter.nargs != -1 else chance.choice((0, 1, 1, 2))
            words += [_argument(case, str(parameter.name)) for _ in range(count)]
    if path[0] in SLOW:
        words += ["one", "too", "many"]  # which click finds last, when it has looked at all values
    if chance.random() < 0.15:
        words.insert(
            chance.choice((0, len(words))), chance.choice((*TEXTS[:-1], "--", "-h", "--json", "--json=1", "-"))
        )
    # what the system can hand over has neither of these
    words = [word.replace("\0", "").replace("\ud800", "") for word in words]
    words = [word for word in words if word not in SKIPPED[:3]]
    return lambda: case.cli(*path, *words)


def _argument(case: Case, name: str) -> str:
    chance = case.chance
    honest: dict[str, tuple[Any, ...]] = {
        "bundle": (_bundle(case),) * 6,
        "images": (*case.seeds.digits[:2], case.seeds.image, "http://127.0.0.1:1/x.png", "nosuch://x/y.png"),
        "data": (ZOO / "digits-held-out",),
        "checkpoint": (ZOO / "digits-linear", GOLDEN / "reference_linear.safetensors"),
    }
    odd = (
        case.given,
        case.given / "none",
        case.given / chance.choice(NAMES),
        "/dev/null",
        *chance.sample(TEXTS[:-1], 2),
    )
    return str(chance.choice((*honest.get(name, ()), *odd)))


def _bundle(case: Case) -> Path:
    """A copy that may be written in."""
    folder = case.made / "bundle"
    return folder if folder.exists() else case.seeds.copy_bundle(folder)


def _value(case: Case, option: click.Option) -> str:
    chance, kind = case.chance, option.type
    if chance.random() < 0.15 and not isinstance(kind, click.Path):
        return chance.choice(TEXTS[:-1])
    if isinstance(kind, click.Choice):
        return str(chance.choice([*kind.choices, *kind.choices, "x", ""]))
    if isinstance(kind, click.Path):
        suffix = chance.choice((".json", ".csv", ".npz", ".parquet", ".html", ".png", "", ".exe"))
        made = case.made / f"{chance.choice(('o', 'a/b', 'x' * 300, '-o', CONTROLS))}{suffix}"
        return str(chance.choice((made, made, made, case.made, case.made / "none", "/dev/null", "/dev/full")))
    if kind.name in ("N|HxW,…", "trained|native|N", "N,…"):
        return chance.choice(SIZES)
    return chance.choice((*NUMBERS, "1GiB", "1000GiB", "1B", "local", "a100"))
